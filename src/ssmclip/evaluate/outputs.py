"""Which output of a classifier stands for which class of a test set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from ssmclip.data.testsets.card import Card
from ssmclip.data.testsets.prompts import Spellings, names_on, synsets_on
from ssmclip.evaluate.judge import names_of


class Outputs(NamedTuple):
    """places: the output of each class of the test set, in label order; note: what is not certain about that."""

    places: list[int]
    note: str = ""


def match(classes: Sequence[str], count: int, test_set: Any, model: str = "") -> Outputs:
    """Return the outputs that stand for a test set's classes, which may be some of the model's.

    classes: what the outputs stand for, in their order, () where that is not known; count: outputs; model: its name.
    They are found by WordNet ids where the test set has ImageNet's, else by names (as `Spellings` compares them), else
    by their order where there are as many, which the note says. Raises ValueError where neither helps, for outputs and
    classes that share names in another order, and for labels that are no numbers.
    """
    _check_labels(test_set)
    spellings = _spellings(test_set)
    known = Spellings(classes)
    for names in spellings:
        places = [_place(known, synonyms) for synonyms in names]
        if names and None not in places and len(set(places)) == len(places):
            return Outputs(places)
    names = [names_of(name)[0] for name in test_set.classnames]
    if len(names) != count or _in_another_order(known, spellings):
        raise ValueError(
            f"{model or 'the model'} has {_described(classes, count)}, {test_set.card.name} has "
            f"{_described(names, len(names))}: which output is which class cannot be told. Give the test set a "
            "subset of the model's classes, by the same names, or as many classes in the same order"
        )
    return Outputs(list(range(count)), f"the model's {count:,} outputs are taken as the test set's classes, in order")


def _spellings(test_set: Any) -> list[Sequence[Any]]:
    """Return what a test set's classes may be called, in label order: WordNet ids, its own names, and its card's."""
    card = test_set.card
    on_card = [synsets_on(card), names_on(card)] if isinstance(card, Card) else [(), ()]
    lists = [on_card[0], test_set.classnames, on_card[1]]
    return [names for names in lists if len(names) == len(test_set.classnames)]


def _place(known: Spellings, synonyms: str | Sequence[str]) -> int | None:
    places = {place for name in names_of(synonyms) if (place := known.find(name)) is not None}
    return places.pop() if len(places) == 1 else None


def _in_another_order(known: Spellings, spellings: Sequence[Sequence[Any]]) -> bool:
    found = [(label, _place(known, name)) for names in spellings for label, name in enumerate(names)]
    return any(place not in (None, label) for label, place in found)


def _described(classes: Sequence[str], count: int) -> str:
    return f"{count:,} classes ({', '.join(classes[:3]) or 'without names'}{' ...' if len(classes) > 3 else ''})"


def _check_labels(test_set: Any) -> None:
    if test_set.labels is None:
        raise ValueError(f"{test_set.card.name} has no classes, which a classifier needs")
    for key, label in zip(test_set.keys, test_set.labels, strict=True):
        if isinstance(label, str):
            raise ValueError(
                f"{test_set.card.name}: labels must be numbers of classes, from 0 (got {label!r} for {key})"
            )
