"""Test sets as Hugging Face keeps them: parquet files with a column of encoded pictures."""

from __future__ import annotations

import hashlib
import json
import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ssmclip.data.images import BadImage, is_litter, open_image
from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures
from ssmclip.data.testsets.prompts import TIMM, Spellings, folders_on, names_on, own_names, spoken
from ssmclip.data.testsets.splits import choose_split, split_in

IMAGES = ("image", "img", "picture", "jpg", "png", "webp", "image_bytes")
LABELS = ("label", "fine_label", "labels", "cls", "class", "target", "coarse_label")
CAPTIONS = (
    "annotations_captions",
    "captions",
    "caption",
    "sentences_raw",
    "sentences",
    "description",
    "text",
    "caption_0",
)


# Columns that say which picture a row has. Equal names may be parts of different longer ones.
PICTURES = ("image_id", "imgid", "img_id", "cocoid", "coco_id", "filename", "file_name", "image_filename", "image_name")
UNLABELLED = (None, -1)  # what unlabelled rows have for a label


@LAYOUTS.register("parquet")
def parquet(folder: Path, card: Card) -> Found | str:
    """test-00000-of-00001.parquet ..., in the folder or data/, with an image and a label or captions in each row.

    Of files of several splits, or a column `split`, the card's split is read. Rows of one picture are one picture with
    all their captions. Class names come from the schema that Hugging Face writes into the file. Raises ValueError
    naming a column that is missing, and for rows without a label.
    """
    files, split, said = _files(folder, card)
    if not files:
        return f"{card.split}-*.parquet in it or data/"
    try:
        table = _Table(files)
        rows, of_rows, more = _of_split(table, card)
        if not rows:
            return f"rows of {card.split} (the parquet files in {files[0].parent} have none)"
        found = _captioned(table, rows) if card.kind == "retrieval" else _labelled(table, rows, card)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{files[0].parent} holds a damaged parquet file: {error}") from error
    return replace(found, said="; ".join(filter(None, (said, more))), split=of_rows or split)


def _files(folder: Path, card: Card) -> tuple[list[Path], str, str]:
    """The files of the card's split, [] for none, the split, and what a reader must know of them.

    Named by their split, or in a folder of its name, as Hugging Face's converter leaves them.
    """
    for place in (folder, folder / "data", folder / "default"):
        present: dict[str, list[Path]] = {}
        for path in sorted(place.iterdir()) if place.is_dir() else ():
            if path.suffix == ".parquet" and not is_litter(path.name) and path.is_file():
                present.setdefault(split_in(path.name, card.split), []).append(path)
            elif path.is_dir() and split_in(path.name, card.split) == path.name.lower():
                within = [file for file in sorted(path.glob("*.parquet")) if not is_litter(file.name)]
                present.setdefault(path.name.lower(), []).extend(within)
        split, said = choose_split(card.split, {name for name, files in present.items() if files})
        if split:
            return present[split], split, said
    return [], "", ""


def _of_split(table: _Table, card: Card) -> tuple[list[int], str, str]:
    """The numbers of the rows of the card's split, all where no column says theirs; the split that the column says;
    what a reader must know of them."""
    if "split" not in table.schema.names or not _is_text(table.schema.field("split").type):
        return list(range(len(table))), "", ""
    splits = [str(value).lower() for value in table.column("split")]
    split, said = choose_split(card.split, set(splits))
    return [row for row, own in enumerate(splits) if own == split], split, said


def _labelled(table: _Table, rows: Sequence[int], card: Card) -> Found:
    column = table.first(LABELS)
    keys = [f"row {row}" for row in rows]
    every = table.column(column)
    values = [_whole(every[row]) for row in rows]
    if bare := [i for i, value in enumerate(values) if value in UNLABELLED]:
        raise ValueError(
            f"{table.where}: {len(bare)} of {len(values)} rows of {card.split} have no label (null or -1); the first: "
            f"{keys[bare[0]]}"
        )
    declared = _declared(table.schema, column)
    labels, classnames = _labels(values, keys, declared, card)
    return Found(
        where=str(table.where),
        pictures=table.pictures(rows, keys),
        keys=keys,
        labels=labels,
        classnames=classnames,
        files=tuple(table.files),
    )


def _labels(
    values: Sequence[Any], keys: Sequence[str], declared: Sequence[str], card: Card
) -> tuple[list[int], tuple[str, ...]]:
    """Each row's label, and the classes' names where they are not the card's. A word goes by its name, a number is
    itself, or goes by the name the files declare for it where the card knows all of those.
    """
    known = Spellings(folders_on(card) or names_on(card))
    numbered = all(isinstance(value, int) for value in values)
    if numbered and declared:
        if outside := [i for i, value in enumerate(values) if not 0 <= value < len(declared)]:
            first = outside[0]
            raise ValueError(
                f"{len(outside)} labels are outside the {len(declared)} classes; the first is {values[first]} of "
                f"{keys[first]}"
            )
        place = [known.find(name) for name in declared]
        if None not in place:
            return [place[value] for value in values], ()
        # ImageNet's classes are numbered alike everywhere; others may be in any order, and go by their own names.
        own = not str(card.folders).startswith(TIMM)
        spelled = own_names(declared) if card.own else tuple(map(spoken, declared))
        return list(values), spelled if own else ()
    if numbered:
        return list(values), ()
    if not len(known):
        words = sorted(set(map(str, values)))
        return [words.index(str(value)) for value in values], own_names(words)
    return [_label(value, known, card, key) for value, key in zip(values, keys, strict=True)], ()


def _label(value: Any, known: Spellings, card: Card, key: str) -> int:
    if isinstance(value, int):
        return value
    found = known.find(value) if isinstance(value, str) else None
    if found is None:
        raise ValueError(f"{key}: the label {value!r} is no class of {card.name}")
    return found


def _whole(value: Any) -> Any:
    """A number that pandas made a fraction because others are missing is whole again, and what is missing is None."""
    if isinstance(value, float):
        return None if math.isnan(value) else int(value) if value.is_integer() else value
    return int(value) if isinstance(value, bool) else value


def _captioned(table: _Table, rows: Sequence[int]) -> Found:
    numbered = [name for name in table.schema.names if name.startswith("caption_") and name[8:].isdigit()]
    captions = _numbered(table, numbered) if numbered else list(map(_list, table.column(table.first(CAPTIONS))))
    groups = _by_picture(table, rows)
    keys = [f"row {group[0]}" for group in groups]
    return Found(
        where=str(table.where),
        pictures=table.pictures([group[0] for group in groups], keys),
        keys=keys,
        captions=[_together([captions[row] for row in group]) for group in groups],
        files=tuple(table.files),
    )


def _together(captions: Sequence[list[str]]) -> list[str]:
    """The captions of a picture's rows: each row's, or once where every row has them all."""
    if len(captions[0]) > 1 and all(row == captions[0] for row in captions):
        return captions[0]
    return [caption for row in captions for caption in row]


def _by_picture(table: _Table, rows: Sequence[int]) -> list[list[int]]:
    """The rows of each picture, in the order of their first: of one name and one content.

    Pictures are read for it only where names repeat, or no column has them.
    """
    for column in PICTURES:
        if (names := table.complete(column)) is not None:
            if len({names[row] for row in rows}) == len(rows):
                return [[row] for row in rows]
            return _groups(rows, [f"{names[row]} {table.content(row)}" for row in rows])
    return _groups(rows, [table.content(row) for row in rows])


def _groups(rows: Sequence[int], keys: Sequence[str]) -> list[list[int]]:
    groups: dict[str, list[int]] = {}
    for row, key in zip(rows, keys, strict=True):
        groups.setdefault(key, []).append(row)
    return list(groups.values())


def _is_text(kind: pa.DataType) -> bool:
    return "string" in str(kind.value_type if pa.types.is_dictionary(kind) else kind)


class _Table:
    """The rows of several files in turn. Pictures are read one row group at a time, and one is kept in memory."""

    def __init__(self, files: Sequence[Path]):
        self.files, self.where = files, files[0].parent
        self.schema = pq.read_schema(files[0])
        self.image = self.first(IMAGES)
        metadata = [(file, pq.read_metadata(file)) for file in files]
        self._places = [(file, group) for file, about in metadata for group in range(about.num_row_groups)]
        sizes = [about.row_group(group).num_rows for _, about in metadata for group in range(about.num_row_groups)]
        self._starts = [0, *accumulate(sizes)]
        self._held: tuple[int, Any] | None = None

    def __len__(self) -> int:
        return self._starts[-1]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": None}  # another process reads its own

    def first(self, known: Sequence[str]) -> str:
        """Return the first of the known columns that the files have. Raises ValueError for none."""
        names = self.schema.names
        for name in known:
            if name in names:
                return name
        raise ValueError(f"{self.files[0]} has none of the columns {', '.join(known)}; it has {', '.join(names)}")

    def column(self, name: str) -> list[Any]:
        return [value for file in self.files for value in pq.read_table(file, columns=[name])[name].to_pylist()]

    def complete(self, name: str) -> list[Any] | None:
        """A column of text or whole numbers that every row has a value in, None for any other."""
        if name not in self.schema.names:
            return None
        kind = self.schema.field(name).type
        if not (pa.types.is_integer(kind) or _is_text(kind)):
            return None
        values = self.column(name)
        return None if None in values else values

    def encoded(self, row: int) -> bytes | None:
        """The bytes of a row's picture."""
        group = bisect_right(self._starts, row) - 1
        if self._held is None or self._held[0] != group:
            file, number = self._places[group]
            table = pq.ParquetFile(file).read_row_group(number, columns=[self.image])
            self._held = (group, table[self.image].combine_chunks())
        value = self._held[1][row - self._starts[group]].as_py()
        return value.get("bytes") if isinstance(value, dict) else value

    def content(self, row: int) -> str:
        """A hash of a row's picture; its own for a row without one."""
        encoded = self.encoded(row)
        return hashlib.blake2b(encoded, digest_size=16).hexdigest() if encoded else f"row {row}"

    def pictures(self, rows: Sequence[int], keys: Sequence[str]) -> Pictures:
        return Pictures(len(rows), partial(_picture, self, list(rows), list(keys)))


def _picture(table: _Table, rows: Sequence[int], keys: Sequence[str], index: int) -> Image.Image:
    encoded = table.encoded(rows[index])
    try:
        if not encoded:
            raise BadImage("missing image file", "the row has no bytes of a picture")
        return open_image(encoded)
    except BadImage as error:
        raise BadImage(error.reason, f"{keys[index]} of {table.where}: {error.detail}") from error


def _declared(schema: pa.Schema, column: str) -> list[str]:
    """The class names Hugging Face wrote for a column, [] when there are none."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return about.get("info", {}).get("features", {}).get(column, {}).get("names", [])


def _numbered(table: _Table, names: Sequence[str]) -> list[list[str]]:
    rows = zip(*(table.column(name) for name in names), strict=True)
    return [[caption for caption in row if caption] for row in rows]


def _list(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = value.get("raw") or value.get("caption") or []
    values = value if isinstance(value, list) else [value]
    return [item["raw"] if isinstance(item, dict) else str(item) for item in values if item]
