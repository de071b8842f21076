"""Figures of models and people out of distribution, after figures 1 to 4 of Geirhos et al. 2021 (arXiv:2106.07411).

People are drawn in the text colour of the page, which no model has.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

from matplotlib.figure import Figure
from matplotlib.image import pil_to_array

from ssmclip.report.figures.base import Bars, Drawing, canvas, figure, legend, models_of, scale, shortened
from ssmclip.report.figures.examples import picture as thumbnail
from ssmclip.report.store import final
from ssmclip.report.style import INK, WIDTH, Style, drawing
from ssmclip.report.words import distorted_title, metric_name, number, title_of
from ssmclip.rows import Result
from ssmclip.rows.condition import AVERAGE, LEVEL
from ssmclip.rows.tasks import HUMANS, OOD, family_of, is_distorted, is_ood_set

MEASURES = {  # and which way is better
    "ood_accuracy": "higher is better",
    "accuracy_difference": "lower is better",
    "observed_consistency": "higher is better",
    "error_consistency": "higher is better",
}
COLUMNS = 2


def _look(styles: dict[str, Style], model: str) -> Style:
    return Style(INK, "-", "", "") if model == HUMANS else styles[model]


def _humans_first(rows: Sequence[Result]) -> list[Result]:
    return sorted(rows, key=lambda row: row.model != HUMANS)


def _set(row: Result) -> str:
    """Return the data set of stimuli, or the distortion."""
    return row.task.removeprefix(family_of(row.task)).removeprefix("/")


def _family(row: Result) -> str | None:
    """Return the distorted data set, None for rows of another kind."""
    return family_of(row.task) if is_distorted(row.task) else None


def _families(rows: Sequence[Result]) -> list[str]:
    return [family for family in dict.fromkeys(map(_family, rows)) if family]


def _point(row: Result, **more: Any) -> dict[str, Any]:
    return {"model": row.model, "value": row.value, "ci_low": row.ci_low, "ci_high": row.ci_high, **more}


@figure("ood_accuracy_by_level")
class AccuracyByLevel(Drawing):
    """Accuracy at each level of distortion, with a panel for each data set of stimuli or each distortion of a data set;
    chance level is dotted."""

    shows: ClassVar[tuple[str, ...]] = ("accuracy", "top1", "image_to_text_recall@10")

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.metric in cls.shows and LEVEL in row.where]
        published = [row for row in mine if is_ood_set(row.task)]
        yield cls("Out of distribution: accuracy by level of distortion", _humans_first(published), looks)
        for family in _families(mine):
            of_these = [row for row in mine if _family(row) == family]
            what = f"{metric_name(of_these[0].metric)} by level of distortion"
            yield cls(f"{distorted_title(of_these[0])}: {what}", of_these, looks)

    def frame(self):
        return [
            _point(row, set=_set(row), level=row.where[LEVEL], metric=row.metric, chance=row.extra.get("chance"))
            for row in self.rows
        ]

    def plot(self):
        frame = self.frame()
        sets = list(dict.fromkeys(point["set"] for point in frame))
        highest = max(max(point["value"], point["ci_high"] or 0) for point in frame)
        top = 1.0 if highest > 0.5 else 1.05 * highest  # small recalls would lie on the floor
        picture, panels = grid(math.ceil(len(sets) / COLUMNS), COLUMNS, 1.55)
        for axes, name in zip(panels, sets, strict=False):
            here = [point for point in frame if point["set"] == name]
            levels = list(dict.fromkeys(point["level"] for point in here))
            for model in models_of(frame):
                curve(axes, [point for point in here if point["model"] == model], levels, _look(self.styles, model))
            if here[0]["chance"]:
                axes.axhline(here[0]["chance"], color=INK, linewidth=0.8, linestyle=":")
            axes.set_title(name, loc="left")
            labels = [shortened(short_level(level), 12) for level in levels]
            axes.set_xticks(range(len(levels)), labels, size=7, rotation=90 if len("".join(labels)) > 18 else 0)
            axes.set_ylim(-0.03 * top, 1.03 * top)
            scale(axes.yaxis, here[0]["metric"])
        for axes in panels[len(sets) :]:
            axes.set_axis_off()
        legend(picture)
        return picture


@figure("stimuli")
class Stimuli(Drawing):
    """The stimuli: an image at each level of each distortion, or one of each condition of each data set."""

    shows: ClassVar[tuple[str, ...]] = ("accuracy", "ood_accuracy", "top1", "image_to_text_recall@10")

    section = "details"
    wide = True

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.metric in cls.shows and row.extra.get("stimuli")]
        published = [row for row in mine if is_ood_set(row.task)]
        yield cls("Out of distribution: one stimulus per condition", published, looks)
        for family in _families(mine):
            of_these = [row for row in mine if _family(row) == family]
            yield cls(f"{distorted_title(of_these[0])}: one image per level", of_these, looks)

    def frame(self):
        return [
            {"set": _set(row), "level": level, "picture": encoded}
            for row in self.rows
            for level, encoded in row.extra["stimuli"].items()
        ]

    def plot(self):
        frame = self.frame()
        sets = list(dict.fromkeys(cell["set"] for cell in frame))
        columns = max(sum(cell["set"] == name for cell in frame) for name in sets)
        with drawing():
            size = (1.1 + 0.85 * columns, 0.3 + 1.05 * len(sets))
            fig = Figure(figsize=size, layout="constrained")
            table = fig.subplots(len(sets), columns, squeeze=False)
        for axes in table.flat:
            axes.set_axis_off()
        for line, name in zip(table, sets, strict=True):
            for axes, cell in zip(line, [cell for cell in frame if cell["set"] == name], strict=False):
                axes.imshow(pil_to_array(thumbnail(cell["picture"])))
                axes.set_title(short_level(cell["level"]), size=8)
            line[0].text(-0.12, 0.5, name, transform=line[0].transAxes, ha="right", va="center", size=8)
        return fig


def curve(axes, points: Sequence[dict[str, Any]], levels: Sequence[str], look: Style) -> None:
    """Draw a line over the levels, with its interval as a band."""
    if not points:
        return
    points = sorted(points, key=lambda point: levels.index(point["level"]))
    places = [levels.index(point["level"]) for point in points]
    values = [point["value"] for point in points]
    width = 1.2 if look.marker else 2.2
    name = points[0]["model"]
    axes.plot(
        places, values, look.dash, color=look.colour, marker=look.marker, markersize=3.5, linewidth=width, label=name
    )
    if all(point["ci_low"] is not None for point in points):
        low, high = ([point[end] for point in points] for end in ("ci_low", "ci_high"))
        axes.fill_between(places, low, high, color=look.colour, alpha=0.15, linewidth=0)


def short_level(label: str) -> str:
    """
    >>> short_level("16-10-10"), short_level("0.35"), short_level("c100"), short_level("False")
    ('16', '0.35', 'c100', 'False')
    """
    return label.split("-")[0]


@figure("ood_sets")
class WithoutLevels(Bars):
    """Accuracy on the data sets without levels."""

    shows: ClassVar[tuple[str, ...]] = ("ood_accuracy",)

    @classmethod
    def each(cls, rows, looks):
        levelled = {row.task for row in rows if LEVEL in row.where}
        mine = [row for row in final(rows) if row.metric in cls.shows and is_ood_set(row.task)]
        mine = _humans_first([row for row in mine if row.plain and row.task not in levelled])
        looks = {model: _look(looks, model) for model in looks}
        yield cls("Out of distribution: sketches, outlines and styles", mine, looks)

    def group(self, row):
        return _set(row)


@figure("ood_overall")
class Overall(Drawing):
    """The four metrics averaged over data sets, a bar for each model and a line for people."""

    shows: ClassVar[tuple[str, ...]] = tuple(MEASURES)

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in rows if row.metric in cls.shows and row.task == OOD]
        for average in list(dict.fromkeys(row.where.get(AVERAGE, "") for row in mine))[:2]:
            of_these = [row for row in mine if row.where.get(AVERAGE, "") == average]
            yield cls(f"Out of distribution, {average}: overall", _humans_first(of_these), looks)

    def frame(self):
        return [_point(row, metric=row.metric) for row in self.rows]

    def plot(self):
        frame = self.frame()
        metrics = [metric for metric in MEASURES if any(point["metric"] == metric for point in frame)]
        names = models_of(frame)
        picture, panels = grid(len(metrics), 1, 0.55 + 0.2 * len(names))
        for axes, metric in zip(panels, metrics, strict=True):
            points = {point["model"]: point for point in frame if point["metric"] == metric}
            if HUMANS in points:
                axes.axvline(points[HUMANS]["value"], color=INK, linewidth=1, linestyle=":")
            for place, model in enumerate(names):
                if model in points:
                    self._bar(axes, place, points[model], metric)
            axes.set_yticks(range(len(names)), [shortened(name, 26) for name in names])
            axes.set_ylim(len(names) - 0.4, -0.6)
            axes.grid(False, axis="y")
            axes.margins(x=0.14)
            axes.set_xlim(left=min(0.0, *(point["value"] for point in points.values())))
            axes.set_title(f"{metric_name(metric)}; {MEASURES[metric]}", loc="left")
            scale(axes.xaxis, metric)
        return picture

    def _bar(self, axes, place: int, point: dict[str, Any], metric: str) -> None:
        look, end = _look(self.styles, point["model"]), point["value"]
        axes.barh(place, end, 0.74, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0)
        if point["ci_low"] is not None:
            # Over a bar of the same ink a whisker would not show: it is drawn wider, in white, below.
            ends = [point["ci_low"], point["ci_high"]]
            axes.plot(ends, [place, place], color="white", linewidth=2.6, solid_capstyle="butt")
            axes.plot(ends, [place, place], color=INK, linewidth=1.2, solid_capstyle="butt")
            end = max(end, point["ci_high"])
        said = number(point["value"], metric)
        axes.annotate(said, (end, place), xytext=(3, 0), textcoords="offset points", va="center", size=8)


@figure("shape_bias")
class ShapeBias(Drawing):
    """Shape bias of each category and overall (vertical line): 0 is texture only, 1 shape only."""

    shows: ClassVar[tuple[str, ...]] = ("shape_bias",)

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in final(rows) if row.metric in cls.shows and row.extra.get("per_category")]
        yield cls("Shape bias by category", _humans_first(mine), looks)

    def frame(self):
        return [
            {"model": row.model, "category": category, "shape_bias": value, "all": row.value}
            for row in self.rows
            for category, value in row.extra["per_category"].items()
        ]

    def plot(self):
        frame = self.frame()
        categories = sorted({point["category"] for point in frame}, reverse=True)
        picture, axes = canvas(1.2 + 0.2 * len(categories))
        for model in models_of(frame):
            look = _look(self.styles, model)
            mine = [point for point in frame if point["model"] == model and point["shape_bias"] is not None]
            axes.plot(
                [point["shape_bias"] for point in mine],
                [categories.index(point["category"]) for point in mine],
                linestyle="",
                color=look.colour,
                marker=look.marker or "o",
                markerfacecolor=look.colour if look.marker else "none",
                markersize=6 if look.marker else 8,
                label=model,
            )
            everything = next(point["all"] for point in frame if point["model"] == model)
            axes.axvline(everything, color=look.colour, linestyle=look.dash, linewidth=1)
        axes.set_yticks(range(len(categories)), [shortened(name, 40) for name in categories])
        axes.set_xlim(-0.03, 1.03)
        axes.set_xlabel("decisions by shape, as a share of decisions by shape or texture")
        scale(axes.xaxis, "shape_bias")
        legend(axes)
        return picture


@figure("consistency_matrix")
class ConsistencyMatrix(Drawing):
    """Pairwise error consistency; the cell of people with people is their agreement with each other."""

    shows: ClassVar[tuple[str, ...]] = ("error_consistency",)

    section = "details"

    @classmethod
    def each(cls, rows, looks):
        mine = [row for row in final(rows) if row.metric in cls.shows and (row.task == OOD or is_ood_set(row.task))]
        averages = list(dict.fromkeys(row.where.get(AVERAGE, "") for row in mine if row.task == OOD))[:1]
        groups = [(OOD, average) for average in averages] or list(dict.fromkeys((r.task, "") for r in mine))
        for task, average in groups:
            these = [row for row in mine if (row.task, row.where.get(AVERAGE, "")) == (task, average)]
            where = f"{title_of(task, rows)}, {average}" if average else title_of(task, rows)
            yield cls(f"{where}: pairwise error consistency", _humans_first(these), looks)

    def frame(self):
        cells = []
        for row in self.rows:
            cells.append({"model": row.model, "other": HUMANS, "kappa": row.value})
            if row.model != HUMANS:
                cells.append({"model": HUMANS, "other": row.model, "kappa": row.value})
            cells += [
                {"model": row.model, "other": other, "kappa": value}
                for other, value in row.extra.get("with", {}).items()
            ]
        return cells

    def plot(self):
        frame = self.frame()
        names = list(dict.fromkeys(cell["model"] for cell in frame))
        kappa = {(cell["model"], cell["other"]): cell["kappa"] for cell in frame}
        table = [[kappa.get((a, b), math.nan) for b in names] for a in names]
        picture, axes = canvas(WIDTH)
        top = max([0.1, *(value for value in kappa.values() if math.isfinite(value))])
        axes.imshow(table, cmap="Blues", vmin=0, vmax=top)
        for i, line in enumerate(table):
            for j, value in enumerate(line):
                if math.isfinite(value):
                    ink = "white" if value > 0.6 * top else "black"
                    axes.text(j, i, f"{value:.2f}", ha="center", va="center", color=ink, size=min(8, 70 / len(names)))
        axes.set_xticks(range(len(names)), [shortened(name, 20) for name in names], rotation=90)
        axes.set_yticks(range(len(names)), [shortened(name, 20) for name in names])
        axes.grid(False)
        return picture


def grid(rows: int, columns: int, height: float) -> tuple[Figure, list[Any]]:
    """Return a figure of many axes as wide as a phone, each row `height` inches high."""
    with drawing():
        picture = Figure(figsize=(WIDTH, 0.5 + height * rows), layout="constrained")
        return picture, list(picture.subplots(rows, columns, squeeze=False).flat)
