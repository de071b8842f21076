"""Test sets of pictures with a table of labels beside them: metadata.csv."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ssmclip.data.images import folders_in
from ssmclip.data.lines import split_lines
from ssmclip.data.testsets.card import LAYOUTS, WHOLE, Card, Found
from ssmclip.data.testsets.files import picture_files, read_records, read_rows
from ssmclip.data.testsets.prompts import Spellings, names_on, own_names
from ssmclip.data.testsets.splits import choose_split

FILES = ("metadata.csv", "metadata.jsonl")
NAMES = ("img_filename", "file_name", "filename", "path")
LABELS = ("y", "label", "target")
NUMBERED = {"0": "train", "1": "val", "2": "test"}  # as Waterbirds counts splits


@LAYOUTS.register("metadata_csv")
def metadata_csv(folder: Path, card: Card) -> Found | str:
    """metadata.csv with a row for each picture, as Waterbirds has: img_filename, y, split (2: test), place.

    Also file_name, label and "test", as Hugging Face's image folders have, in the folder or in one for the split, and
    the same as metadata.jsonl. The group of a picture is its column `group`, else its label and `place`. Labels that
    are words are class names; a table without labels is about something else.
    Raises ValueError for labels that are missing or no class.
    """
    table = _table(folder, card)
    if table is None:
        return "metadata.csv with file_name and label"
    path, rows, name, label, split, said = table
    if not rows:
        return f"rows of the split {card.split} in {path}"
    labels, classnames = _labels(path, rows, name, label, card)
    paths = [path.parent / row[name] for row in rows]
    groups = [row.get("group") or (f"{row[label]}, {row['place']}" if "place" in row else "") for row in rows]
    return Found(
        where=str(path),
        pictures=picture_files(paths),
        keys=[row[name] for row in rows],
        labels=labels,
        classnames=classnames,
        groups=groups if all(groups) else None,
        files=tuple(paths),
        said=said,
        split=split,
    )


def _table(folder: Path, card: Card) -> tuple[Path, list[dict[str, str]], str, str, str, str] | None:
    """The file, its rows of the card's split, its columns of names and of labels, the split, what a reader must know
    of it."""
    below = [path.name for path in folders_in(folder)] if folder.is_dir() else []
    split, note = choose_split(card.split, below)
    places = [(folder / split, split, note)] if split else []
    for place, below_split, said in (*places, (folder, "", "")):
        for path in (place / file for file in FILES):
            columns = _columns(path) if path.is_file() else []
            name, label = (next((n for n in known if n in columns), "") for known in (NAMES, LABELS))
            if name and label:
                rows, of_rows, more = _of_split(_rows(path), card, name, split if place == folder else "")
                return path, rows, name, label, below_split or of_rows, said or more
    return None


def _columns(path: Path) -> list[str]:
    """The columns of a table, [] for one without rows; what it is about may be in any encoding."""
    lines = split_lines(path.read_bytes().decode("utf-8-sig", "replace"))
    lines = [line for line in lines if line.strip()]
    if path.suffix == ".csv":
        return next(csv.reader(lines)) if len(lines) > 1 else []
    try:
        return list(json.loads(lines[0])) if lines else []
    except (ValueError, TypeError):
        return []


def _rows(path: Path) -> list[dict[str, str]]:
    if path.suffix == ".csv":
        return read_rows(path)
    return [{key: "" if value is None else str(value) for key, value in row.items()} for row in read_records(path)]


def _of_split(rows: list[dict[str, str]], card: Card, name: str, folder: str) -> tuple[list[dict[str, str]], str, str]:
    """The rows of the card's split, all where nothing tells theirs; the split; and what a reader must know of it.

    folder: of the split, where there is one beside the table.
    Raises ValueError for a table of other splits alone; of a `part` there may be none.
    """
    if "split" in rows[0]:
        splits = [NUMBERED.get(row["split"], row["split"].lower()) for row in rows]
        split, said = choose_split(card.split, set(splits))
        if not split and not card.part:
            present = ", ".join(sorted(set(splits)))
            raise ValueError(f"the metadata of {card.name} has no rows of the split {card.split}, only of {present}")
        return [row for row, own in zip(rows, splits, strict=True) if own == split], split, said
    below = [row for row in rows if folder and PurePosixPath(row[name]).parts[:1] == (folder,)]
    return (below, folder, "") if below else (rows, WHOLE, "")


def _labels(
    path: Path, rows: Sequence[dict[str, str]], name: str, label: str, card: Card
) -> tuple[list[int], tuple[str, ...]]:
    """Each row's label, and the classes' names where the card has none."""
    values = [row[label].strip() for row in rows]
    if missing := [i for i, value in enumerate(values) if not value or re.fullmatch(r"-\d+(\.0*)?|nan", value.lower())]:
        raise ValueError(
            f"{path}: {len(missing)} of {len(rows)} pictures have no label; the first: {rows[missing[0]][name]}"
        )
    if names := names_on(card):
        known = Spellings(names)
        return [_known(value, known, path, label, card) for value in values], ()
    if all(re.fullmatch(r"\d+(\.0*)?", value) for value in values):
        numbers = [int(float(value)) for value in values]
        classes = sorted(set(numbers))
        return [classes.index(number) for number in numbers], _folder_names(rows, name, numbers, classes)
    words = sorted(set(values))
    place = {word: i for i, word in enumerate(words)}
    return [place[value] for value in values], own_names(words)


def _known(value: str, names: Spellings, path: Path, label: str, card: Card) -> int:
    found = names.find(value)
    if found is None and not re.fullmatch(r"\d+(\.0*)?", value):
        raise ValueError(f"{path}: a {label} is neither a number nor a class of {card.name}: {value!r}")
    return int(float(value)) if found is None else found


def _folder_names(
    rows: Sequence[dict[str, str]], name: str, numbers: Sequence[int], classes: Sequence[int]
) -> tuple[str, ...]:
    """Names of numbered classes: the folders they lie in where each has one of its own, else the numbers."""
    folders: dict[int, set[str]] = {number: set() for number in classes}
    for row, number in zip(rows, numbers, strict=True):
        folders[number].add(PurePosixPath(row[name].replace("\\", "/")).parent.name)
    found = [min(folders[number]) for number in classes if len(folders[number]) == 1]
    if len(set(found)) == len(classes) and all(found):
        return own_names(found)
    return tuple(map(str, classes))
