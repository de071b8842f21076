"""Judges, which decide what a model got right on a test set; every task of an evaluation has one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from jaxtyping import Bool
from torch import Tensor

from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_images
from ssmclip.models.names import Model
from ssmclip.registry import Registry
from ssmclip.rows import Result

NAMED = 20  # unreadable images named in a row


class Right(NamedTuple):
    """Which of n images a model got right, and the chance level (None if unknown)."""

    hits: Bool[Tensor, " n"]
    chance: float | None


class Judge(ABC):
    """The judge of one model on one test set, built once and then asked about images, distorted or not.

    kind: the kind of test set that it judges; headline: the metric that `right` is the mean of.
    A new judge is a subclass, registered in JUDGES.
    """

    kind: ClassVar[str]
    headline: ClassVar[str]

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        """Return whether it can judge models of this sort on this test set, of its kind."""
        return True

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        self.clip, self.test_set, self.settings = clip, test_set, settings

    def see(self, pictures: Any) -> ImageEmbeddings:
        """Return what the model makes of the pictures: of the test set, or of a distorted version of it."""
        return embed_images(self.clip, pictures, self.settings)

    def check(self, metrics: Sequence[str]) -> None:
        """Raise, before anything is embedded, for metrics that do not fit the test set. Here any do."""
        return

    @abstractmethod
    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        """Return the rows of a task, the metric that sums it up first. metrics: others in place of the usual ones."""

    @abstractmethod
    def right(self, seen: ImageEmbeddings) -> Right:
        """Return which pictures the model got right, in the order of `seen.index`."""


# The first that is registered for a kind of test set and takes the model is its usual one.
_HOMES = ("zeroshot", "retrieval", "outliers", "classifier", "multilabel", "matching")
JUDGES: Registry[type[Judge]] = Registry("judge", [f"ssmclip.evaluate.{name}" for name in _HOMES])


def judges_of(kind: str) -> dict[str, type[Judge]]:
    """Return the judges of a kind of test set by name. Raises ValueError if none is registered for it."""
    if judges := {name: judge for name, judge in JUDGES.items() if judge.kind == kind}:
        return judges
    raise ValueError(f"no judge is registered for test sets of kind {kind!r}: add one to ssmclip.evaluate.judge.JUDGES")


def usual_judge(model: Model, test_set: Any) -> str:
    """Return the name of the judge of a model on a test set. Raises ValueError if none takes it."""
    judges = judges_of(test_set.card.kind)
    for name, judge in judges.items():
        if judge.takes(model, test_set):
            return name
    raise ValueError(
        f"{model.label or 'the model'} cannot be judged on {test_set.card.name}: it is an image encoder without a text "
        f"tower, and {'has no classifier' if not model.classifies else 'classes do not help in ' + test_set.card.kind}"
    )


def names_of(names: str | Sequence[str]) -> list[str]:
    """Return the names of a class, of which it may have one or several."""
    return [names] if isinstance(names, str) else list(names)


def coverage(images: ImageEmbeddings, test_set: Any) -> dict[str, Any]:
    """Return which part of the test set was measured, if not all of it, and other caveats."""
    extra: dict[str, Any] = {}
    whole = test_set.card.test_size or len(test_set)
    if len(images.index) != whole:
        extra["partial"] = {"used": len(images.index), "of": whole}
    if images.unreadable:
        extra["unreadable"] = len(images.unreadable)
        extra["unreadable_first"] = [f"{test_set.keys[i]}: {why}" for i, why in list(images.unreadable.items())[:NAMED]]
    if said := getattr(test_set, "said", ""):
        extra["said"] = said
    names = Counter(name for names in getattr(test_set, "classnames", ()) for name in names_of(names))
    if same := [name for name, count in names.items() if count > 1]:
        extra["same_names"] = same
    return extra
