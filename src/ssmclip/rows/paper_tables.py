"""Published numbers, for comparison with measured ones. Values are percentages; parameters are in millions."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

__all__ = ["CLIMP", "PUBLISHED", "TABLE1", "Row", "Table"]

MANY = 10  # columns: a table of more is summed up by their mean


@dataclass(frozen=True)
class Row:
    """A model's line in a published table.

    model: its name in the table; values: its numbers in the table's columns; parameters: millions in the image
    tower, where the table gives it; name: the model's name in this package; weights: address of its published weights,
    "" if there are none.
    """

    model: str
    values: tuple[float, ...]
    parameters: float | None
    name: str
    weights: str


@dataclass(frozen=True)
class Table:
    """A published table. title: its source and subject; columns: names of data sets' cards, or of metrics; titles:
    column headings, short enough for 26."""

    source: str
    title: str
    columns: tuple[str, ...]
    titles: tuple[str, ...]
    rows: tuple[Row, ...]

    def summary(self, row: Row) -> str:
        """Return a row in a few words: each of its numbers, or their mean if there are many."""
        if len(self.columns) > MANY:
            return f"{self.title}: mean of {len(self.columns)} data sets {fmean(row.values):.2f}"
        numbers = (f"{title} {value}" for title, value in zip(self.titles, row.values, strict=True))
        return f"{self.title}, {', '.join(numbers)}"


def _read(name: str) -> Table:
    content = json.loads((Path(__file__).parent / "paper_tables.json").read_text(encoding="utf-8"))[name]
    rows = tuple(
        Row(
            row["model"],
            tuple(row["values"]),
            parameters=float(row["parameters"]) if "parameters" in row else None,
            name=row.get("name", row["model"]),
            weights=row.get("weights", ""),
        )
        for row in content["rows"]
    )
    return Table(content["source"], content["title"], tuple(content["columns"]), tuple(content["titles"]), rows)


TABLE1, CLIMP = _read("table1"), _read("climp")

# name in this package: where its published weights are, "" for nowhere; and its row in a paper
PUBLISHED = {row.name: (row.weights, table.summary(row)) for table in (TABLE1, CLIMP) for row in table.rows}
