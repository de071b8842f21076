"""Labelled images to train a classifier on: a sample's one caption is its label, the name or number of its class.

class folders          train/CLASS/picture.jpg           CLASS is the label
webdataset shards      name.jpg, name.cls                a number or a name
tables                 image, label                      numbers or names, such as Hugging Face's parquet files
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa
import torch
from torch import Tensor

from ssmclip.data.images import folders_in, pictures_below
from ssmclip.data.lines import read_lines
from ssmclip.data.pairs.samples import Sample
from ssmclip.data.pairs.tables import TABLE_SUFFIXES, TableFormat, is_table, table_labels, tables_in
from ssmclip.data.tars import TAR_SUFFIXES
from ssmclip.data.testsets.open import Classification, load_card, open_dataset
from ssmclip.data.testsets.splits import ALL

__all__ = ["ClassIndex", "classes_of", "folder_samples", "is_class_folders", "label_format"]

DATASET = "dataset:"
LABEL_COLUMNS = ("label", "labels", "cls", "class", "class_label", "fine_label", "target")
NAMED = 8  # classes named in an error


@dataclass(frozen=True)
class ClassIndex:
    """Labels to class numbers. names: the classes' names, in the order of the classifier's outputs."""

    names: tuple[str, ...]

    def __call__(self, labels: Sequence[str]) -> Tensor:
        """Return the labels' numbers, int64 (n,). A label is a class's name, or else its number.

        Raises ValueError for a label that is neither.
        """
        return torch.tensor([self._number(label.strip()) for label in labels])

    def _number(self, label: str) -> int:
        number = self._numbers.get(label)
        if number is None and label.isdecimal() and int(label) < len(self.names):
            number = int(label)
        if number is None:
            raise ValueError(
                f"label {label!r} is none of the {len(self.names)} classes ({_few(self.names)}): set data.classes to a "
                "file that names all classes, or correct the data"
            )
        return number

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}


class _FolderSamples(Sequence):
    """Pictures in class folders as samples made on access: 1.3 M paths take 100 MB of text, not a GB of objects."""

    def __init__(self, root: Path, names: Iterable[str], numbers: Iterable[int], classes: Sequence[str]):
        self.root, self.classes = root, tuple(classes)
        self.names = pa.array(names, pa.large_string())
        self.numbers = pa.array(numbers, pa.int32())

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        name = self.names[index].as_py()
        return Sample(name, self.root / name, [self.classes[self.numbers[index].as_py()]])


def data_set(source: str) -> Classification:
    """Return the training split that `dataset:NAME` or `dataset:NAME:FOLDER` names (FOLDER: the current one).

    Raises UnknownName, FileNotFoundError where it is not in the folder, ValueError for captions in place of classes.
    """
    name, _, folder = source.removeprefix(DATASET).partition(":")
    card = load_card(name)
    if card.kind != "classification":
        raise ValueError(f"a classifier needs images with labels ({name} has captions)")
    return open_dataset(card, folder or ".", split="train")


def data_set_samples(opened: Classification) -> list[Sample]:
    """Return the samples of a data set, each with the number of its class for a label."""
    return [
        Sample(key, partial(opened.picture, index), [str(label)])
        for index, (key, label) in enumerate(zip(opened.keys, opened.labels, strict=True))
    ]


def classes_of(source: str, given: str, table_format: TableFormat) -> tuple[str, ...]:
    """Return the names of the classes of labelled data, in the order of a classifier's outputs.

    given: `data.classes`. Without it: class folders, sorted as ImageNet's and torchvision's are; a table's distinct
    labels, or the names that Hugging Face's metadata give them; of shards the lines of classnames.txt in their folder.
    Raises ValueError for fewer than 2 classes, names that occur twice, and shards that name none; FileNotFoundError.
    """
    if given:
        return _checked(_given(given), f"data.classes={given}")
    if source.startswith(DATASET):
        return tuple(names if isinstance(names, str) else names[0] for names in data_set(source).classnames)
    if is_class_folders(source):
        return _checked(_folders(training_folder(Path(source))), source)
    files = tables_in(Path(source)) or [source]
    if all(is_table(file) for file in files):
        labels, names = table_labels(files, label_format(table_format))
        return _checked(names, source) if names else _distinct(labels, source)
    names_file = Path(source if Path(source).is_dir() else Path(source).parent) / "classnames.txt"
    if not names_file.is_file():
        raise ValueError(
            f"{source} does not name its classes: set data.classes to their number or to a file with a name on each "
            f"line, or write {names_file}"
        )
    return _checked(_given(str(names_file)), str(names_file))


def label_format(table_format: TableFormat) -> TableFormat:
    """Return the format of a table whose texts are labels."""
    return replace(table_format, caption_columns=LABEL_COLUMNS)


def is_class_folders(source: str) -> bool:
    """Return whether a source is a folder of class folders, or one that has such a folder for each split."""
    folder = Path(source)
    return folder.is_dir() and bool(folders_in(folder)) and not _has_files(folder)


def training_folder(folder: Path) -> Path:
    """Return the folder of the class folders: the split to train on if there are splits."""
    splits = {path.name.lower(): path for path in folders_in(folder)}
    return next((splits[name] for name in ("train", "training") if name in splits and splits.keys() <= ALL), folder)


def _has_files(folder: Path) -> bool:
    return any(path.name.lower().endswith((*TABLE_SUFFIXES, *TAR_SUFFIXES)) for path in folder.iterdir())


def _folders(folder: Path) -> list[str]:
    return sorted(path.name for path in folders_in(folder))


def folder_samples(folder: Path) -> _FolderSamples:
    """Return the pictures in class folders. Raises ValueError for a class folder without a picture."""
    folder = training_folder(folder)
    classes = _folders(folder)
    pictures = {name: pictures_below(folder / name) for name in classes}
    if empty := [name for name, paths in pictures.items() if not paths]:
        raise ValueError(
            f"{len(empty)} of {len(classes)} class folders in {folder} have no picture: {_few(empty)}. "
            "Add pictures, or remove the folders"
        )
    found = [(str(path.relative_to(folder)), i) for i, name in enumerate(classes) for path in pictures[name]]
    names, numbers = zip(*found, strict=True) if found else ((), ())
    return _FolderSamples(folder, names, numbers, classes)


def _given(given: str) -> list[str]:
    if given.isdecimal():
        return [str(number) for number in range(int(given))]
    if not Path(given).is_file():
        raise FileNotFoundError(f"data.classes must be a number or a file with a name on each line (got {given})")
    return [line.strip() for line in read_lines(Path(given)) if line.strip()]


def _distinct(labels: Iterable[str], where: str) -> tuple[str, ...]:
    """Return the classes of data that name none: numbers from 0 to the largest label, or the labels by letter."""
    seen = {label.strip() for label in labels}
    if seen and all(label.isdecimal() for label in seen):
        return _checked([str(number) for number in range(max(map(int, seen)) + 1)], where)
    return _checked(sorted(seen), where)


def _checked(names: Sequence[str], where: str) -> tuple[str, ...]:
    if len(names) < 2:
        raise ValueError(f"a classifier needs at least 2 classes ({where} has {len(names)}: {_few(names)})")
    if twice := sorted({name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()):
        raise ValueError(f"{where} names classes more than once: {_few(twice)}")
    return tuple(names)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED]) + (" ..." if len(names) > NAMED else "")
