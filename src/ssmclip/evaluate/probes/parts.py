"""The splits of a data set, as a probe needs them: what is trained on, what penalties are chosen on, what is tested on.

n images
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from ssmclip.data.testsets.card import WHOLE
from ssmclip.data.testsets.open import load_card, open_dataset
from ssmclip.data.testsets.splits import spellings
from ssmclip.evaluate.judge import names_of


@dataclass(frozen=True)
class Parts:
    """test: what `open_dataset` returns, or an object of one's own with the same attributes; train: the same of its
    training images, None to split `test` by seed; validation: of its validation split, None where there is none.

    Raises ValueError for sets without classes, and for pictures that are in two of them.
    """

    test: Any
    train: Any = None
    validation: Any = None

    def __post_init__(self):
        for part in self.opened():
            if part.card.kind != "classification" or part.labels is None:
                raise ValueError(f"a probe needs the classes of its images, and {part.card.name} has none")
        _check_apart(self.opened())

    def opened(self) -> list[Any]:
        """Return the sets there are, what is tested on first."""
        return [part for part in (self.test, self.train, self.validation) if part is not None]

    @property
    def names(self) -> list[str]:
        """Return the classes' names: of the test set, in its order, then those that only other parts have."""
        every = [names_of(name)[0] for name in self.test.classnames]
        for part in self.opened()[1:]:
            every += [name for name in _strangers(part, self.test)]
        return list(dict.fromkeys(every)) if len(every) > len(self.test.classnames) else every

    def labels(self, part: Any, labels: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        """Return a part's labels as places in `names`: class folders of two splits need not be the same.

        Raises ValueError for labels without a class.
        """
        classes = [names_of(name)[0] for name in part.classnames]
        if outside := [label for label in labels.tolist() if not 0 <= label < len(classes)]:
            raise ValueError(
                f"{len(outside)} of {len(labels)} images of {part.card.name} have no label from 0 to "
                f"{len(classes) - 1}; the first: {outside[0]}"
            )
        if tuple(part.classnames) == tuple(self.test.classnames):
            return labels
        names = self.names
        return torch.tensor([names.index(name) for name in classes])[labels]


def open_parts(name: str, root: str | Path, *, download: bool = True) -> Parts:
    """Open the splits of a named data set. One that no split was made of comes as its test set alone.

    Raises what `open_dataset` raises: FileNotFoundError where there is a test split, and no training split beside it;
    and ValueError for a data set without classes.
    """
    card = load_card(name)
    test = open_dataset(card, root, download=download)
    parts = Parts(test)
    if test.split == WHOLE:
        return parts
    train = open_dataset(card, root, split="train", download=download)
    return replace(parts, train=train, validation=_validation(test, root, download))


def _validation(test: Any, root: str | Path, download: bool) -> Any:
    """The validation split; None where there is none, and where it is what is tested on."""
    if {test.split, test.card.split} & set(spellings("val")):
        return None
    try:
        return open_dataset(test.card, root, split="val", download=download)
    except FileNotFoundError:
        return None


def _strangers(part: Any, test: Any) -> list[str]:
    if tuple(part.classnames) == tuple(test.classnames):
        return []
    known = {names_of(name)[0] for name in test.classnames}
    return [name for names in part.classnames if (name := names_of(names)[0]) not in known]


def _check_apart(parts: Sequence[Any]) -> None:
    """Raise ValueError for two parts with a picture file of their own in common."""
    seen: dict[Path, str] = {}
    for part in parts:
        files = getattr(part, "files", ())
        if len(files) != len(part):  # files of many pictures: which of them are whose, only their reader knows
            continue
        if shared := [file for file in files if seen.get(file, part.where) != part.where]:
            raise ValueError(
                f"{len(shared)} pictures are both in {seen[shared[0]]} and in {part.where}; the first: {shared[0]}. "
                "A probe must be tested on other pictures than it was trained on"
            )
        seen |= dict.fromkeys(files, part.where)
