"""Second opinions that cost nothing: signs that a number is of something else than it seems."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from scipy.stats import binom

from ssmclip.rows import Result

DOUBTS = "doubts"  # the key in a row's `extra`
UNLIKELY = 1e-3  # probability of guesses doing as badly, below which it is said
IN_ORDER = "class names are in the order of the labels"
SAME_CLASSES = "labels mean the same classes in the training and the test split"


def doubted(rows: Sequence[Result], test_set: Any) -> list[Result]:
    """Return the rows of one model on one task; the first says what gives reason to doubt them, where anything does."""
    reasons = [*below_guessing(rows), *same_captions(test_set)]
    if not rows or not reasons:
        return list(rows)
    return [replace(rows[0], extra=rows[0].extra | {DOUBTS: reasons}), *rows[1:]]


def below_guessing(rows: Sequence[Result]) -> list[str]:
    """Say so when the first metric is so far below guessing that guesses would hardly be: labels in another order.

    >>> below_guessing([Result("A", "digits", "top1", 0.02, n=1000, extra={"chance": 0.1})])
    ['top1 of 2.0 % is far below guessing (10.0 %): check that class names are in the order of the labels']
    """
    for row in rows[:1]:
        chance = row.extra.get("chance")
        if row.extra.get("kind") == "matching":
            continue  # questions are made to be answered wrongly
        if chance and row.n and row.value < chance and binom.cdf(round(row.value * row.n), row.n, chance) < UNLIKELY:
            of_classes = SAME_CLASSES if "probe" in row.extra else IN_ORDER
            check = "captions go with their images" if "recall" in row.metric else of_classes
            value, guess = f"{100 * row.value:.1f} %", f"{100 * chance:.1f} %"
            return [f"{row.metric} of {value} is far below guessing ({guess}): check that {check}"]
    return []


def same_captions(test_set: Any) -> list[str]:
    """Say so when images share a caption word for word: each counts as a wrong answer for the other image."""
    captions = getattr(test_set, "captions", None)
    if not captions:
        return []
    images = defaultdict(set)
    for place, of_image in enumerate(captions):
        for caption in of_image:
            images[caption].add(place)
    shared = [caption for caption, places in images.items() if len(places) > 1]
    if not shared:
        return []
    of_images = set().union(*(images[caption] for caption in shared))
    text = f"{len(shared):,} captions belong to several images ({len(of_images):,} images)"
    return [f"{text}: each counts as wrong for the others; the first is {shared[0][:60]!r}"]
