"""Several sources in one stream: each sample's source is drawn by weight, from the seed and the sample's number."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ssmclip.data.pairs.samples import draw_seed


@dataclass(frozen=True)
class Weighted:
    """One of several sources. weight: its share of the samples, over the sum of all weights; name: for reports.

    Weights are shares of samples whatever the sources' sizes. open_clip's upsampling factors are weights of shards
    instead: weights proportional to factor x size draw as they do.
    """

    source: str
    weight: int | float
    name: str = ""

    @property
    def label(self) -> str:
        """Return the name, or the source where it has none."""
        return self.name or self.source


def check_weights(sources: Sequence[Weighted]) -> None:
    """Raise ValueError unless weights are at least 0 with a sum above 0, and no source is named twice."""
    for each in sources:
        if not (each.weight >= 0 and math.isfinite(each.weight)):
            raise ValueError(f"the weight of {each.label} must be a number of at least 0 (got {each.weight})")
    if not sum(each.weight for each in sources) > 0:
        raise ValueError(
            f"the weights of {', '.join(each.label for each in sources)} must not all be 0: give one a positive weight"
        )
    counts = Counter(each.label for each in sources)
    if repeated := [name for name, count in counts.items() if count > 1]:
        raise ValueError(f"each source must be given once, with one weight (got {repeated[0]} {counts[repeated[0]]}x)")


@dataclass(frozen=True)
class Part:
    """An opened source of a mixture, with its share of the samples."""

    name: str
    source: Any
    share: float


class Mixture:
    """Opened sources in one. `identity`, `resident` and `num_samples` are as a single source has them."""

    def __init__(self, parts: Sequence[Part]):
        self.parts = list(parts)
        self.resident = any(part.source.resident for part in self.parts)
        self.identity = " + ".join(f"{part.share:.6g} x {part.source.identity}" for part in self.parts)
        self._upto = [math.fsum(part.share for part in self.parts[: i + 1]) for i in range(len(self.parts))]

    @property
    def num_samples(self) -> int | None:
        """Return the number of samples in all sources; None if that of one is unknown."""
        counts = [part.source.num_samples for part in self.parts]
        return None if None in counts else sum(counts)

    def choose(self, seed: int, reader: int, number: int) -> int:
        """Return which part one reader's sample `number` comes from."""
        place = draw_seed(seed, "source", reader, number) / 2**63 * self._upto[-1]
        return next((i for i, upto in enumerate(self._upto) if place < upto), len(self.parts) - 1)
