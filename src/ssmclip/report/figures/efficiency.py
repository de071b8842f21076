"""Cost of models against image size and text length, on logarithmic axes, with growth exponents and crossings."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any, ClassVar

import matplotlib.ticker as ticker

from ssmclip.report.figures.base import Drawing, canvas, figure, legend, plain_numbers, shortened
from ssmclip.report.words import metric_name
from ssmclip.rows.condition import ATTENTION, IMAGE, TOKENS
from ssmclip.rows.tasks import EFFICIENCY

METRICS = (
    "macs",
    "inference_memory_mb",
    "training_memory_mb",
    "latency_ms",
    "images_per_s",
    "training_images_per_s",
    "texts_per_s",
    "training_texts_per_s",
    "energy_j",
    "training_energy_j",
)
Point = tuple[int | float, float]  # (pixels of an image or tokens of a text, value)


@figure("efficiency")
class Efficiency(Drawing):
    """One metric against image size or text length, a line for each model."""

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.task == EFFICIENCY]
        for kind, against in ((IMAGE, "image size"), (TOKENS, "text length")):
            for metric in METRICS:
                found = [row for row in mine if row.metric == metric and kind in row.where]
                yield cls(f"{metric_name(metric)} against {against}", found, looks)

    def frame(self):
        """Return the points. inputs: pixels or tokens; x: side of a square image of that size, or tokens."""
        return [_point(row) for row in self.rows if row.value > 0]

    def growth(self) -> dict[str, float]:
        """Return each line's exponent p in value ~ inputs^p, by least squares in the logarithms."""
        return {name: exponent(points) for name, points in self._lines().items() if len(points) > 1}

    def crossings(self) -> list[dict[str, Any]]:
        """Where the lines of two models meet: their names, and x; None where they do not in the range measured, and

        then `lower`: which of the two is lower throughout (None where they share no size).
        """
        lines = {name: points for name, points in self._lines().items() if len(points) > 1}
        image = IMAGE in self.rows[0].where
        found = []
        for a, b in combinations(lines, 2):
            at = crossing(lines[a], lines[b])
            first, second = dict(lines[a]), dict(lines[b])
            gaps = [second[x] - first[x] for x in first if x in second and second[x] != first[x]]
            gap = gaps[0] if gaps and at is None else 0.0
            x, lower = None if at is None else _x(at, image), None if gap == 0 else a if gap > 0 else b
            found.append({"first": a, "second": b, "x": x, "lower": lower})
        return found

    def _lines(self) -> dict[str, list[Point]]:
        lines: dict[str, list[Point]] = {}
        for point in self.frame():
            lines.setdefault(point["line"], []).append((point["inputs"], point["value"]))
        return {name: sorted(points) for name, points in lines.items()}

    def plot(self):
        frame, growth = self.frame(), self.growth()
        image = IMAGE in self.rows[0].where
        what = "pixels" if image else "tokens"
        crossings = self.crossings()
        crossed = [c for c in crossings if c["x"] is not None]
        lines = self._lines()
        picture, axes = canvas(2.8)
        for name, points in lines.items():
            model = next(point["model"] for point in frame if point["line"] == name)
            look = self.styles[model]
            label = f"{name}: {what}^{growth[name]:.2f}" if name in growth else name
            dash = look.dash if name == model else ":"
            xs, ys = [_x(inputs, image) for inputs, _ in points], [value for _, value in points]
            axes.plot(xs, ys, dash, color=look.colour, marker=look.marker, markersize=4, label=label)
        for i, x in enumerate(sorted({round(c["x"]) for c in crossed})):
            axes.axvline(x, color="0.6", linewidth=0.8, linestyle=":")
            axes.annotate(f" {x}", (x, 0.02 + 0.07 * (i % 4)), xycoords=("data", "axes fraction"), size=8)
        axes.set(xscale="log", yscale="log")
        # Of two models or three a reader asks about each pair.
        apart = [c for c in crossings if c["lower"]] if len(growth) < 4 else []
        said = [f"{c['lower']} below {_other(c)} throughout" for c in apart]
        axes.set_xlabel("\n".join(["image side, pixels" if image else "tokens", *said]))
        places = sorted({point["x"] for point in frame})
        axes.set_xticks(places, [f"{x:.0f}" for x in places], size=8)
        axes.xaxis.set_minor_locator(ticker.NullLocator())
        plain_numbers(axes.yaxis)
        low, high = (choose(point["value"] for point in frame) for choose in (min, max))
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high > 10 * low else (1, 1.5, 2, 3, 5, 7)))
        legend(axes)
        return picture


CLIMP_PIXELS = 896  # where CLIMP (Shabtay et al. 2025) says VMamba-B takes a fifth of the memory of ViT-B/16


@figure("memory")
class Memory(Drawing):
    """The peak memory of models side by side at one image size: CLIMP's, else the largest measured."""

    shows: ClassVar[tuple[str, ...]] = ("inference_memory_mb", "training_memory_mb")

    @classmethod
    def each(cls, rows, looks):
        for metric in cls.shows:
            found = [r for r in rows if r.metric == metric and r.task == EFFICIENCY and IMAGE in r.where]
            sides = {row.place: _point(row)["x"] for row in found}
            side = CLIMP_PIXELS if CLIMP_PIXELS in sides.values() else max(sides.values(), default=None)
            there = [row for row in found if sides[row.place] == side]
            if len(there) > 1:
                yield cls(f"{metric_name(metric)}, {side:.0f}-pixel images", there, looks)

    def frame(self):
        """Return the bars. value: MB; times: relative to the smallest."""
        least = min(row.value for row in self.rows)
        return [{**_point(row), "times": row.value / least} for row in self.rows]

    def plot(self):
        frame = self.frame()
        picture, axes = canvas(0.4 * len(frame) + 0.4)
        for place, entry in enumerate(frame):
            look = self.styles[entry["model"]]
            axes.barh(place, entry["value"], 0.7, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
            note = f"{entry['value']:,.0f}" + (f" ({entry['times']:.1f}x)" if entry["times"] > 1 else "")
            axes.annotate(f" {note}", (entry["value"], place), va="center", size=8)
        axes.set_yticks(range(len(frame)), [shortened(entry["line"], 40) for entry in frame])
        axes.invert_yaxis()
        axes.set_xmargin(0.25)
        axes.set_xlabel(metric_name(self.rows[0].metric))
        return picture


def exponent(points: Sequence[Point]) -> float:
    """Return the slope of log(values) over log(inputs).

    >>> round(exponent([(10, 3.0), (20, 12.0), (40, 48.0)]), 6)
    2.0
    """
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    x0, y0 = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((x - x0) ** 2 for x in xs)
    return sum((x - x0) * (y - y0) for x, y in zip(xs, ys, strict=True)) / spread if spread else math.nan


def crossing(first: Sequence[Point], second: Sequence[Point]) -> int | float | None:
    """Return the inputs at which two lines cross, interpolated linearly in the logarithms.

    Lines that only touch, or are the same from some point on, do not cross.

    >>> round(crossing([(1, 1.0), (100, 100.0)], [(1, 10.0), (100, 10.0)]), 6)
    10.0
    """
    a, b = dict(first), dict(second)
    before, met = None, None  # (place, gap) where they last were apart; where they have met since
    for inputs in sorted(set(a) & set(b)):
        x, gap = math.log(inputs), math.log(a[inputs] / b[inputs])
        if gap == 0:
            met = inputs if met is None else met
            continue
        if before is not None and before[1] * gap < 0:
            x0, gap0 = before
            return met if met is not None else math.exp(x0 + (x - x0) * gap0 / (gap0 - gap))
        before, met = (x, gap), None
    return None


def _other(pair: dict[str, Any]) -> str:
    return pair["second"] if pair["lower"] == pair["first"] else pair["first"]


def _point(row) -> dict[str, Any]:
    image, attention = row.where.get(IMAGE), row.where.get(ATTENTION)
    height, _, width = str(image).partition("x")
    inputs = row.where[TOKENS] if image is None else int(height) * int(width or height)
    line = f"{row.model} ({attention} attention)" if attention else row.model
    return {"model": row.model, "line": line, "inputs": inputs, "x": _x(inputs, image is not None), "value": row.value}


def _x(inputs: int | float, image: bool) -> int | float:
    return math.sqrt(inputs) if image else inputs
