"""What every form of test set is described by: the card that is known beforehand, and what was found on a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ssmclip.registry import Registry

SORTED = "sorted"
WHOLE = "all"  # the split of pictures that no split was made of


@dataclass(frozen=True)
class Card:
    """What is known of a data set without its files.

    kind: one of `testset.KINDS`; metric: the headline one; test_size: images in the whole test set (0: not
    known); split: the part of the data set that is tested on;
    classnames: in label order; templates: prompts with {} for the class name; either may instead say where they are
    ("open_clip:NAME", "clip_benchmark:KEY"), and where there are no classnames the files bring `classes` of them;
    layouts: names in LAYOUTS, tried in order; aliases: names it goes by elsewhere, in folders and in files of prompts;
    inliers: the data set with pictures of the classes, where this one's pictures are of none of them (outliers);
    metadata: names of the numbers that NAME.npy beside a picture holds, in webdatasets; grouped_by: the one of them
    that groups are told apart by;
    folders: the class folders' names in label order, where they are not the class names ("sorted": their own order is
    the label order; "timm:NAME": WordNet ids that timm lists);
    own: whether it is a person's own data set, in the folder `source` or under the root: its names mean themselves;
    part: "" for the split that is tested on, or another one, which `open_dataset` asks layouts for: "train" or "val".
    """

    name: str
    title: str
    citation: str
    source: str
    licence: str
    kind: str
    metric: str
    test_size: int
    layouts: tuple[str, ...]
    classnames: tuple[str, ...] | str = ()
    templates: tuple[str, ...] | str = ()
    aliases: tuple[str, ...] = ()
    folders: tuple[str, ...] | str = ()
    classes: int = 0
    split: str = "test"
    note: str = ""
    inliers: str = ""
    metadata: tuple[str, ...] = ()
    grouped_by: str = ""
    own: bool = False
    part: str = ""


@dataclass(frozen=True)
class Question:
    """Pictures and texts to be matched: a caption among wrong ones, two pictures with a caption each, a cue and the
    pictures that it is about.

    key: its name; pictures: their places in the test set; texts; right: the (picture, text) that belong together, by
    their places in these two; category: what is asked about, "" where there is one kind of question.
    """

    key: str
    pictures: tuple[int, ...]
    texts: tuple[str, ...]
    right: tuple[tuple[int, int], ...]
    category: str = ""


@dataclass(frozen=True)
class Found:
    """A test set. pictures[i] opens picture i, keys[i] names it; labels or captions go with its kind.

    classnames, templates: when the files bring their own; groups: a name for each picture, where the set has them;
    files: what the pictures are read from, for telling whether they have changed; said: what a reader must know;
    split: the split they are of, WHOLE where there are no splits, "" where the layout does not tell splits apart;
    answers: all classes that are right for each picture, where there may be several (labels: one of them);
    questions: what pictures and texts are to be matched.
    """

    where: str
    pictures: Sequence  # of PIL images; what checks types would open one, which may not be possible
    keys: list[str]
    labels: list[int] | None = None
    captions: list[list[str]] | None = None
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    groups: list[str] | None = None
    files: tuple[Path, ...] = field(default=(), repr=False)
    said: str = ""
    split: str = ""
    answers: list[tuple[int, ...]] | None = None
    questions: list[Question] | None = None


# A layout: (folder, card) -> Found, or a string that names what is not there. Files that are there but damaged raise
# ValueError or FileNotFoundError. Where a card asks for a `part`, only what says that it is of this split is taken.
_HOMES = (
    "arrays",
    "captioned",
    "faces",
    "folders",
    "originals",
    "parquet",
    "questions",
    "real",
    "tables",
    "tars",
    "voc",
)
LAYOUTS: Registry[Callable[[Path, Card], Found | str]] = Registry(
    "layout", [f"ssmclip.data.testsets.layouts.{name}" for name in _HOMES]
)


class Pictures(Sequence):
    """Pictures opened one at a time, by a function of the number."""

    def __init__(self, count: int, get: Callable[[int], Image.Image]):
        self.count, self.get = count, get

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.get(index)
