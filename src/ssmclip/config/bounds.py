"""Ranges of settings: each is declared with a field's default and checked whenever the group is constructed.

>>> from dataclasses import dataclass
>>> @dataclass(frozen=True)
... class Oven(Settings, group="oven"):
...     degrees: int = bounded(180, at_least=0, below=300)
>>> Oven(degrees=300)
Traceback (most recent call last):
ValueError: oven.degrees must be less than 300 (got 300)
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

Number = int | float

_RULES = {
    "at_least": ("at least", operator.ge),
    "above": ("more than", operator.gt),
    "below": ("less than", operator.lt),
    "at_most": ("at most", operator.le),
}


def bounded(
    default: Any,
    *,
    at_least: Number | None = None,
    above: Number | None = None,
    below: Number | None = None,
    at_most: Number | None = None,
) -> Any:
    """Return a dataclass field whose value, or each value of whose tuple, lies in a range. None passes."""
    bounds = {"at_least": at_least, "above": above, "below": below, "at_most": at_most}
    return dataclasses.field(
        default=default, metadata={"bounds": {name: bound for name, bound in bounds.items() if bound is not None}}
    )


class Settings:
    """A group of settings that checks its fields' ranges. `group`: its field in TrainConfig, "" for that class."""

    _prefix = ""

    def __init_subclass__(cls, group: str = ""):
        cls._prefix = f"{group}." if group else ""

    def __post_init__(self) -> None:
        """Raise ValueError naming the first field whose value is out of range."""
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            for rule, bound in field.metadata.get("bounds", {}).items():
                self._check(field.name, rule, bound)

    def _check(self, name: str, rule: str, bound: Number) -> None:
        given, (words, fits) = getattr(self, name), _RULES[rule]
        values = given if isinstance(given, tuple) else (given,)
        if not all(value is None or fits(value, bound) for value in values):  # a NaN fits nowhere
            self._refuse(name, f"must be {words} {bound}")

    def _refuse(self, name: str, wrong: str) -> None:
        raise ValueError(f"{self._prefix}{name} {wrong} (got {getattr(self, name)})")
