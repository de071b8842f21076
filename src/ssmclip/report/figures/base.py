"""The base class of figures, their registry and shared drawing functions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import matplotlib.ticker as ticker
from jinja2 import UndefinedError
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ssmclip.registry import Registry
from ssmclip.report.store import Store
from ssmclip.report.style import INK, WIDTH, Style, drawing, styles
from ssmclip.report.words import is_fraction
from ssmclip.rows import Result

NAME_STEP = 0.06  # of the height of the axes: a line of small letters
SHORT_NAME, LONG_NAME = 28, 60  # letters of a legend: two columns fit below the first, one below the second
MOST_CLASSES = 30  # bars of one figure that can still be read


# The order of the page.
FIGURES: Registry[type[Drawing]] = Registry(
    "figure",
    [
        f"ssmclip.report.figures.{name}"
        for name in ("overview", "efficiency", "examples", "evaluation", "curvature", "humans", "saliency")
    ],
)


@dataclass(frozen=True)
class Drawing:
    """One figure: a title, the rows it shows, and how each model is drawn."""

    title: str
    rows: Sequence[Result]
    styles: dict[str, Style]

    shows: ClassVar[tuple[str, ...]] = ()  # metrics, where the kind of figure is of some
    section: ClassVar[str] = "figures"
    wide: ClassVar[bool] = False

    @classmethod
    def each(cls, rows: Sequence[Result], looks: dict[str, Style]) -> Iterator[Drawing]:
        """Yield the figures of this kind that the rows allow."""
        raise NotImplementedError  # each kind of figure has its own

    def frame(self) -> list[dict[str, Any]]:
        """Return the numbers shown, one dict each."""
        raise NotImplementedError  # each kind of figure has its own

    def plot(self) -> Figure:
        """Return a matplotlib figure of `.frame()`."""
        raise NotImplementedError  # each kind of figure has its own


def figure(name: str):
    """Return a decorator that registers a kind of figure."""
    return FIGURES.register(name)


def drawings(store: Store) -> list[Drawing]:
    """Return every figure that has something to show. Raises ValueError if its figure cannot draw a row's `extra`."""
    looks, found = styles(store.models), []
    for name, cls in FIGURES.items():
        with explained(f"figure {name!r} draws"):
            found += [drawn for drawn in cls.each(store.rows, looks) if drawn.frame()]
    return found


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn errors caused by a row's `extra`, which may contain anything, into a ValueError that says where."""
    try:
        yield
    except (AttributeError, IndexError, KeyError, TypeError, UndefinedError) as error:
        raise ValueError(f"the `extra` of a row does not contain what {what}: {error!r}") from error


class Bars(Drawing):
    """A bar with its interval for each model in each group, and a mark at chance level."""

    def group(self, row: Result) -> str:
        raise NotImplementedError  # each kind of figure has its own

    def frame(self):
        return [
            {
                "group": self.group(row),
                "model": row.model,
                "value": row.value,
                "ci_low": row.ci_low,
                "ci_high": row.ci_high,
                "n": row.n,
                "chance": row.extra.get("chance"),
            }
            for row in self.rows
        ]

    def plot(self):
        return bars(self.frame(), self.styles)


def canvas(height: float, width: float = WIDTH) -> tuple[Figure, Axes]:
    """Return a figure with one pair of axes. Its size in inches is that of the axes and labels; legends add to it."""
    with drawing():
        picture = Figure(figsize=(width, height), layout="constrained")
        return picture, picture.subplots()


def models_of(frame: Sequence[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(entry["model"] for entry in frame))


def bars(frame: Sequence[dict[str, Any]], looks: dict[str, Style], percent: bool = True) -> Figure:
    """Draw grouped horizontal bars with their values, intervals as whiskers and chance as a tick across the group."""
    models, groups = models_of(frame), list(dict.fromkeys(entry["group"] for entry in frame))
    thickness = 0.8 / len(models)
    picture, axes = canvas(0.6 + len(groups) * (0.2 + 0.2 * len(models)))
    for entry in frame:
        middle, look = groups.index(entry["group"]), looks[entry["model"]]
        y = middle + (models.index(entry["model"]) - (len(models) - 1) / 2) * thickness
        axes.barh(
            y, entry["value"], thickness * 0.86, color=look.colour, hatch=look.hatch, edgecolor="white", linewidth=0
        )
        end = entry["value"]
        if entry["ci_low"] is not None:
            axes.plot([entry["ci_low"], entry["ci_high"]], [y, y], color=INK, linewidth=1.2, solid_capstyle="butt")
            end = max(end, entry["ci_high"])
        said = f"{100 * entry['value']:.1f}" if percent else f"{entry['value']:.3g}"
        axes.annotate(said, (end, y), xytext=(3, 0), textcoords="offset points", va="center", size=8)
        if entry["chance"] is not None:
            axes.plot([entry["chance"]] * 2, [middle - 0.42, middle + 0.42], ":", color=INK, linewidth=1.2)
    axes.set_yticks(range(len(groups)), [wrapped(group) for group in groups])
    axes.set_ylim(len(groups) - 0.45, -0.55)
    axes.grid(False, axis="y")
    axes.margins(x=0.12)
    axes.set_xlim(left=0)
    if percent:
        scale(axes.xaxis, "top1")
    if len(models) > 1:
        patches = [
            Patch(facecolor=looks[m].colour, hatch=looks[m].hatch, edgecolor="white", linewidth=0, label=m)
            for m in models
        ]
        legend(axes, patches)
    else:
        axes.set_title(models[0], loc="left")
    return picture


def legend(place: Axes | Figure, handles: Sequence[Artist] = ()) -> None:
    """Draw the legend above the axes, or all of a figure's, in two columns from four short names.

    It hides no point, and the layout leaves it out: the picture grows by it, and the axes keep their size.
    """
    axes = place.axes[0] if isinstance(place, Figure) else place
    shown = handles or axes.get_legend_handles_labels()[0]
    names = [_without_middle(str(artist.get_label())) for artist in shown]
    columns = 2 if len(names) > 3 and max(map(len, names)) < SHORT_NAME else 1
    place.legend(shown, names, loc="lower left", bbox_to_anchor=(0, 1), ncols=columns).set_in_layout(False)


def _without_middle(text: str) -> str:
    """Return a text that is too long for a legend without its middle: long names differ at their ends."""
    half = LONG_NAME // 2
    return text if len(text) <= LONG_NAME else f"{text[:half]}…{text[-half:]}"


def plain_numbers(axis) -> None:
    """Label non-linear axes with plain numbers: their default labels are formulas, which are not drawn."""
    large = ticker.EngFormatter(sep=" ")
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: large(value) if value >= 1e6 else f"{value:,.6g}"))
    axis.set_minor_formatter(ticker.NullFormatter())


def scale(axis, metric: str) -> None:
    """Label the axis of a fraction in percent."""
    if is_fraction(metric):
        axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{100 * value:.6g} %"))


def wrapped(text: str, width: int = 22) -> str:
    """Return the text wrapped at about `width` letters."""
    rows = [""]
    for word in text.split():
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width:
            rows.append("")
        rows[-1] = f"{rows[-1]} {word}".strip()
    return "\n".join(shortened(row, 2 * width) for row in rows)


def shortened(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 1] + "…"
