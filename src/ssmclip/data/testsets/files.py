"""Files of a test set: pictures, and tables and records of names, labels and captions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from ssmclip.data.delimited import read_table
from ssmclip.data.images import BadImage, open_image
from ssmclip.data.lines import read_lines
from ssmclip.data.testsets.card import Pictures
from ssmclip.files import parse_json


def picture_files(paths: Sequence[Path]) -> Pictures:
    """Return the pictures of files, opened one at a time."""
    return Pictures(len(paths), partial(from_file, paths))


def from_file(paths: Sequence[Path], index: int) -> Image.Image:
    """Return picture `index`, opened. Raises BadImage, whose message names the path."""
    try:
        return open_image(paths[index])
    except BadImage as error:
        raise BadImage(error.reason, f"{paths[index]}: {error.detail}") from error


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file with a header. Raises ValueError as `read_table` does, and for none."""
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def read_json(path: Path) -> Any:
    """Return what a JSON file holds, byte order mark or not. Raises ValueError naming a file that is none."""
    try:
        return parse_json(path.read_bytes().decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def read_records(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a file of JSON lines. Raises ValueError naming the file and the line that is none."""
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not valid JSON: {error}") from error
        if not isinstance(record, dict):
            raise ValueError(f"{path}, line {number} must be a JSON object (got {line[:40]!r})")
        yield record
