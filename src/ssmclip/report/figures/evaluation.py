"""Figures: each has `.frame()`, the plain numbers it shows, taken from rows, and `.plot()`, a picture of those.

A new one is a class with `@figure(name)`; it is drawn when its `each` finds rows that give it numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, quantiles
from typing import Any, ClassVar

import matplotlib.ticker as ticker
from matplotlib.axes import Axes

from ssmclip.report.figures.base import (
    MOST_CLASSES,
    NAME_STEP,
    Bars,
    Drawing,
    bars,
    canvas,
    figure,
    legend,
    models_of,
    plain_numbers,
    scale,
    shortened,
)
from ssmclip.report.store import by_task, final
from ssmclip.report.style import INK, LINE, WIDTH
from ssmclip.report.table1 import points
from ssmclip.report.words import RECALL, headline, kind_of, metric_name, title_of
from ssmclip.rows.condition import STEP

WRITTEN_COUNTS = 12  # classes up to which a confusion matrix has its numbers written in


@figure("training_curves")
class TrainingCurves(Drawing):
    """A metric over the training steps, a line for each model."""

    shows: ClassVar[tuple[str, ...]] = ("loss", "top1", "mean_recall")

    @classmethod
    def each(cls, rows, looks):
        curves = [row for row in rows if STEP in row.where and row.metric in cls.shows]
        for task, metric in dict.fromkeys((row.task, row.metric) for row in curves):
            where = "training" if task == "train" else title_of(task, rows)
            mine = [row for row in curves if (row.task, row.metric) == (task, metric)]
            yield cls(f"{where}: {metric_name(metric)} over training steps", mine, looks)

    def frame(self):
        return [{"model": row.model, "step": row.where[STEP], "value": row.value} for row in self.rows]

    def plot(self):
        frame = self.frame()
        picture, axes = canvas(2.6)
        for model in models_of(frame):
            mine = sorted((point["step"], point["value"]) for point in frame if point["model"] == model)
            look = self.styles[model]
            marker = look.marker if len(mine) <= 40 else ""
            axes.plot(*zip(*mine, strict=True), look.dash, color=look.colour, marker=marker, markersize=4, label=model)
        axes.set_xlabel("steps")
        scale(axes.yaxis, self.rows[0].metric)
        legend(axes)
        return picture


@figure("zero_shot")
class ZeroShot(Bars):
    """The main accuracy metric of each classification set."""

    @classmethod
    def each(cls, rows, looks):
        tasks = dict.fromkeys(row.task for row in final(rows) if kind_of(row.task, rows) == "classification")
        heads = [(task, headline(rows, task)) for task in tasks]
        mine = [row for row in final(rows) if (row.task, row.metric) in heads]
        yield cls("Zero-shot classification", [row for row in mine if row.plain], looks)

    def group(self, row):
        return f"{title_of(row.task, self.rows)}: {metric_name(row.metric)}"


@figure("retrieval")
class Recalls(Bars):
    """Recall at 1, 5 and 10 in both directions."""

    @classmethod
    def each(cls, rows, looks):
        recalls = [row for row in final(rows) if RECALL.fullmatch(row.metric) and row.plain]
        for task in dict.fromkeys(row.task for row in recalls):
            mine = [row for row in recalls if row.task == task]
            yield cls(f"{title_of(task, rows)}: retrieval", mine, looks)

    def group(self, row):
        return metric_name(row.metric)


@figure("accuracy_per_parameter")
class AccuracyPerParameter(Drawing):
    """Image tower size against the average over the data sets of CLIP-Mamba's table, published and measured."""

    @classmethod
    def each(cls, rows, looks):
        shown = points(rows)
        count = shown[0]["columns"] if shown else 0
        yield cls(f"Parameters against accuracy ({count} data sets of CLIP-Mamba's Table 1)", rows, looks)

    def frame(self):
        return points(self.rows)

    def plot(self):
        picture, axes = canvas(3.0)
        for point in self.frame():
            look = None if point["published"] else self.styles[point["model"]]
            marker, colour = (look.marker, look.colour) if look else ("o", "none")
            x, y = point["parameters"], point["average"] / 100
            axes.plot([x], [y], marker, color=colour, markeredgecolor=look.colour if look else INK, markersize=6)
        axes.set_xscale("log")
        plain_numbers(axes.xaxis)
        axes.xaxis.set_minor_formatter(ticker.NullFormatter())
        axes.set_xlabel("parameters of the image tower (millions)")
        axes.margins(x=0.1, y=0.15)
        scale(axes.yaxis, "top1")
        named_beside(axes, self.frame())
        return picture


def named_beside(axes: Axes, frame: Sequence[dict[str, Any]]) -> None:
    """Draw the points' names in a column right of the axes, as models of one size lie close together."""
    low, high = axes.get_ylim()
    ordered = sorted(frame, key=lambda point: (point["average"], -point["parameters"]))
    places: list[float] = []
    for point in ordered:
        own = (point["average"] / 100 - low) / (high - low)
        places.append(max(own, places[-1] + NAME_STEP) if places else own)
    for i in range(1, len(places) + 1):  # and down again from the top
        places[-i] = min(places[-i], 1.0 if i == 1 else places[1 - i] - NAME_STEP)
    for point, place in zip(ordered, places, strict=True):
        name = f"{shortened(point['model'], 26)}{', published' if point['published'] else ''}"
        line = {"arrowstyle": "-", "color": LINE, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 3}
        at = point["parameters"], point["average"] / 100
        axes.annotate(name, at, xytext=(1.04, place), textcoords="axes fraction", va="center", size=7, arrowprops=line)


@figure("throughput")
class Throughput(Drawing):
    """Images per second in training: the median over the logged steps, with quartiles."""

    shows: ClassVar[tuple[str, ...]] = ("images_per_s",)

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.task == "train" and row.metric in cls.shows and STEP in row.where]
        yield cls("Training throughput (images per second)", mine, looks)

    def frame(self):
        speeds: dict[str, list[float]] = {}
        for row in self.rows:
            speeds.setdefault(row.model, []).append(row.value)
        return [self._quartiles(model, values) for model, values in speeds.items()]

    @staticmethod
    def _quartiles(model: str, values: list[float]) -> dict[str, Any]:
        low, middle, high = quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
        return {"model": model, "median": middle, "low": low, "high": high, "steps": len(values)}

    def plot(self):
        frame = [
            {
                "group": "",
                "model": f["model"],
                "value": f["median"],
                "ci_low": f["low"],
                "ci_high": f["high"],
                "chance": None,
            }
            for f in self.frame()
        ]
        return bars(frame, self.styles, percent=False)


@figure("per_class")
class PerClass(Drawing):
    """The accuracy of each class, best first; for many classes, only the best and the worst."""

    section = "details"

    @classmethod
    def each(cls, rows, looks):
        having = [row for row in final(rows) if row.extra.get("per_class")]
        for task in dict.fromkeys(row.task for row in having):
            mine = [row for row in having if row.task == task]
            classes = max(len(row.extra["per_class"]) for row in mine)
            part = f" (the {MOST_CLASSES // 2} best and worst of {classes})" if classes > MOST_CLASSES else ""
            yield cls(f"{title_of(task, rows)}: accuracy by class{part}", mine, looks)

    def frame(self):
        return [
            {"model": row.model, "class": entry["name"], "accuracy": entry["accuracy"], "n": entry["n"]}
            for row in self.rows
            for entry in row.extra["per_class"]
        ]

    def plot(self):
        frame = self.frame()
        accuracies: dict[str, list[float]] = {}
        for entry in frame:
            accuracies.setdefault(entry["class"], []).append(entry["accuracy"])
        order = sorted(accuracies, key=lambda name: (mean(accuracies[name]), name))
        if len(order) > MOST_CLASSES:
            order = order[: MOST_CLASSES // 2] + order[-MOST_CLASSES // 2 :]
        place = {name: i for i, name in enumerate(order)}
        picture, axes = canvas(0.8 + 0.19 * len(order))
        for i, model in enumerate(models_of(frame)):
            mine = [entry for entry in frame if entry["model"] == model and entry["class"] in place]
            look = self.styles[model]
            axes.plot(
                [entry["accuracy"] for entry in mine],
                [place[entry["class"]] for entry in mine],
                linestyle="",
                color=look.colour,
                marker=look.marker,
                markersize=max(3, 8 - 2 * i),  # so that an equal one below still shows
                label=model,
            )
        axes.set_yticks(range(len(order)), [shortened(name, 40) for name in order])
        axes.set_ylim(-0.7, len(order) - 0.3)
        axes.set_xlim(-0.03, 1.03)
        scale(axes.xaxis, "top1")
        legend(axes)
        return picture


@figure("confusion")
class Confusion(Drawing):
    """The confusion matrix, for few enough classes to be legible."""

    section = "details"

    @classmethod
    def each(cls, rows, looks):
        for row in by_task(final(rows)):
            if row.extra.get("confusion"):
                yield cls(f"{title_of(row.task, rows)}: confusion matrix ({row.model})", [row], looks)

    def frame(self):
        confusion = self.rows[0].extra["confusion"]
        names = confusion["names"]
        return [
            {"truth": names[i], "predicted": names[j], "count": count}
            for i, line in enumerate(confusion["counts"])
            for j, count in enumerate(line)
        ]

    def plot(self):
        frame = self.frame()
        side = round(len(frame) ** 0.5)
        names = [frame[i]["predicted"] for i in range(side)]
        counts = [[cell["count"] for cell in frame[i * side : (i + 1) * side]] for i in range(side)]
        shares = [[count / max(1, sum(line)) for count in line] for line in counts]
        picture, axes = canvas(WIDTH)
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        if side <= WRITTEN_COUNTS:
            for i, line in enumerate(counts):
                for j, count in enumerate(line):
                    ink = "white" if shares[i][j] > 0.5 else "black"
                    axes.text(j, i, count or "", ha="center", va="center", color=ink, size=min(8, 90 / side))
        axes.set_xticks(range(side), [shortened(name, 14) for name in names], rotation=90)
        axes.set_yticks(range(side), [shortened(name, 14) for name in names])
        axes.set_xlabel("predicted class")
        axes.set_ylabel("is")
        axes.grid(False)
        return picture
