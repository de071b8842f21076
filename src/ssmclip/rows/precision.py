"""The arithmetic a model was evaluated in: its names, and how rows and people's comparisons tell it.

A row of a model in another arithmetic than float32 says so in `where`; in a report it stands as a model of its own,
called as in decisions on stimuli, "A (bfloat16)".
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ssmclip.rows.condition import PRECISION
from ssmclip.rows.result import Result

FLOAT32, BFLOAT16, AUTO = "float32", "bfloat16", "auto"
PRECISIONS = (FLOAT32, BFLOAT16, AUTO)


def in_precision(label: str, precision: str) -> str:
    """Return what a model in float32 or another arithmetic is called where nothing else tells them apart.

    >>> in_precision("A", "float32"), in_precision("A", "bfloat16")
    ('A', 'A (bfloat16)')
    """
    return label if precision == FLOAT32 else f"{label} ({precision})"


def marked(rows: Iterable[Result], precision: str) -> list[Result]:
    """Return the rows with the precision in `where`, unless it is float32.

    >>> marked([Result("A", "digits", "top1", 0.9)], "bfloat16")[0].condition
    'precision=bfloat16'
    """
    if precision == FLOAT32:
        return list(rows)
    return [replace(row, where={**row.where, PRECISION: precision}) for row in rows]


def measured_in(rows: Iterable[Result], precision: str) -> list[Result]:
    """Return the rows of one precision, without it in `where`: the opposite of `marked`."""
    wanted = [row for row in rows if row.where.get(PRECISION, FLOAT32) == precision]
    return [replace(row, where={key: value for key, value in row.where.items() if key != PRECISION}) for row in wanted]


def as_models(rows: Iterable[Result]) -> list[Result]:
    """Return the rows, those with a precision in `where` as rows of a model of its own.

    >>> row = as_models(marked([Result("A", "digits", "top1_difference", 0.1, against="B")], "bfloat16"))[0]
    >>> row.model, row.condition
    ('A (bfloat16)', 'minus B (bfloat16)')
    """
    return [_as_model(row) if PRECISION in row.where else row for row in rows]


def _as_model(row: Result) -> Result:
    where = dict(row.where)
    precision = str(where.pop(PRECISION))
    against = row.against and in_precision(row.against, precision)
    return replace(row, model=in_precision(row.model, precision), where=where, against=against)
