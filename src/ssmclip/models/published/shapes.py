"""Helpers of the layouts: count modules, and infer ratios from widths."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

from ssmclip.models.published.layout import State, WrongShape


def count(state: State, prefix: str) -> int:
    """Return how many modules `prefix0`, `prefix1`, ... there are."""
    matches = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in state)
    return 1 + max((int(match.group(1)) for match in matches if match), default=-1)


def common_ratio(pairs: Sequence[tuple[int, int]]) -> float:
    """Return the r with int(r * dim) == hidden for each of the pairs (dim, hidden): the roundest there is.

    Where no r fits them all, the one of the first pair. Raises WrongShape for no pairs.
    """
    if not pairs:
        raise WrongShape("has no blocks to infer a ratio of widths from")
    fits = [r for r in _candidates(pairs) if all(int(r * dim) == hidden for dim, hidden in pairs)]
    return fits[0] if fits else pairs[0][1] / pairs[0][0]


def _candidates(pairs: Sequence[tuple[int, int]]) -> list[float]:
    low = max(hidden / dim for dim, hidden in pairs)
    high = min((hidden + 1) / dim for dim, hidden in pairs)
    return [low, *(math.ceil(low * 10**digits) / 10**digits for digits in range(1, 6)), (low + high) / 2]


def classes(state: State, head: str) -> int:
    """Return the number of classes of a classifier, 0 where there is none."""
    return len(state[f"{head}.weight"]) if f"{head}.weight" in state and state[f"{head}.weight"].ndim else 0
