"""Figures of what a model looks at: maps over the picture they belong to."""

from __future__ import annotations

import matplotlib.image
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ssmclip.report.figures.base import Drawing, figure, shortened, wrapped
from ssmclip.report.figures.examples import picture
from ssmclip.report.store import final
from ssmclip.report.style import drawing
from ssmclip.report.words import metric_name, number
from ssmclip.rows import Result
from ssmclip.rows.condition import CASE, METHOD, PICTURE, QUERY

PANEL = 1.9  # inches
SQUARE = (0, 1, 1, 0)  # a picture of any size, and the maps over it, cover the same axes
KEY = "saliency"  # of a row's `extra`


@figure("saliency")
class Saliency(Drawing):
    """A picture, and next to it each map over it, with the numbers of the rows that belong to the map."""

    wide = True

    @classmethod
    def each(cls, rows, looks):
        rows = final(rows)
        for row in rows:
            if shown := row.extra.get(KEY):
                for_what = f" for {shown['query']!r}" if shown["query"] else ""
                in_what = f" in {_file(shown['name'])}" if shown["name"] else ""
                title = f"What {row.model} looks at{for_what}{in_what}: {shown['method']}"
                yield cls(title, [row, *_others(row, rows)], looks)

    def frame(self):
        return [
            {"map": drawn["title"], "row": i, "column": j, "value": value}
            for drawn in self.rows[0].extra[KEY]["maps"]
            for i, line in enumerate(drawn["values"])
            for j, value in enumerate(line)
        ]

    def plot(self):
        shown = self.rows[0].extra[KEY]
        seen = picture(shown["picture"]) if shown["picture"] else None
        panels = len(shown["maps"]) + (seen is not None)
        with drawing():
            fig = Figure(figsize=(PANEL * panels, PANEL + 0.3 + 0.15 * len(self.rows)), layout="constrained")
            axes = fig.subplots(1, panels, squeeze=False)[0]
            if seen is not None:
                _picture(axes[0], seen)
                axes[0].set_title(wrapped(_file(shown["name"]) or "picture"), loc="left")
            for axis, drawn in zip(axes[panels - len(shown["maps"]) :], shown["maps"], strict=True):
                _map(axis, drawn["values"], seen, *(shown["span"] or (None, None)))
                axis.set_title(wrapped(drawn["title"]), loc="left")
            for axis in axes:
                axis.set_axis_off()
            fig.supxlabel(_numbers(self.rows), fontsize=8, x=0.01, ha="left", ma="left")
        return fig


def _file(path: str) -> str:
    """The last part of a path or address."""
    return path.rstrip("/").rpartition("/")[2]


def _others(first: Result, rows: list[Result]) -> list[Result]:
    """The other rows of the same explanation: they differ in the metric, and in the case."""

    def of(row: Result) -> tuple:
        return (row.model, row.task, *(row.where.get(key) for key in (METHOD, PICTURE, QUERY)))

    return [row for row in rows if row is not first and of(row) == of(first)]


def _picture(axes: Axes, seen: Image.Image) -> None:
    axes.imshow(matplotlib.image.pil_to_array(seen), extent=SQUARE, aspect=seen.height / seen.width)


def _map(
    axes: Axes, values: list[list[float]], seen: Image.Image | None, low: float | None, high: float | None
) -> None:
    how = dict(cmap="inferno", vmin=low, vmax=high, extent=SQUARE)
    if seen is None:
        axes.imshow(values, aspect=len(values) / len(values[0]), interpolation="nearest", **how)
    else:
        _picture(axes, seen.convert("L").convert("RGB"))
        axes.imshow(values, aspect=seen.height / seen.width, interpolation="bilinear", alpha=0.6, **how)


def _numbers(rows: list[Result]) -> str:
    def line(row: Result) -> str:
        case = f", {row.where[CASE]}" if CASE in row.where else ""
        return f"{metric_name(row.metric)}{case}: {number(row.value, row.metric)}"

    return "\n".join(shortened(line(row), 90) for row in rows)
