"""Probes: what each learns from, what it answers, and how names such as `fewshot-16` become probes.

n images · d features · c classes
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmclip.registry import Registry, UnknownName

_SPELLED = re.compile(r"([a-z][a-z-]*?)(?:-(\d+))?")


@dataclass(frozen=True)
class Labelled:
    """Images as a probe sees them: features, not normalised, and classes from 0."""

    features: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.labels)

    def at(self, places: Int[Tensor, " m"]) -> Labelled:
        """Return the images at these places."""
        return Labelled(self.features[places], self.labels[places])

    def joined(self, others: Labelled) -> Labelled:
        """Return these images, then the others."""
        return Labelled(torch.cat([self.features, others.features]), torch.cat([self.labels, others.labels]))

    @property
    def classes(self) -> Int[Tensor, " k"]:
        """Return the classes that occur, in order."""
        return self.labels.unique()


@dataclass(frozen=True)
class Splits:
    """What a probe gets: images to train on, images of a validation split, or None where the data set has none, the
    features it is tested on, the classes that occur among these, and the names of all classes."""

    train: Labelled
    validation: Labelled | None
    test: Float[Tensor, "n d"]
    tested: Int[Tensor, " k"]
    names: Sequence[str]


@dataclass(frozen=True)
class Answer:
    """What a trained probe says of the test images: a score of each class; about: what a row keeps of its training;
    seed: of the draw of its training images, None where nothing was drawn."""

    scores: Float[Tensor, "n c"]
    about: dict[str, Any] = field(default_factory=dict)
    seed: int | None = None


class Probe(ABC):
    """A classifier to train on frozen features. A new one is a frozen dataclass, registered in PROBES.

    number: the field that a number in a task's name sets, "" for none: `knn-200` is Neighbours(k=200).
    """

    number: ClassVar[str] = ""

    @property
    @abstractmethod
    def title(self) -> str:
        """Return what reports call it."""

    @abstractmethod
    def answers(self, splits: Splits, seed: int) -> list[Answer]:
        """Return what it says of the test images: one answer, or one for each draw of training images.

        Raises ValueError for images it cannot learn from.
        """


_HOMES = ("linear", "knn", "fewshot", "sgd")
PROBES: Registry[type[Probe]] = Registry("probe", [f"ssmclip.evaluate.probes.{name}" for name in _HOMES])


def read_probe(spelled: str) -> Probe:
    """Return the probe of a name, which a number may follow.

    Raises UnknownName, and ValueError for a number where none is due, a missing one, and one out of range.

    >>> read_probe("knn"), read_probe("knn-200"), read_probe("fewshot-16")
    (Neighbours(k=20, temperature=0.07), Neighbours(k=200, temperature=0.07), FewShot(shots=16, draws=3))
    """
    match = _SPELLED.fullmatch(spelled)
    if match is None or match[1] not in PROBES:
        raise UnknownName(PROBES.kind, match[1] if match else spelled, PROBES)
    kind, number = PROBES[match[1]], match[2]
    if number is None:
        if kind.number and next(f for f in fields(kind) if f.name == kind.number).default is MISSING:
            raise ValueError(f"the probe {spelled} needs a number, the {kind.number}: {spelled}-16:DATASET")
        return kind()
    if not kind.number:
        raise ValueError(f"the probe {match[1]} takes no number (got {spelled})")
    return kind(**{kind.number: int(number)})


def is_probe(spelled: str) -> bool:
    """Return whether this is how a probe is spelled.

    >>> is_probe("fewshot-16"), is_probe("linear"), is_probe("folder")
    (True, True, False)
    """
    match = _SPELLED.fullmatch(spelled)
    return match is not None and match[1] in PROBES


def require_classes(train: Labelled, names: Sequence[str]) -> None:
    """Raise ValueError for training images of fewer than two classes."""
    present = train.classes.tolist()
    if len(present) < 2:
        shown = ", ".join(repr(names[label]) for label in present) or "none"
        raise ValueError(
            f"a probe needs training images of at least 2 classes (got {len(present)}: {shown}): give a training "
            "split with pictures of every class, or more of its images"
        )


def spread(
    scores: Float[Tensor, "n k"], present: Int[Tensor, " k"], classes: int, absent: float | None = None
) -> Float[Tensor, "n c"]:
    """Return scores of all classes: those that were not trained on score below all others, or `absent`."""
    low = scores.min().item() - 1 if absent is None else absent
    whole = scores.new_full((len(scores), classes), low)
    whole[:, present] = scores
    return whole
