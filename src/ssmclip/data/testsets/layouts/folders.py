"""Test sets of class folders: a folder for each class, with pictures at any depth.

Names and labels go by one list of the folders (`label_folders`), whoever names the classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ssmclip.data.images import folders_in, pictures_below
from ssmclip.data.testsets.card import LAYOUTS, SORTED, WHOLE, Card, Found
from ssmclip.data.testsets.files import picture_files, read_rows
from ssmclip.data.testsets.prompts import Spellings, folders_on, names_on, own_names, plain, spoken
from ssmclip.data.testsets.splits import ALL, choose_split


@LAYOUTS.register("class_folders")
def class_folders(folder: Path, card: Card) -> Found | str:
    """test/CLASS/picture.jpg, or SPLIT/, val/ or CLASS/ alone. Case and punctuation of folder names don't matter.

    Folders are known by the card's `folders` or class names; a card with neither takes the names of all there are.
    For training, train/CLASS/ alone.
    A file groups.csv (file,group) beside them gives each picture's group.
    Raises ValueError for folders without a class, two of one class, and folders without a picture.
    """
    known = _known_folders(card)
    places = [place for place in _places(folder, card) if _has_classes(place.folder, known, card)]
    if not places:
        return f"{card.part}/CLASS/" if card.part else f"{card.split}/CLASS/, val/CLASS/ or CLASS/ with pictures"
    place, split, note = places[0]
    folders = folders_in(place)
    there = sum(known.find(path.name) is not None for path in folders)
    if len(known) and not _own(place, card) and (2 * there < len(folders) or _shares_folders(card)):
        return f"class folders of its own (those in {place} may be another set's)"
    labelled = label_folders(place, folders, card)
    paths, labels = labelled_pictures(labelled)
    keys = [str(path.relative_to(place)) for path in paths]
    return Found(
        where=str(place),
        pictures=picture_files(paths),
        keys=keys,
        labels=labels,
        classnames=() if names_on(card) else _names(labelled, card),
        groups=_groups(place, folder, keys),
        files=tuple(paths),
        said=note,
        split=split,
    )


def label_folders(place: Path, folders: Sequence[Path], card: Card) -> dict[Path, int]:
    """Return the label of each class folder, in the order of the folders.

    It is that of the class the card knows by the folder's name. Where the card knows none, the folders' own order is
    the label order: that of numbers by size, of names by letter.
    Raises ValueError for folders without a class, two of one class, and folders in their own order of which some are
    missing.
    """
    known = _known_folders(card)
    if not len(known):
        return _all_of(place, folders, card)
    found = {path: known.find(path.name) for path in folders}
    if strangers := [path.name for path, label in found.items() if label is None]:
        names = folders_on(card) or names_on(card)
        raise ValueError(f"{place} has folders that are no class: {_few(strangers)}. Classes: {_few(names)}")
    first: dict[int, Path] = {}
    for path, label in found.items():
        if (other := first.setdefault(label, path)) is not path:
            raise ValueError(f"{place}: {other.name} and {path.name} are the same class")
    return found


def labelled_pictures(labels: dict[Path, int]) -> tuple[list[Path], list[int]]:
    """Return the pictures below class folders and their labels. Raises ValueError for a folder without a picture."""
    pictures = {path: pictures_below(path) for path in labels}
    if empty := [path for path, found in pictures.items() if not found]:
        raise ValueError(f"the class folder {empty[0]} has no picture")
    paths = [picture for found in pictures.values() for picture in found]
    return paths, [labels[path] for path, found in pictures.items() for _ in found]


class _Place(NamedTuple):
    """Where class folders may lie, the split they are of then, and what a reader must know of it."""

    folder: Path
    split: str
    note: str


def _places(folder: Path, card: Card) -> list[_Place]:
    """Where class folders may lie: below a folder for the split, and, where all of them are tested on, bare."""
    if not folder.is_dir():
        return []
    below = {path.name.lower(): path for path in folders_in(folder)}
    split, note = choose_split(card.split, below)
    bare = [] if card.part else [_Place(folder, WHOLE, "")]
    return [*([_Place(below[split], split, note)] if split else []), *bare]


def _has_classes(place: Path, known: Spellings, card: Card) -> bool:
    folders = folders_in(place)
    if any(known.find(path.name) is not None for path in folders):
        return True
    return not len(known) and _own(place, card) and not all(_is_no_class(path.name, card) for path in folders)


def _is_no_class(name: str, card: Card) -> bool:
    """Whether a folder is of a split, or of the data set: where there are no others, classes lie in these."""
    return name.lower() in ALL or (
        not card.own and plain(name) in {plain(known) for known in (card.name, *card.aliases)}
    )


def _known_folders(card: Card) -> Spellings:
    """Class folder -> label; empty when the card names none."""
    return Spellings(folders_on(card) or (() if card.folders == SORTED else names_on(card)))


def _own(place: Path, card: Card) -> bool:
    """Whether folders of any names are classes here: below a folder that is called like the data set, or so split."""
    names = {plain(name) for name in (card.name, *card.aliases)}
    return card.own or plain(place.name) in names or plain(place.parent.name) in names


def _shares_folders(card: Card) -> bool:
    """Whether its class folders are called as ImageNet's are, all of them."""
    return isinstance(card.folders, str) and card.folders.startswith("timm:") and card.name != "imagenet"


def _all_of(place: Path, folders: Sequence[Path], card: Card) -> dict[Path, int]:
    names = names_on(card)
    if names and len(names) != len(folders):
        raise ValueError(
            f"{place} has {len(folders)} class folders and {card.name} has {len(names)} classes: which folder is which "
            "class shows only when all are there"
        )
    by_size = all(path.name.isdecimal() for path in folders)
    ordered = sorted(folders, key=lambda path: (int(path.name) if by_size else 0, path.name))
    label = {path: place for place, path in enumerate(ordered)}
    return {path: label[path] for path in folders}


def _names(labels: dict[Path, int], card: Card) -> tuple[str, ...]:
    """The folders' names as class names, in label order."""
    names = [path.name for path in sorted(labels, key=labels.__getitem__)]
    return own_names(names) if card.own else tuple(map(spoken, names))


def _few(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _groups(place: Path, folder: Path, keys: list[str]) -> list[str] | None:
    """The groups of groups.csv (columns file and group), None without it. Raises ValueError for pictures it lacks."""
    table = next((path / "groups.csv" for path in (place, folder) if (path / "groups.csv").is_file()), None)
    if table is None:
        return None
    rows = read_rows(table)
    if not {"file", "group"} <= set(rows[0]):
        raise ValueError(f"{table} must have the columns file and group; it has {', '.join(rows[0])}")
    group = {row["file"]: row["group"] for row in rows}
    if missing := [key for key in keys if key not in group]:
        raise ValueError(f"{table} has no group for {len(missing)} pictures; the first: {missing[0]}")
    return [group[key] for key in keys]
