"""Test sets as Hugging Face keeps them: parquet files with a column of encoded pictures."""

from __future__ import annotations

import json
from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from ssmclip.data.images import BadImage, open_image
from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures
from ssmclip.data.testsets.prompts import TIMM, folders_on, names_on, plain, spoken

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


@LAYOUTS.register("parquet")
def parquet(folder: Path, card: Card) -> Found | str:
    """test-00000-of-00001.parquet ..., in the folder or data/, with an image and a label or captions in each row.

    Class names come from the schema that Hugging Face writes into the file. Raises ValueError naming a column that is
    missing.
    """
    files = _files(folder, card)
    if not files:
        return f"{card.split}-*.parquet in it or data/"
    try:
        schema = pq.read_schema(files[0])
        pictures = _Rows(files, _column(files[0], schema.names, IMAGES))
        wanted = LABELS if card.kind == "classification" else CAPTIONS
        column = _column(files[0], schema.names, wanted)
        values = [value for file in files for value in pq.read_table(file, columns=[column])[column].to_pylist()]
    except pa.ArrowInvalid as error:
        raise ValueError(f"{files[0].parent} holds a damaged parquet file: {error}") from error
    keys = [f"row {i}" for i in range(len(values))]
    shown = Pictures(len(values), partial(_picture, pictures, keys))
    if card.kind == "retrieval":
        numbered = [name for name in schema.names if name.startswith("caption_") and name[8:].isdigit()]
        captions = _numbered(files, numbered) if numbered else [_list(value) for value in values]
        return Found(str(files[0].parent), shown, keys, captions=captions, files=tuple(files))
    declared = _declared(schema, column)
    known = {plain(spoken(name)): i for i, name in enumerate(folders_on(card) or names_on(card))}
    if declared and all(plain(spoken(name)) in known for name in declared):
        values = [declared[value] for value in values]
    labels = [_label(value, known, card, key) for value, key in zip(values, keys, strict=True)]
    # ImageNet's classes are numbered alike everywhere; others may be numbered in any order, and go by their own names.
    theirs = declared and isinstance(values[0], int) and not str(card.folders).startswith(TIMM)
    own = tuple(map(spoken, declared)) if theirs else ()
    return Found(str(files[0].parent), shown, keys, labels=labels, classnames=own, files=tuple(files))


def _files(folder: Path, card: Card) -> list[Path]:
    for place in (folder, folder / "data", folder / "default"):
        for split in dict.fromkeys((card.split, "test", "val", "validation", "valid")):
            if files := sorted([*place.glob(f"{split}-*.parquet"), *place.glob(f"{split}.parquet")]):
                return files
    return []


def _column(file: Path, names: Sequence[str], known: Sequence[str]) -> str:
    for name in known:
        if name in names:
            return name
    raise ValueError(f"{file} has none of the columns {', '.join(known)}; it has {', '.join(names)}")


class _Rows:
    """The values of a column over several files, one row group in memory at a time."""

    def __init__(self, files: Sequence[Path], column: str):
        self.files, self.column = files, column
        sizes = []
        self.groups = []
        for file in files:
            metadata = pq.read_metadata(file)
            for group in range(metadata.num_row_groups):
                self.groups.append((file, group))
                sizes.append(metadata.row_group(group).num_rows)
        self.starts = [0, *accumulate(sizes)]
        self.held: tuple[int, Any] | None = None

    def __getitem__(self, index: int) -> Any:
        group = bisect_right(self.starts, index) - 1
        if self.held is None or self.held[0] != group:
            file, number = self.groups[group]
            table = pq.ParquetFile(file).read_row_group(number, columns=[self.column])
            self.held = (group, table[self.column].combine_chunks())
        return self.held[1][index - self.starts[group]].as_py()


def _picture(rows: _Rows, keys: Sequence[str], index: int) -> Image.Image:
    value = rows[index]
    encoded = value.get("bytes") if isinstance(value, dict) else value
    try:
        if not encoded:
            raise BadImage("missing image file", "the row has no bytes of a picture")
        return open_image(encoded)
    except BadImage as error:
        raise BadImage(error.reason, f"{keys[index]} of {rows.files[0].parent}: {error.detail}") from error


def _declared(schema: pa.Schema, column: str) -> list[str]:
    """The class names Hugging Face wrote for a column, [] when there are none."""
    about = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    return about.get("info", {}).get("features", {}).get(column, {}).get("names", [])


def _label(value: Any, known: dict[str, int], card: Card, key: str) -> int:
    """A label that is a word goes by its name, a number is itself."""
    if isinstance(value, int):
        return value
    if isinstance(value, str) and plain(spoken(value)) in known:
        return known[plain(spoken(value))]
    raise ValueError(f"{key}: the label {value!r} is no class of {card.name}")


def _numbered(files: Sequence[Path], names: Sequence[str]) -> list[list[str]]:
    rows = [row for file in files for row in pq.read_table(file, columns=list(names)).to_pylist()]
    return [[row[name] for name in names if row[name]] for row in rows]


def _list(value: Any) -> list[str]:
    if isinstance(value, dict):
        value = value.get("raw") or value.get("caption") or []
    values = value if isinstance(value, list) else [value]
    return [item["raw"] if isinstance(item, dict) else str(item) for item in values if item]
