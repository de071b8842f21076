"""CLIP-Mamba's table of 26 data sets: the published rows, followed by the measured ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from ssmclip.report.store import final
from ssmclip.report.words import headline
from ssmclip.rows import Result
from ssmclip.rows.paper_tables import TABLE1

ENOUGH = 2  # columns; one number next to 26 says nothing


@dataclass(frozen=True)
class Cell:
    """A number in percent (None: not measured), whether it is its column's best, whether the data were incomplete."""

    value: float | None
    best: bool = False
    partial: bool = False


@dataclass(frozen=True)
class Line:
    """A model's line. average: over all columns (None unless it has all); shared: over those measured by everyone
    here; wins: columns in which it is the best."""

    model: str
    published: bool
    parameters: float | None
    cells: list[Cell]
    average: float | None
    shared: float | None
    wins: int


@dataclass(frozen=True)
class Comparison:
    """columns: titles of the data sets; shared: how many of them every measured model has."""

    columns: list[str]
    lines: list[Line]
    shared: int
    source: str


def table1(rows: Sequence[Result]) -> Comparison | None:
    """Return the table, or None if fewer than two of its columns were measured.

    A measured number stands in the table's metric, the data set's headline. The best of a column, published or
    measured, is marked, equals all.
    """
    measured = _measured(rows)
    if len({task for found in measured.values() for task in found}) < ENOUGH:
        return None
    shared = [column for column in TABLE1.columns if all(column in found for found in measured.values())]
    values = [
        (row.model, True, row.parameters, dict(zip(TABLE1.columns, row.values, strict=True)), {}) for row in TABLE1.rows
    ]
    for model, found in measured.items():
        numbers = {task: round(100 * row.value, 1) for task, row in found.items()}
        values.append((model, False, _parameters(found), numbers, found))
    best = {column: max(numbers[column] for *_, numbers, _ in values if column in numbers) for column in TABLE1.columns}
    return Comparison(
        columns=list(TABLE1.titles),
        lines=[_line(*of_model, best, shared) for of_model in values],
        shared=len(shared),
        source=TABLE1.source,
    )


def _measured(rows: Sequence[Result]) -> dict[str, dict[str, Result]]:
    found: dict[str, dict[str, Result]] = {}
    for row in final(rows):
        if row.task in TABLE1.columns and row.plain and row.metric == headline(rows, row.task):
            found.setdefault(row.model, {})[row.task] = row
    return found


def _parameters(found: dict[str, Result]) -> float | None:
    """Return the parameters of the image tower in millions, as counted in the paper."""
    counts = [row.extra["parameters"]["image"] for row in found.values() if "parameters" in row.extra]
    return counts[0] / 1e6 if counts else None


def _line(
    model: str,
    published: bool,
    parameters: float | None,
    numbers: dict[str, float],
    found: dict[str, Result],
    best: dict[str, float],
    shared: list[str],
) -> Line:
    def cell(column: str) -> Cell:
        if column not in numbers:
            return Cell(None)
        partial = column in found and "partial" in found[column].extra
        return Cell(numbers[column], numbers[column] == best[column], partial)

    cells = [cell(column) for column in TABLE1.columns]
    return Line(
        model=model,
        published=published,
        parameters=parameters,
        cells=cells,
        average=mean(numbers.values()) if len(numbers) == len(cells) else None,
        shared=mean(numbers[column] for column in shared) if shared else None,
        wins=sum(cell.best for cell in cells),
    )


def points(rows: Sequence[Result]) -> list[dict[str, Any]]:
    """Return parameters and average of the shared columns, a dict for each model of the table that has both."""
    comparison = table1(rows)
    if comparison is None:
        return []
    return [
        {
            "model": line.model,
            "published": line.published,
            "parameters": line.parameters,
            "average": line.shared,
            "columns": comparison.shared,
        }
        for line in comparison.lines
        if line.parameters and line.shared is not None
    ]
