"""Judges by scores: an image belongs to the class that scores highest. What they share is here.

n images · c classes
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmclip.evaluate import pictures
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings
from ssmclip.evaluate.judge import Judge, Right, coverage, names_of
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.metrics import METRICS, bootstrap_interval, in_first
from ssmclip.models.names import Model
from ssmclip.rows import Result
from ssmclip.rows.payloads import ClassAccuracy, Confusion, GroupAccuracy, ImageExample, Similarity

MAX_CONFUSION = 30  # classes; a larger matrix can't be read
SHOWN = 3  # best classes kept of an example
OF_LOGITS = ("nll", "ece", "temperature", "calibrated_nll", "calibrated_ece")
# Metrics of accuracies in groups: the accuracy, and what is made of the groups'.
K = {"top1": 1, "top5": 5}
GROUPED: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "worst_group": ("top1", lambda accuracies: accuracies.amin(-1)),
    "average_group": ("top1", lambda accuracies: accuracies.mean(-1)),
    "group_gap": ("top1", lambda accuracies: accuracies.amax(-1) - accuracies.amin(-1)),
    "worst_group_top5": ("top5", lambda accuracies: accuracies.amin(-1)),
}
ASKED = {"worst_group_top5": ("worst_group_top5",), "group_gap": tuple(GROUPED)}  # only of cards with these metrics


class ByScores(Judge):
    """A judge that scores every class for every image.

    Rows: the card's metric first, then top1, mean_per_class and (above 5 classes) top5, then a judge's own; where the
    test set has groups, worst_group and average_group. Where several classes are right for an image (`answers`), any
    of them is a hit, and there is no mean over classes. The first row's `extra` has the classes' accuracies, the
    confusion matrix and examples; that of top1 which images were right, for paired tests.
    Raises ValueError for labels without a class.
    """

    kind = "classification"
    headline = "top1"
    more_metrics: tuple[str, ...] = ()

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.names = [names_of(name)[0] for name in test_set.classnames]

    @abstractmethod
    def scores(self, seen: ImageEmbeddings) -> Float[Tensor, "n c"]:
        """Return each image's scores of the test set's classes."""

    def logits(self, scores: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return what the classes' probabilities are the softmax of, for metrics that are of probabilities."""
        return scores

    @abstractmethod
    def about(self, seen: ImageEmbeddings) -> dict[str, Any]:
        """Return what the first row's `extra` keeps of this judge and its model."""

    def shown(self, scores: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        """Return the scores as examples show them, in the same order."""
        return scores

    def right(self, seen: ImageEmbeddings) -> Right:
        scores = self.scores(seen)
        return Right(_right(scores, self.target(scores, seen)), self._chance("top1"))

    def target(self, scores: Float[Tensor, "n c"], seen: ImageEmbeddings) -> Int[Tensor, " n"]:
        """Return the right class of each image; of several, the one that scores highest (the first of equals), so
        that an image is a hit among the first k if any of its classes is."""
        if getattr(self.test_set, "answers", None) is None:
            return seen.labels
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        for row, right in enumerate(self._answers(seen)):
            allowed[row, right] = True
        return scores.masked_fill(~allowed, -torch.inf).argmax(dim=1)

    def usual_metrics(self) -> tuple[str, ...]:
        one_answer = getattr(self.test_set, "answers", None) is None
        usual = (
            *(self._grouped()[1:] or [self.test_set.card.metric]),
            "top1",
            *(["mean_per_class"] if one_answer else []),
        )
        usual += (*(["top5"] if len(self.names) > 5 else []), *(self.more_metrics if one_answer else ()))
        return tuple(dict.fromkeys(usual))

    def check(self, metrics: Sequence[str] = ()) -> None:
        """Raise UnknownName for a metric nobody knows, ValueError for one that is not for as many classes or needs
        groups that the test set does not have. metrics: () for the usual ones."""
        for metric in metrics or self._grouped() or self.usual_metrics():
            if metric not in GROUPED:
                _fit(metric, len(self.names), self.test_set.card.name)
            elif not getattr(self.test_set, "groups", None):
                raise ValueError(
                    f"{self.test_set.card.name}: the metric {metric} needs a group for each picture, and this copy has "
                    "none: give another copy, or a groups.csv, or another metric"
                )

    def _grouped(self) -> tuple[str, ...]:
        """Return the card's metric where it is one of groups, and the accuracy that it is of."""
        metric = self.test_set.card.metric
        return (metric, GROUPED[metric][0]) if metric in GROUPED else ()

    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        self.check(metrics)
        settings, names = self.settings, self.names
        labels = seen.labels
        if not (0 <= labels.min() and labels.max() < len(names)):
            raise ValueError(
                f"{task}: labels range from {labels.min()} to {labels.max()}, but there are {len(names)} classes"
            )
        scores = self.scores(seen)
        target = self.target(scores, seen)
        n = len(target)
        metrics = tuple(dict.fromkeys(metrics or self.usual_metrics()))
        extra = self._extra(seen, scores, target, metrics[0])
        rows = []
        for metric in metrics:
            function = METRICS[metric].function
            given = self.logits(scores) if metric in OF_LOGITS else scores
            value = function(given, target).item()
            low, high = bootstrap_interval(
                lambda w, f=function, given=given: f(given, target, w), n, seed=settings.seed
            )
            more = {} if rows else extra
            if metric == "top1":
                more = more | paired.marked(
                    _right(scores, target), [self.test_set.keys[i] for i in seen.index.tolist()]
                )
            rows.append(Result(self.clip.label, task, metric, value, low, high, n, extra=more))
        rows += _group_rows(self.clip.label, task, (scores, target), seen, self.test_set, settings)
        return _first(rows, self.test_set.card.metric)

    def _extra(self, seen: ImageEmbeddings, scores: Tensor, target: Tensor, metric: str) -> dict[str, Any]:
        card, settings, names = self.test_set.card, self.settings, self.names
        extra = {
            "title": card.title,
            "kind": self.kind,
            "chance": self._chance(metric),
            **coverage(seen, self.test_set),
            **self.about(seen),
        }
        if getattr(self.test_set, "answers", None) is None:
            extra |= {"per_class": _per_class(scores, target, names), **_confusion(scores, target, names)}
        return extra | _examples(seen.index, self._answers(seen), self.shown(scores), names, self.test_set, settings)

    def _answers(self, seen: ImageEmbeddings) -> list[list[int]]:
        """Return the right classes of each image."""
        answers = getattr(self.test_set, "answers", None)
        if answers is None:
            return [[label] for label in seen.labels.tolist()]
        return [list(answers[place]) for place in seen.index.tolist()]

    def _chance(self, metric: str) -> float | None:
        chance = METRICS[metric].chance(len(self.names))
        answers = getattr(self.test_set, "answers", None)
        if answers is None or metric != "top1":
            return chance
        return sum(map(len, answers)) / len(answers) / len(self.names)


def _right(scores: Tensor, target: Tensor) -> Tensor:
    return scores.argmax(dim=1) == target


def _fit(metric: str, classes: int, name: str) -> None:
    """Raise for a metric nobody knows, and for one that is not for so many classes."""
    least, most = METRICS[metric].classes
    if not least <= classes <= (most or classes):
        wanted = f"exactly {least}" if least == most else f"at least {least}"
        raise ValueError(f"{name}: the metric {metric} needs {wanted} classes (got {classes}): choose another metric")


def _first(rows: list[Result], metric: str) -> list[Result]:
    """Return the rows with one of groups first, if it is the card's: it then has what the first row keeps."""
    place = next((place for place, row in enumerate(rows) if row.metric == metric and metric in GROUPED), 0)
    if not place:
        return rows
    own = {key: value for key, value in rows[0].extra.items() if key not in ("right", "images")}
    marks = {key: value for key, value in rows[0].extra.items() if key not in own}
    head = replace(rows[place], extra=own | rows[place].extra | {"chance": None})
    return [head, replace(rows[0], extra=marks), *rows[1:place], *rows[place + 1 :]]


def _group_rows(
    model: str,
    task: str,
    scored: tuple[Float[Tensor, "n c"], Int[Tensor, " n"]],
    images: ImageEmbeddings,
    dataset: Any,
    settings: Settings,
) -> list[Result]:
    """Return the worst-group accuracy and the mean over groups (Sagawa et al. 2020, section 3), and where the card asks
    for it the worst group's top-5 accuracy."""
    if not (groups := getattr(dataset, "groups", None)):
        return []
    names = [groups[i] for i in images.index.tolist()]
    known = sorted(set(names))
    member = torch.tensor([[name == group for group in known] for name in names]).double()
    rows = []
    for metric, (accuracy, over) in GROUPED.items():
        if metric in ASKED and dataset.card.metric not in ASKED[metric]:
            continue
        hits = in_first(*scored, K[accuracy])[:, None] * member

        # A group that a resample misses has no accuracy there: NaN, which the interval leaves out.
        def accuracies(weights: Tensor, hits: Tensor = hits) -> Tensor:
            return (weights @ hits) / (weights @ member)

        whole = accuracies(torch.ones(1, len(hits), dtype=torch.float64))[0]
        groups_extra = [
            GroupAccuracy(name=group, accuracy=value, n=int(count))
            for group, value, count in zip(known, whole.tolist(), member.sum(0).tolist(), strict=True)
        ]
        low, high = bootstrap_interval(lambda w, of=accuracies, over=over: over(of(w)), len(hits), seed=settings.seed)
        more = {"groups": groups_extra} if metric.startswith("worst_group") else {}
        rows.append(Result(model, task, metric, over(whole).item(), low, high, len(hits), extra=more))
    return rows


def _per_class(scores: Tensor, target: Tensor, names: list[str]) -> list[ClassAccuracy]:
    right = _right(scores, target)
    of_class = [right[target == i] for i in range(len(names))]
    return [
        ClassAccuracy(name=name, accuracy=hits.double().mean().item(), n=len(hits))
        for name, hits in zip(names, of_class, strict=True)
        if len(hits)
    ]


def _confusion(scores: Tensor, target: Tensor, names: list[str]) -> dict[str, Confusion]:
    if len(names) > MAX_CONFUSION:
        return {}
    cells = target * len(names) + scores.argmax(dim=1)
    counts = torch.bincount(cells, minlength=len(names) ** 2).reshape(len(names), -1)
    return {"confusion": Confusion(names=names, counts=counts.tolist())}


def _examples(
    index: Tensor, answers: list[list[int]], scores: Tensor, names: list[str], dataset: Any, settings: Settings
) -> dict[str, Any]:
    rows = pictures.draw(len(scores), settings.examples, settings.seed)
    if not rows:
        return {}
    places, labels = [str(place) for place in index.tolist()], [right[0] for right in answers]
    classes = sorted(pictures.draw(len(names), 2 * settings.examples, settings.seed))
    first = {label: labels.index(label) for label in classes if label in labels}  # one image of each class
    drawn = list(first.values())
    return {
        "thumbnails": pictures.thumbnails(dataset, [int(places[row]) for row in rows + drawn]),
        "image_to_text": [
            ImageExample(
                image=places[row],
                truth=[names[label] for label in answers[row]],
                found=pictures.found(scores[row], names, set(answers[row]), SHOWN),
            )
            for row in rows
        ],
        "similarity": Similarity(
            images=[places[row] for row in drawn],
            texts=[names[label] for label in first],
            scores=pictures.matrix(scores[drawn][:, list(first)]),
        ),
    }
