"""The answers of the page as HTML, in which everything that a visitor or a file gave is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from ssmclip.analyze.saliency.explanation import Explanation
from ssmclip.data.images import thumbnail
from ssmclip.demo.answers import Distorted, Refusal
from ssmclip.report.figures.saliency import Saliency
from ssmclip.report.style import inline_svg

__all__ = ["CSS", "as_html", "distorted", "looked_at"]

SIDE = 224  # pixels of a distorted picture: all of them

CSS = """
.cards { display: flex; flex-wrap: wrap; gap: 1rem; }
.card { flex: 1 1 16rem; min-width: 0; border: 1px solid var(--border-color-primary); border-radius: .5rem;
  padding: .5rem 1rem; margin: .25rem 0; overflow-wrap: anywhere; --line: var(--border-color-primary); }
.card img { max-width: 100%; }
.alert { color: #b3261e; border-left: .25rem solid; padding-left: .75rem; overflow-wrap: anywhere; }
.dark .alert { color: #ff8a80; }
.guesses, .hits { list-style: none; padding: 0; margin: 0; }
.guesses li { display: grid; grid-template-columns: 1fr auto; gap: 0 .5rem; margin: .3rem 0; }
.guesses .label { overflow-wrap: anywhere; }
.guesses .bar { grid-column: 1 / -1; height: .35rem; background: #0072b2; border-radius: .2rem; }
.share { font-variant-numeric: tabular-nums; }
.hits { display: grid; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); gap: 1rem; }
.hit { overflow-wrap: anywhere; font-size: .85rem; }
.hit img { width: 100%; height: 9rem; object-fit: contain; }
.number { font-size: 1.6rem; font-weight: 600; }
.scrolls { overflow-x: auto; }
"""

_prefixes = count()  # of the ids in a figure, which no other figure of the page may have


class Look(NamedTuple):
    """A model's maps, drawn."""

    model: str
    svg: Markup


@cache
def _template() -> Any:
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("answers.html.j2").module


def as_html(macro: str, *values: Any) -> str:
    """Return what a macro of the template makes of values."""
    return str(getattr(_template(), macro)(*values))


def distorted(answer: Distorted) -> str:
    """Return both pictures and what the models say of them."""
    return as_html("distorted", answer, thumbnail(answer.before, SIDE), thumbnail(answer.after, SIDE))


def looked_at(answers: Sequence[Explanation | Refusal]) -> str:
    """Return each explanation as the report draws it."""
    return as_html("looked", [one if isinstance(one, Refusal) else _drawn(one) for one in answers])


def _drawn(found: Explanation) -> Look:
    (figure,) = Saliency.each(found.rows(), {})
    svg = inline_svg(figure.plot(), figure.title, f"map{next(_prefixes)}", wide=True)
    return Look(found.model, Markup(svg))  # inline_svg escapes its texts
