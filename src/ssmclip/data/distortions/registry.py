"""The registry of distortions: their names, levels and requirements."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from ssmclip.registry import Registry

Pictures = UInt8[np.ndarray, "n h w 3"]
Number = float | int
Table = str | Path | np.ndarray | None

UNDISTORTED = "undistorted"  # the level of the pictures as they are, for a distortion that has no such level itself


@dataclass(frozen=True)
class Distortion:
    """An entry of DISTORTIONS.

    function: (pictures uint8 (n, h, w, 3), level, n seeds, **tables) -> pictures.
    levels: label -> level, in the order of a curve.
    meaning: what the level is, for messages: "the angle in degrees".
    allowed: lowest and highest of the levels between those of `levels`; None when there are none between.
    counted: labels of the levels that a mean over levels is taken of.
    undistorted: label of the level that does not distort, the first of `levels`; None when all of them distort.
    tables: which of "amplitude" and "gamma" the function takes.
    check: called before the first picture; raises an error when something is missing, such as a package.

    Raises ValueError when `counted` and `undistorted` are not among the labels.
    """

    name: str
    function: Callable[..., np.ndarray]
    levels: Mapping[str, float]
    meaning: str
    allowed: tuple[Number, Number] | None
    counted: tuple[str, ...]
    undistorted: str | None = None
    tables: tuple[str, ...] = ()
    check: Callable[[], object] | None = None

    def __post_init__(self):
        if unknown := [label for label in self.counted if label not in self.levels]:
            raise ValueError(
                f"distortion {self.name!r}: counted has {', '.join(unknown)}, which are not among its levels "
                f"({', '.join(self.levels)})"
            )
        if self.undistorted not in (None, next(iter(self.levels), None)):
            raise ValueError(
                f"distortion {self.name!r}: the undistorted level must be the first of its levels "
                f"({', '.join(self.levels)}; got {self.undistorted!r})"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """Return the labels of a whole curve, the undistorted level first."""
        return (UNDISTORTED, *self.levels) if self.undistorted is None else tuple(self.levels)


DISTORTIONS: Registry[Distortion] = Registry(
    "distortion", ["ssmclip.data.distortions.geirhos", "ssmclip.data.distortions.imagenet_c"]
)


def distortion(
    name: str,
    *,
    levels: Mapping[str, Number],
    meaning: str,
    allowed: tuple[Number, Number] | None = None,
    counted: Sequence[str] | None = None,
    undistorted: str | None = None,
    tables: tuple[str, ...] = (),
    check: Callable[[], object] | None = None,
):
    """Return a decorator that registers a function in DISTORTIONS; the arguments are the fields of `Distortion`.

    counted: default: all levels but the undistorted one.
    Raises ValueError for a name that is taken and as `Distortion` does.
    """
    numbers = {label: float(level) for label, level in levels.items()}
    counted = tuple(label for label in numbers if label != undistorted) if counted is None else tuple(counted)

    def add(function: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
        entry = Distortion(name, function, numbers, meaning, allowed, counted, undistorted, tables, check)
        DISTORTIONS.register(name)(entry)
        return function

    return add


def find(word: str) -> str:
    """Return the name of a distortion given on a command line as NAME, FILE.py:NAME or MODULE:NAME.

    The file or the module is imported first and registers NAME with the decorator `distortion`.
    Raises UnknownName, FileNotFoundError for a file that is not there, and what the import raises.

    >>> find("contrast")
    'contrast'
    """
    source, _, name = word.rpartition(":")
    if source.endswith(".py"):
        _import_file(Path(source).resolve())
    elif source:
        importlib.import_module(source)
    DISTORTIONS[name]  # raises UnknownName
    return name


def _import_file(path: Path) -> None:
    module = f"distortions of {path}"  # unlike any module's name
    if module in sys.modules:
        return
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: a custom distortion must be given as FILE.py:NAME")
    spec = importlib.util.spec_from_file_location(module, path)
    sys.modules[module] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(sys.modules[module])
    except BaseException:  # whatever stopped it: half a module must not pass for a whole one next time
        del sys.modules[module]
        raise


def kept(name: str) -> list[int]:
    """Return the levels that count in a mean over levels, as places in the distortion's `labels`."""
    chosen = DISTORTIONS[name]
    return [place for place, label in enumerate(chosen.labels) if label in chosen.counted]


def parse_level(name: str, level: Number | str | None = None) -> float | None:
    """Return the level as a number, or None for the pictures as they are (UNDISTORTED).

    Raises ValueError if it is neither a label nor in the distortion's range.

    >>> parse_level("contrast", "c30"), parse_level("high-pass", "inf"), parse_level("power-equalisation")
    (0.3, inf, 1.0)
    """
    chosen = DISTORTIONS[name]
    labels = chosen.levels
    if level == UNDISTORTED and chosen.undistorted is None:
        return None
    distorting = [number for label, number in labels.items() if label != chosen.undistorted]
    if level is None and len(distorting) == 1:
        return distorting[0]
    for label in (str(level), str(level).capitalize()):
        if label in labels:
            return labels[label]
    try:
        number = float(level)
    except (TypeError, ValueError):
        number = math.nan
    lowest, highest = chosen.allowed or (math.nan, math.nan)
    if not (lowest <= number <= highest or number in labels.values()):
        between = f", from {lowest:g} to {highest:g}, or" if chosen.allowed else ","
        raise ValueError(
            f"the level of {name} must be {chosen.meaning}{between} one of {', '.join(labels)} (got {level!r})"
        )
    return number


def prepare(name: str, given: Mapping[str, Table]) -> dict[str, np.ndarray]:
    """Return the tables that the distortion takes, read and checked before any picture is opened.

    given: "amplitude" and "gamma" -> path of a .npy file, array or None.
    Raises UnknownName, ValueError for tables that are missing or don't fit, and ImportError for a missing package.
    """
    chosen = DISTORTIONS[name]
    if chosen.check is not None:
        chosen.check()
    return {kind: load_table(kind, given.get(kind), name) for kind in chosen.tables}


def load_table(kind: str, table: Table, name: str) -> np.ndarray:
    """Return the table "amplitude" or "gamma", read and checked. Raises ValueError for none and for a wrong one."""
    if table is None:
        raise ValueError(f"{name} needs {kind}: pass the path of a .npy file or an array")
    array = table if isinstance(table, np.ndarray) else np.load(table, allow_pickle=False)
    if kind == "gamma":
        array = np.ravel(array).astype(np.float64)
        if array.shape != (256,) or not (np.diff(array) > 0).all() or array[0] < 0 or array[-1] > 1:
            raise ValueError(f"gamma must be 256 rising values in [0, 1] (got {array.shape}, {array.min():g} ...)")
    elif array.ndim != 2 or not (np.isrealobj(array) and (array >= 0).all()):
        raise ValueError(f"amplitude must be (height, width) of values of at least 0 (got {array.dtype} {array.shape})")
    return array
