"""The list of distortions: what each is called, its levels, and what it needs."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ssmclip.humans.stimuli import STIMULUS_SETS
from ssmclip.registry import Registry

Pictures = UInt8[np.ndarray, "n h w 3"]


Table = str | Path | np.ndarray | None


Number = float | int


@dataclass(frozen=True)
class Distortion:
    """One of DISTORTIONS.

    function: (pictures, level, seeds, **tables) -> pictures; levels: label in the human data -> level, undistorted
    first; meaning: what the level is; allowed: lowest and highest; tables: which of amplitude and gamma it needs.
    """

    name: str
    function: Callable
    levels: dict[str, float]
    meaning: str
    allowed: tuple[Number, Number]
    tables: tuple[str, ...] = field(default=())


DISTORTIONS: Registry[Distortion] = Registry("distortion", ["ssmclip.data.distortions.geirhos"])


def distortion(
    name: str,
    levels: Sequence[Number],
    meaning: str,
    allowed: tuple[Number, Number] = (0, math.inf),
    tables: tuple = (),
):
    """Decorator: enter the function in DISTORTIONS. levels: of STIMULUS_SETS[name].conditions, in their order."""

    def add(function: Callable) -> Callable:
        labels = dict(zip(STIMULUS_SETS[name].conditions, map(float, levels), strict=True))
        DISTORTIONS.register(name)(Distortion(name, function, labels, meaning, allowed, tables))
        return function

    return add


def parse_level(name: str, level: Number | str | None = None) -> float:
    """The level as a number. Raises ValueError for what is neither a label nor in the distortion's range.

    >>> parse_level("contrast", "c30"), parse_level("high-pass", "inf"), parse_level("power-equalisation")
    (0.3, inf, 1.0)
    """
    chosen = DISTORTIONS[name]
    labels = chosen.levels
    if level is None and len(labels) == 2:
        return list(labels.values())[1]
    if str(level).capitalize() in labels or str(level) in labels:
        return labels.get(str(level), labels.get(str(level).capitalize()))
    try:
        number = float(level)
    except (TypeError, ValueError):
        number = math.nan
    lowest, highest = chosen.allowed
    if not (lowest <= number <= highest or number in labels.values()):
        raise ValueError(
            f"{name} at level {level!r}: it takes {chosen.meaning}, from {lowest:g} to {highest:g}, "
            f"or one of {', '.join(labels)}"
        )
    return number


def load_table(kind: str, table: Table, name: str) -> np.ndarray:
    """The table "amplitude" or "gamma", read and checked. Raises ValueError for none and for what it can't be."""
    if table is None:
        raise ValueError(f"{name} needs {kind}=, the path of a .npy file or an array; see distort's docstring")
    array = table if isinstance(table, np.ndarray) else np.load(table, allow_pickle=False)
    if kind == "gamma":
        array = np.ravel(array).astype(np.float64)
        if array.shape != (256,) or not (np.diff(array) > 0).all() or array[0] < 0 or array[-1] > 1:
            raise ValueError(f"gamma holds 256 rising values in [0, 1], and this is {array.shape}, {array.min():g} ...")
    elif array.ndim != 2 or not (np.isrealobj(array) and (array >= 0).all()):
        raise ValueError(
            f"amplitude is a table (height, width) of values >= 0, and this is {array.dtype} {array.shape}"
        )
    return array


# What does not distort, and what people get right in less than 20 % of trials. The published list, not computed anew.
EXCLUDED = {
    "colour": "cr",
    "contrast": "c100 c03 c01",
    "high-pass": "inf 0.55 0.45 0.4",
    "low-pass": "0 15 40",
    "phase-scrambling": "0 150 180",
    "power-equalisation": "0",
    "false-colour": "True",
    "rotation": "0",
    "eidolonI": "1-10-10 64-10-10 128-10-10",
    "eidolonII": "1-3-10 32-3-10 64-3-10 128-3-10",
    "eidolonIII": "1-0-10 16-0-10 32-0-10 64-0-10 128-0-10",
    "uniform-noise": "0.0 0.6 0.9",
}


def kept(dataset: str) -> list[int]:
    """The conditions that count, as places in the set's conditions."""
    left_out = EXCLUDED.get(dataset, "").split()
    return [place for place, label in enumerate(STIMULUS_SETS[dataset].conditions) if label not in left_out]
