"""What was varied between rows of one measure."""

from __future__ import annotations

import re

from ssmclip.rows.result import Result

STEP = re.compile(r"step=(\d+)\b")


LEVEL = "level="


DISTORTED = "distorted/"  # begins the task of a distortion of a data set: distorted/DATA SET/DISTORTION


# Analyses with a row for each batch or place: too many to list.
POINTS = {"hessian": "batch=", "surface_1d": "x=", "surface_2d": "x="}


def step_of(row: Result) -> int | None:
    """The training step a row was measured at, None for a row that isn't part of a training curve."""
    match = STEP.match(row.condition)
    return int(match[1]) if match else None


def level_of(row: Result) -> str | None:
    """The level of distortion a row was measured at, None for a row that isn't part of such a curve."""
    return row.condition.removeprefix(LEVEL) if row.condition.startswith(LEVEL) else None


def _is_point(row: Result) -> bool:
    return row.task in POINTS and row.condition.startswith(POINTS[row.task])


# In the conditions of what power iterations returned: the usual one, and one gone on with to a residual.
USUAL, LONG = "protocol=park-kim", "protocol=power"


def split_condition(condition: str) -> tuple[str, str, str]:
    """("step=10", "batch=3", "tower=image") of "step=10,batch=3,tower=image"; "" for what isn't there."""
    parts = condition.split(",")
    step = next((p for p in parts if p.startswith("step=")), "")
    batch = next((p for p in parts if p.startswith("batch=")), "")
    return step, batch, ",".join(p for p in parts if p not in (step, batch))
