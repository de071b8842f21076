"""A classifier on pictures of things that are none of its classes: does it tell them from pictures of its classes?

n pictures
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ssmclip.data.testsets.prompts import synsets_on
from ssmclip.evaluate.classifier import logits, measured
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_images
from ssmclip.evaluate.judge import JUDGES, Judge, Right, coverage
from ssmclip.evaluate.outputs import match
from ssmclip.evaluate.statistics.metrics import average_precision, bootstrap_interval, roc_auc
from ssmclip.models.names import Model
from ssmclip.rows import Result


@JUDGES.register("outliers")
class Outliers(Judge):
    """Outliers against pictures of the same classes, by the largest softmax probability (Hendrycks et al. 2021).

    As the authors of ImageNet-O do: the softmax is over the test set's classes alone, 200 of the 1,000; the pictures to
    tell them from are those of ImageNet's validation set of these classes; outliers are the positives. Rows: aupr, the
    area under the precision-recall curve (average precision), and roc_auc; intervals resample both sets together. The
    first row's `extra` has the share of outliers, which is the aupr of guesses; classifiers may well be below it.
    Raises ValueError for a test set that does not say where pictures of its classes are, FileNotFoundError where they
    are not, and ValueError for classes that do not match.
    """

    kind = "classification"
    headline = "aupr"

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        return model.classifies and bool(getattr(test_set.card, "inliers", ""))

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.outputs = match(clip.classes, clip.outputs, test_set, clip.label)
        self.inliers = _of_classes(test_set.inliers(), synsets_on(test_set.card))

    def see(self, pictures: Any) -> ImageEmbeddings:
        return embed_images(self.clip, pictures, self.settings, logits)

    def right(self, seen: ImageEmbeddings) -> Right:
        raise ValueError(
            f"{self.test_set.card.name}: no answer of a classifier is right for pictures of none of its classes, so "
            "there is no accuracy at levels of distortion; leave distorted: out"
        )

    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        known = self.see(self.inliers)
        score = torch.cat([self._anomaly(seen), self._anomaly(known)])
        outlier = torch.arange(len(score)) < len(seen.index)
        extra = {
            "title": self.test_set.card.title,
            "kind": "outliers",
            **coverage(seen, self.test_set),
            **measured(self.clip, seen),
            "inliers": {"task": self.inliers.card.name, "n": len(known.index)},
            "share": len(seen.index) / len(score),
        }
        rows = []
        for metric, function in (("aupr", average_precision), ("roc_auc", _roc_auc)):
            if metrics and metric not in metrics:
                continue
            low, high = bootstrap_interval(
                lambda w, f=function: f(score, outlier, w), len(score), seed=self.settings.seed
            )
            value = function(score, outlier).item()
            rows.append(
                Result(self.clip.label, task, metric, value, low, high, len(score), extra={} if rows else extra)
            )
        return rows

    def _anomaly(self, seen: ImageEmbeddings) -> Float[Tensor, " n"]:
        return -seen.features[:, self.outputs.places].double().softmax(dim=1).amax(dim=1)


def _roc_auc(score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Tensor | None = None) -> Tensor:
    return roc_auc(torch.stack([-score, score], dim=1), positive.long(), weights)


@dataclass(frozen=True)
class Part:
    """Some of a test set's pictures, indexed like a test set."""

    dataset: Any
    places: list[int]

    @property
    def card(self) -> Any:
        return self.dataset.card

    @property
    def keys(self) -> list[str]:
        return [self.dataset.keys[place] for place in self.places]

    @property
    def files(self) -> tuple:
        files = self.dataset.files
        return tuple(files[place] for place in self.places) if len(files) == len(self.dataset) else files

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Any:
        return self.dataset.picture(self.places[index])


def _of_classes(test_set: Any, synsets: Sequence[str]) -> Part:
    """Return the pictures of these classes. Raises ValueError for none."""
    labels = {label for label, synset in enumerate(synsets_on(test_set.card)) if synset in set(synsets)}
    places = [place for place, label in enumerate(test_set.labels) if label in labels]
    if not places:
        raise ValueError(f"{test_set.where} has no pictures of the {len(synsets)} classes to tell outliers from")
    return Part(test_set, places)
