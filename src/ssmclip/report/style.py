"""Styles of models (colour, dash, marker and hatch, the same in every figure), and matplotlib figures as inline SVG.

Okabe and Ito's colours can be told apart with any colour vision; dash, marker and hatch tell them apart in grey.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.legend import Legend

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#999999", "#8C7A00")
DASHES = ("-", "--", "-.", ":")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "---", "xxx", "\\\\\\", "+++", "//--", "|||")  # lines only: a circle is a kilobyte of SVG

INK, LINE = "#010203", "#040506"  # stand for the page's own colours, so that a figure follows its dark mode
NOT_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ufffe\uffff]")  # no XML file may contain these
WIDTH = 4.6  # inches: about as wide as a phone, so that letters keep their size there


@dataclass(frozen=True)
class Style:
    """How one model is drawn."""

    colour: str
    dash: str
    marker: str
    hatch: str


def styles(models: Sequence[str]) -> dict[str, Style]:
    """Return a style for each model, by its place. After eight, colours repeat with other dashes and hatches."""

    def style(place: int) -> Style:
        turn = place // len(COLOURS)
        return Style(
            COLOURS[place % len(COLOURS)],
            DASHES[(place + turn) % len(DASHES)],
            MARKERS[(place + turn) % len(MARKERS)],
            HATCHES[(place + turn) % len(HATCHES)],
        )

    return {model: style(place) for place, model in enumerate(models)}


@contextmanager
def drawing() -> Iterator[None]:
    """Apply matplotlib's settings for a figure of the page. Names are drawn verbatim: "$" starts no formula."""
    settings = {
        "font.size": 9,
        "font.family": "sans-serif",
        "text.parse_math": False,
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": LINE,
        "axes.titlesize": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": LINE,
        "grid.linewidth": 0.6,
        "xtick.color": LINE,
        "ytick.color": LINE,
        "xtick.labelcolor": INK,
        "ytick.labelcolor": INK,
        "legend.frameon": False,
        "hatch.linewidth": 0.6,
        "svg.fonttype": "none",
        "svg.hashsalt": "ssmclip",
        "figure.facecolor": "none",
        "axes.facecolor": "none",
        "savefig.facecolor": "none",
        "axes.unicode_minus": True,
    }
    with mpl.rc_context(settings), warnings.catch_warnings():
        # The browser draws the text, with its own fonts.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        yield


def inline_svg(figure: Figure, label: str, prefix: str, wide: bool = False) -> str:
    """Return the figure as an SVG element for an HTML page, with unique ids and the page's colours.

    It shrinks with the page, unless it is `wide`: then it keeps its size, for a box that scrolls.
    """
    buffer = io.StringIO()
    with drawing():
        inside = [*figure.get_default_bbox_extra_artists(), *_legends(figure)]
        figure.savefig(
            buffer,
            format="svg",
            bbox_inches="tight",
            pad_inches=0.05,
            metadata={"Date": None},
            bbox_extra_artists=inside,
        )
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*">', "<g>", svg)
    svg = re.sub(r'(<image [^>]*?)\bid="[^"]*" ', r"\1", svg)  # equal images would share one
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", svg)
    svg = svg.replace(INK, "currentColor").replace(LINE, "var(--line)")
    size = re.search(r'<svg [^>]*?viewBox="0 0 ([\d.]+) [\d.]+"', svg, flags=re.DOTALL)
    width = float(size[1]) * 4 / 3 if size else 0  # points to CSS pixels
    keeps = "width" if wide else "max-width"
    opening = f'<svg role="img" aria-label="{_attribute(label)}" style="{keeps}:{width:.0f}px" '
    svg = re.sub(
        r'<svg [^>]*?(viewBox="[^"]*")[^>]*>', lambda m: _namespaced(opening, m[1]), svg, count=1, flags=re.DOTALL
    )
    return svg


def standalone(svg: str) -> str:
    """Return inline SVG as the text of a file: in the colours of the page's light mode, on white."""
    svg = svg.replace("currentColor", "#1b1f24").replace("var(--line)", "#d0d7de")
    svg = re.sub(r'style="[^"]*"', 'style="background:white"', svg, count=1)
    return '<?xml version="1.0" encoding="UTF-8"?>\n' + NOT_XML.sub("\ufffd", svg) + "\n"


def _legends(figure: Figure) -> list[Legend]:
    """Return the figure's legends: `legend` in figures/base.py takes them out of the layout."""
    of_axes = [axes.get_legend() for axes in figure.axes]
    return [*figure.legends, *(one for one in of_axes if one is not None)]


def _namespaced(opening: str, view_box: str) -> str:
    return f'{opening}{view_box} xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;").replace('"', "&quot;")
