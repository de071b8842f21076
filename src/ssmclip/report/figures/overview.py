"""The figure on top of the page: how accurate models are, against what they cost."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from matplotlib.figure import Figure

from ssmclip.report.figures.base import Drawing, figure, legend, plain_numbers, scale
from ssmclip.report.store import final
from ssmclip.report.style import WIDTH, drawing
from ssmclip.report.words import headline, kind_of, title_of
from ssmclip.rows import Result

COSTS = {
    "parameters_m": "parameters of the image tower (millions)",
    "gmacs": "multiply-accumulates of one image (billions)",
}
KIND = "classification"
ENOUGH = 2  # models: one point compares nothing


@figure("overview")
class Overview(Drawing):
    """Accuracy against parameters, and against MACs where rows hold them: the mean over the classification sets that
    all models of the figure were measured on."""

    section = "overview"
    wide = True

    @classmethod
    def each(cls, rows, looks):
        shown = compared(rows)
        titles = list(dict.fromkeys(title_of(row.task, rows) for row in shown))
        over = titles[0] if len(titles) == 1 else f"mean of {len(titles)} data sets"
        yield cls(f"Accuracy against cost: {over}", shown, looks)

    def frame(self):
        """Return the points. macs and interval: None where unknown; a mean of several data sets has no interval."""
        return [_point([row for row in self.rows if row.model == m]) for m in dict.fromkeys(r.model for r in self.rows)]

    def plot(self):
        frame = self.frame()
        costs = [cost for cost in COSTS if any(point[cost] for point in frame)]
        with drawing():
            picture = Figure(figsize=(WIDTH * len(costs), 3.0), layout="constrained")
            panels = picture.subplots(1, len(costs), sharey=True, squeeze=False)[0]
        for axes, cost in zip(panels, costs, strict=True):
            for point in frame:
                self._draw(axes, point, cost)
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
            axes.set_xlabel(COSTS[cost])
            axes.margins(x=0.1, y=0.1)
            scale(axes.yaxis, "top1")
        legend(picture)
        return picture

    def _draw(self, axes, point: dict[str, Any], cost: str) -> None:
        look = self.styles[point["model"]]
        known = [point[cost]] if point[cost] else []  # a model without MACs keeps its line in the legend
        axes.plot(known, [point["accuracy"]] * len(known), look.marker, color=look.colour, label=point["model"])
        if point["ci_low"] is not None and known:
            axes.plot(known * 2, [point["ci_low"], point["ci_high"]], color=look.colour, linewidth=1)


def compared(rows: Sequence[Result]) -> list[Result]:
    """Return the main rows of the models with known parameters, on the data set most of them were measured on and on
    those that all of these models share, by the same protocol; none for fewer than two models."""
    main = {task: headline(rows, task) for task in dict.fromkeys(row.task for row in final(rows))}
    by_task: dict[str, dict[str, Result]] = {}
    for row in final(rows):
        if row.plain and row.metric == main[row.task] and _parameters(row) and kind_of(row.task, rows) == KIND:
            by_task.setdefault(row.task, {})[row.model] = row
    first = max(by_task, key=lambda task: len(by_task[task]), default="")
    models = by_task.get(first, {})
    shared = [of for task, of in by_task.items() if models.keys() <= of.keys() and _protocol(task) == _protocol(first)]
    return [of[model] for model in models for of in shared] if len(models) >= ENOUGH else []


def _protocol(task: str) -> str:
    """
    >>> _protocol("linear:cifar10"), _protocol("cifar10")
    ('linear', '')
    """
    return task.rpartition(":")[0]


def _parameters(row: Result) -> int | float | None:
    counts = row.extra.get("parameters")
    return _positive(counts.get("image")) if isinstance(counts, dict) else None


def _positive(number: Any) -> int | float | None:
    return number if isinstance(number, int | float) and number > 0 else None


def _point(rows: Sequence[Result]) -> dict[str, Any]:
    first, one = rows[0], len(rows) == 1
    macs = next((n for row in rows if (n := _positive(row.extra.get("macs")))), None)
    return {
        "model": first.model,
        "accuracy": mean(row.value for row in rows),
        "ci_low": first.ci_low if one else None,
        "ci_high": first.ci_high if one else None,
        "data_sets": len(rows),
        "parameters_m": _parameters(first) / 1e6,
        "gmacs": macs / 1e9 if macs else None,
    }
