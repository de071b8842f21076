"""Figures of the loss landscape: distribution of eigenvalues, their evolution in training, and loss surfaces.

The first is Figure 3 of CLIP-Mamba, after Park and Kim (2022): the eigenvalues of largest magnitude of every batch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

import matplotlib
import matplotlib.ticker as ticker
import numpy as np

from ssmclip.report.figures.base import Drawing, canvas, figure, legend, models_of, plain_numbers
from ssmclip.report.style import INK
from ssmclip.rows import Result
from ssmclip.rows.condition import PROTOCOL, STEP, TOWER
from ssmclip.rows.tasks import LANCZOS, PROTOCOLS

PLACE = re.compile(r"(largest|smallest|by_magnitude)_(\d+)")
MARKERS = {"Lanczos": "o", "usual power iteration": "x", "power iteration to a residual": "+"}
POINTS = 300  # along the axis of a density


def measured(rows: Iterable[Result], end: str) -> list[Result]:
    """Return the rows of eigenvalues at one end."""
    return [row for row in rows if row.task == "hessian" and (m := PLACE.fullmatch(row.metric)) and m[1] == end]


def where_of(row: Result) -> str:
    """Return the tower in words, and the protocol if it is not Lanczos.

    >>> where_of(Result("m", "hessian", "by_magnitude_1", 2.0, where={"tower": "image", "protocol": "park-kim"}))
    'image, usual power iteration'
    """
    return row.where.get(TOWER, "whole") + (f", {protocol_of(row)}" if PROTOCOL in row.where else "")


def protocol_of(row: Result) -> str:
    """Return the protocol of a row in words."""
    return dict(zip(PROTOCOLS, MARKERS, strict=True))[row.where.get(PROTOCOL, LANCZOS)]


def _of_batch(row: Result) -> tuple[str, tuple]:
    return row.model, tuple(sorted((key, value) for key, value in row.where.items() if key != PROTOCOL))


def bandwidth(values: np.ndarray) -> float:
    """Return the bandwidth by Silverman's rule, using the quartiles if a few values are outliers."""
    quartiles = np.subtract(*np.quantile(values, [0.75, 0.25])) / 1.34
    spread = min(values.std(), quartiles) or values.std() or max(abs(values).max(), 1e-12) * 0.05
    return float(0.9 * spread * len(values) ** -0.2)


def kernel_density(values: Sequence[float] | np.ndarray, at: np.ndarray) -> np.ndarray:
    """Return the Gaussian kernel density estimate of the values at these points."""
    values = np.asarray(values, float)
    width = bandwidth(values)
    return np.exp(-0.5 * ((at[:, None] - values) / width) ** 2).mean(axis=1) / (width * np.sqrt(2 * np.pi))


@figure("hessian_eigenvalues")
class Eigenvalues(Drawing):
    """The distribution of the eigenvalues of largest magnitude over the batches, for each model."""

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in measured(rows, "by_magnitude") if STEP not in row.where]
        for where in dict.fromkeys(map(where_of, mine)):
            there = [row for row in mine if where_of(row) == where]
            yield cls(f"Hessian: largest eigenvalues of every batch, {where}", there, looks)

    def frame(self):
        return [{"model": row.model, "value": row.value, "converged": row.extra.get("converged")} for row in self.rows]

    def plot(self):
        frame = self.frame()
        models = models_of(frame)
        picture, axes = canvas(2.8)
        of = {model: np.array([entry["value"] for entry in frame if entry["model"] == model]) for model in models}
        sizes = [np.median(abs(values)) for values in of.values()]
        forth, back = (lambda x: x), (lambda x: x)
        if max(sizes) > 5 * min(sizes) > 0:  # on a linear axis the smaller would be a spike
            width = min(sizes) / 3
            forth, back = (lambda x: np.arcsinh(x / width)), (lambda x: width * np.sinh(x))
            axes.set_xscale("asinh", linear_width=width)
            axes.xaxis.set_major_locator(ticker.AsinhLocator(width, numticks=8))
            plain_numbers(axes.xaxis)
        of = {model: forth(values) for model, values in of.items()}
        low, high = min(map(min, of.values())), max(map(max, of.values()))
        margin = 0.08 * (high - low) or 1.0
        at, edges = (np.linspace(low - margin, high + margin, points) for points in (POINTS, 47))
        axes.axvspan(back(low - margin), 0, color="#888888", alpha=0.12, linewidth=0)
        for model, values in of.items():
            look = self.styles[model]
            shares, _ = np.histogram(values, edges, density=True)
            axes.stairs(shares, back(edges), fill=True, alpha=0.3, color=look.colour, hatch=look.hatch)
            label = f"{model}: {100 * np.mean(values < 0):.1f} % negative of {len(values)}"
            axes.plot(back(at), kernel_density(values, at), look.dash, color=look.colour, label=label)
        axes.set_xlim(back(low - margin), back(high + margin))
        axes.set_xlabel("eigenvalue of the Hessian (shaded: negative)")
        axes.set_ylabel("density (per unit of the axis)")
        legend(axes)
        return picture


@figure("hessian_density")
class SpectralDensity(Drawing):
    """The density of all eigenvalues by stochastic Lanczos quadrature, the mean over batches and probes, log axis."""

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.task == "hessian" and "nodes" in row.extra and STEP not in row.where]
        for where in dict.fromkeys(map(where_of, mine)):
            there = [row for row in mine if where_of(row) == where]
            yield cls(f"Hessian: spectral density, {where}", there, looks)

    def frame(self):
        probes: dict[str, list[tuple[list[float], list[float]]]] = {}
        for row in self.rows:
            lines = zip(row.extra["nodes"], row.extra["weights"], strict=True)
            probes.setdefault(row.model, []).extend(lines)
        nodes = [node for lines in probes.values() for line in lines for node in line[0]]
        if not nodes:
            return []
        low, high = min(nodes), max(nodes)
        width = (high - low) / 100 or 1.0
        at = np.linspace(low - 5 * width, high + 5 * width, POINTS)
        return [
            {"model": model, "eigenvalue": float(x), "density": float(y)}
            for model, lines in probes.items()
            for x, y in zip(at, np.mean([_smoothed(*line, at, width) for line in lines], axis=0), strict=True)
        ]

    def plot(self):
        frame = self.frame()
        picture, axes = canvas(2.8)
        top = max(entry["density"] for entry in frame)
        for model in models_of(frame):
            mine = [entry for entry in frame if entry["model"] == model]
            look = self.styles[model]
            x, y = [e["eigenvalue"] for e in mine], [max(e["density"], 1e-12 * top) for e in mine]
            axes.semilogy(x, y, look.dash, color=look.colour, label=model)
        axes.set_ylim(1e-9 * top, 2 * top)
        plain_numbers(axes.yaxis)
        axes.set_xlabel("eigenvalue of the Hessian")
        axes.set_ylabel("density")
        legend(axes)
        return picture


@figure("hessian_protocols")
class Protocols(Drawing):
    """Products and worst residual of power iterations and Lanczos, for the eigenvalues of largest magnitude of the
    same batches."""

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in measured(rows, "by_magnitude") if STEP not in row.where]
        usual = {_of_batch(row) for row in mine if protocol_of(row) != "Lanczos"}
        both = [row for row in mine if _of_batch(row) in usual]
        if any(protocol_of(row) == "Lanczos" for row in both):
            yield cls("Hessian: power iteration and Lanczos on the same batches", both, looks)

    def frame(self):
        batches: dict[tuple[str, tuple], list[Result]] = {}
        for row in self.rows:
            batches.setdefault((row.model, row.place), []).append(row)
        return [
            {
                "model": model,
                "protocol": protocol_of(rows[0]),
                "products": max(row.extra.get("found_after", row.extra["products"]) for row in rows),
                "residual": max(row.extra["residual"] for row in rows),
            }
            for (model, _), rows in batches.items()
        ]

    def plot(self):
        frame = self.frame()
        picture, axes = canvas(2.8)
        for model in models_of(frame):
            look = self.styles[model]
            for protocol, marker in MARKERS.items():
                mine = [e for e in frame if (e["model"], e["protocol"]) == (model, protocol)]
                if not mine:
                    continue
                x, y = [e["products"] for e in mine], [max(e["residual"], 1e-10) for e in mine]
                axes.plot(x, y, marker, color=look.colour, label=f"{model}, {protocol}", fillstyle="none")
        axes.axhline(1e-3, linewidth=0.8, color="#888888")
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
        axes.set_xlim(left=0)
        axes.set_xlabel("Hessian-vector products (grey: a residual of 1e-3)")
        axes.set_ylabel("largest relative residual")
        legend(axes)
        return picture


def _smoothed(nodes: list[float], weights: list[float], at: np.ndarray, width: float) -> np.ndarray:
    bumps = np.exp(-0.5 * ((at[:, None] - np.array(nodes)) / width) ** 2) / (width * np.sqrt(2 * np.pi))
    return bumps @ np.array(weights)


@figure("hessian_training")
class EigenvaluesOverTraining(Drawing):
    """The most positive and the most negative eigenvalue over the steps: the median over batches."""

    shows: ClassVar[tuple[str, ...]] = ("largest_1", "smallest_1")

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.metric in cls.shows and row.task == "hessian" and STEP in row.where]
        for where in dict.fromkeys(map(where_of, mine)):
            there = [row for row in mine if where_of(row) == where]
            yield cls(f"Hessian: extreme eigenvalues over training, {where}", there, looks)

    def frame(self):
        groups: dict[tuple[str, str, int], list[float]] = {}
        for row in self.rows:
            groups.setdefault((row.model, row.metric.removesuffix("_1"), row.where[STEP]), []).append(row.value)
        return [
            {"model": model, "end": end, "step": step, "median": float(np.median(values)), "batches": len(values)}
            for (model, end, step), values in groups.items()
        ]

    def plot(self):
        frame = self.frame()
        picture, axes = canvas(2.8)
        for model in models_of(frame):
            look = self.styles[model]
            for end in ("largest", "smallest"):
                mine = sorted((e["step"], e["median"]) for e in frame if (e["model"], e["end"]) == (model, end))
                label = model if end == "largest" else None
                if mine:
                    axes.plot(*zip(*mine, strict=True), look.dash, color=look.colour, marker=look.marker, label=label)
        axes.set_yscale("symlog", linthresh=1.0)
        plain_numbers(axes.yaxis)
        axes.axhline(0, linewidth=0.8, color="#888888")
        axes.set_xlabel("steps")
        axes.set_ylabel("most positive and most negative")
        legend(axes)
        return picture


class Surfaces(Drawing):
    """The loss along one or two directions from the trained weights."""

    @classmethod
    def of(cls, rows: Sequence[Result], task: str) -> list[Result]:
        return [row for row in rows if row.task == task]

    def frame(self):
        return [
            {"model": row.model, "x": row.where["x"], "y": row.where.get("y", 0.0), "loss": row.value}
            for row in self.rows
        ]

    def grid(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x (n,), y (m,) and the loss (m, n), NaN where it was not measured."""
        frame = self.frame()
        x, y = (sorted({entry[axis] for entry in frame}) for axis in "xy")
        loss = np.full((len(y), len(x)), np.nan)
        for entry in frame:
            loss[y.index(entry["y"]), x.index(entry["x"])] = entry["loss"]
        return np.array(x), np.array(y), loss


@figure("surface_1d")
class Line(Surfaces):
    """The loss along one direction, a line for each model."""

    @classmethod
    def each(cls, rows, looks):
        yield cls("Loss along a filter-normalised direction", cls.of(rows, "surface_1d"), looks)

    def plot(self):
        frame = self.frame()
        picture, axes = canvas(2.6)
        for model in models_of(frame):
            mine = sorted((entry["x"], entry["loss"]) for entry in frame if entry["model"] == model)
            look = self.styles[model]
            axes.plot(*zip(*mine, strict=True), look.dash, color=look.colour, marker=look.marker, label=model)
        axes.set_xlabel("distance, in lengths of each filter")
        axes.set_ylabel("loss")
        legend(axes)
        return picture


class Surface(Surfaces):
    kind = ""

    @classmethod
    def each(cls, rows, looks):
        found = cls.of(rows, "surface_2d")
        for model in dict.fromkeys(row.model for row in found):
            mine = [row for row in found if row.model == model]
            yield cls(f"Loss surface of {model}, {cls.kind}", mine, looks)


def _shades(count: int) -> np.ndarray:
    """Return colours in order that can be seen on white and on black: the middle of viridis."""
    return matplotlib.colormaps["viridis"](np.linspace(0.3, 0.8, count))


@figure("surface_contour")
class Contour(Surface):
    """The loss over two directions, as lines of equal loss."""

    kind = "contour"

    def plot(self):
        x, y, loss = self.grid()
        picture, axes = canvas(3.6)
        if np.isfinite(loss).all() and min(loss.shape) > 1 and np.ptp(loss):
            axes.clabel(axes.contour(x, y, loss, levels=14, colors=_shades(20)), fontsize=7, colors=INK)
        axes.plot(0, 0, "+", color="#D55E00")
        axes.set_aspect("equal")
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        return picture


@figure("surface_3d")
class Relief(Surface):
    """The loss over two directions, as a surface seen from above."""

    kind = "3-D"
    section = "details"

    def plot(self):
        x, y, loss = self.grid()
        picture, axes = canvas(3.6)
        place = axes.get_subplotspec()
        axes.remove()
        axes = picture.add_subplot(place, projection="3d")
        axes.plot_surface(*np.meshgrid(x, y), loss, cmap="plasma", linewidth=0, rstride=1, cstride=1)
        axes.view_init(elev=25, azim=-60)
        axes.locator_params(nbins=4)
        axes.set_xlabel("first direction")
        axes.set_ylabel("second direction")
        axes.set_zlabel("loss")
        return picture
