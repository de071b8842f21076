"""Numbers others have published, for standing beside measured ones. Percent; parameters of image towers in millions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """A model's line: its parameters in millions (of the image tower), and its numbers in the table's columns."""

    model: str
    parameters: float
    values: tuple[float, ...]


@dataclass(frozen=True)
class Table:
    """A published table. columns: names of data sets' cards; titles: what stands over them, short enough for 26."""

    source: str
    columns: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[Row, ...]


def _read(name: str) -> Table:
    content = json.loads((Path(__file__).parent / name).read_text(encoding="utf-8"))
    rows = tuple(Row(row["model"], float(row["parameters"]), tuple(row["values"])) for row in content["rows"])
    return Table(content["source"], tuple(content["columns"]), tuple(content["titles"]), rows)


TABLE1 = _read("paper_tables.json")
