"""Rows in words: names of metrics, formatting of numbers, sentences about results."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from statistics import median
from typing import NamedTuple

from ssmclip.report.store import final
from ssmclip.rows import Result
from ssmclip.rows.condition import STEP
from ssmclip.rows.metrics import SHOWN


class Said(NamedTuple):
    """A sentence about a model: the model's name ("" when it is about none) and what follows it."""

    model: str
    text: str


DIFFERENCE = "_difference"
RETAINED = "_retained"
WAYS = {"image_to_text": "image to text", "text_to_image": "text to image"}
RECALL = re.compile(r"(\w+)_recall@(\d+)")


def metric_name(metric: str) -> str:
    """
    >>> metric_name("image_to_text_recall@10"), metric_name("grad_norm")
    ('image to text R@10', 'grad norm')
    """
    if metric not in SHOWN and metric.endswith(DIFFERENCE):
        return f"difference in {metric_name(metric.removesuffix(DIFFERENCE))}"
    if metric.endswith(RETAINED):
        return f"{metric_name(metric.removesuffix(RETAINED))} retained above chance"
    if match := RECALL.fullmatch(metric):
        return f"{WAYS.get(match[1], match[1].replace('_', ' '))} R@{match[2]}"
    return SHOWN[metric].title if metric in SHOWN else metric.replace("_", " ")


def is_fraction(metric: str) -> bool:
    """Return whether a metric's values are fractions, written as percentages.

    >>> is_fraction("top1_difference"), is_fraction("accuracy_difference")  # a squared one
    (True, False)
    """
    metric = metric if metric in SHOWN else metric.removesuffix(DIFFERENCE).removesuffix(RETAINED)
    return SHOWN[metric].fraction if metric in SHOWN else RECALL.fullmatch(metric) is not None


def number(value: float | None, metric: str) -> str:
    """
    >>> number(0.1234, "top1"), number(31.26, "images_per_s"), number(float("nan"), "loss")
    ('12.3 %', '31.3', 'not a number')
    """
    if value is None:
        return ""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return f"{100 * value:.1f} %" if is_fraction(metric) else _significant(value)


def interval(row: Result) -> str:
    """Return a row's 95 % interval in the unit of its value, "" if it has none."""
    if row.ci_low is None or row.ci_high is None:
        return ""
    low, high = number(row.ci_low, row.metric), number(row.ci_high, row.metric)
    return f"{low.removesuffix(' %')}–{high.removesuffix(' %')}"


def title_of(task: str, rows: Iterable[Result]) -> str:
    """Return the title of a task, from its rows."""
    return next((str(row.extra["title"]) for row in rows if row.task == task and "title" in row.extra), task)


def distorted_title(row: Result) -> str:
    """Return the common title of all distortions of a data set, from a row of one of them."""
    return f"{row.extra.get('title', row.task).rpartition(', ')[0]}, distorted"


HEADED = ("classification", "multilabel", "matching")  # kinds of test sets whose first row is the main one


def kind_of(task: str, rows: Iterable[Result]) -> str | None:
    """Return "classification", "retrieval" or another kind of test set, None if no row says which."""
    return next((row.extra["kind"] for row in rows if row.task == task and "kind" in row.extra), None)


def caveats(row: Result) -> list[str]:
    """Return what limits a row's data: only a part was used, or images could not be read."""
    said = []
    if partial := row.extra.get("partial"):
        if partial["used"] > partial["of"]:
            said.append(
                f"another split: {_count(partial['used'])} images instead of the test set's {_count(partial['of'])}"
            )
        else:
            said.append(f"partial: {_count(partial['used'])} of {_count(partial['of'])} images")
    if unreadable := row.extra.get("unreadable"):
        said.append(f"{_count(unreadable)} images could not be read")
    if told := row.extra.get("said"):
        said.append(str(told))
    said += row.extra.get("doubts", [])
    if foreign := row.extra.get("spelled_out"):
        said.append(f"{_count(foreign)} texts in a script that the tokenizer can only spell out")
    if same := row.extra.get("same_names"):
        said.append(f"classes that share a name: {', '.join(same)}")
    return said


def headline(rows: Sequence[Result], task: str) -> str | None:
    """Return the main metric of a task: the card's own; for retrieval, image-to-text recall at 10."""
    of_task = [row for row in final(rows) if row.task == task]
    if kind_of(task, of_task) == "retrieval":
        return "image_to_text_recall@10"
    return next((row.metric for row in of_task if row.extra.get("kind") in HEADED), None)


def summary(rows: Sequence[Result]) -> list[tuple[str, list[Said]]]:
    """Return each data set's title and sentences (the models' results, their comparison), then their training."""
    said = []
    for task in dict.fromkeys(row.task for row in final(rows)):
        of_task = [row for row in final(rows) if row.task == task]
        metric = headline(rows, task)
        heads = [row for row in of_task if row.metric == metric and row.plain]
        noted = {row.model: caveats(row) for row in reversed(of_task) if caveats(row)}
        sentences = [Said(row.model, _sentence(row, noted.get(row.model, []))) for row in heads]
        said += [(title_of(task, rows), sentences + _comparison(heads))] if heads else []
    return said + ([("Training", trained)] if (trained := training(rows)) else [])


def training(rows: Sequence[Result]) -> list[Said]:
    """Return one sentence about each model's training."""
    said = []
    for model in dict.fromkeys(row.model for row in rows if row.task == "train"):
        mine = [row for row in rows if row.model == model and row.task == "train" and STEP in row.where]
        losses = sorted((row.where[STEP], row.value) for row in mine if row.metric == "loss")
        speeds = [row.value for row in mine if row.metric == "images_per_s"]
        if not losses:
            continue
        text = (
            f"was trained for {_count(losses[-1][0])} steps: loss {_significant(losses[0][1])} at step {losses[0][0]}"
        )
        text += f" and {_significant(losses[-1][1])} at the last"
        said.append(Said(model, text + (f"; {_significant(median(speeds))} images per second" if speeds else "")))
    return said


def _sentence(row: Result, notes: Sequence[str]) -> str:
    value, n = number(row.value, row.metric), _count(row.n)
    counted = "questions" if row.extra.get("kind") == "matching" else "images"
    says = {
        "top1": f"classifies {value} of {n} images correctly",
        "image_to_text_recall@10": f"retrieves a correct caption in the top 10 for {value} of {n} images",
    }.get(row.metric, f"has a {metric_name(row.metric)} of {value} on {n} {counted}")
    facts = [f"95 % interval {interval(row)}"] if interval(row) else []
    if chance := row.extra.get("chance"):
        facts.append(f"chance level {number(chance, row.metric)}")
    return says + (f" ({'; '.join([*facts, *notes])})" if facts or notes else "")


def _comparison(heads: Sequence[Result]) -> list[Said]:
    ranked = sorted((row for row in heads if row.ci_low is not None), key=lambda row: -row.value)
    if len(ranked) < 2:
        return []
    first, second = ranked[:2]
    if first.ci_low > second.ci_high:
        return [Said(first.model, f"is better than {second.model}: their intervals do not overlap")]
    return [Said("", f"{first.model} and {second.model} cannot be distinguished: their intervals overlap")]


def _count(n: int | None) -> str:
    return "?" if n is None else f"{n:,}"


def _significant(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
