"""Rows files -> one self-contained HTML page, without network access or scripts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ssmclip.files import whole
from ssmclip.report import words
from ssmclip.report.figures import examples
from ssmclip.report.figures.base import Drawing, drawings, explained
from ssmclip.report.store import Store, read_store
from ssmclip.report.style import drawing, inline_svg, styles
from ssmclip.report.table1 import table1
from ssmclip.report.tables import COLUMNS, blocks, classifiers, notes, provenance

PAGE = "report.html"


def write_report(rows_files: Sequence[str | Path], out: str | Path) -> Path:
    """Write `out`/report.html from rows files and return its path.

    Raises FileNotFoundError for a missing file, ValueError for a line that is not a row, for no rows at all and for
    rows whose `extra` a figure cannot draw, OSError if `out` cannot be written. The page is written whole or not.
    """
    store = read_store(rows_files)
    page = Path(out) / PAGE
    with explained("the page shows"):
        html = render(store)
    with whole(page) as part:
        part.write_text(html, encoding="utf-8")
    return page


def render(store: Store) -> str:
    """Return the page's HTML. The template escapes everything that comes from rows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda n: f"{n:,}"
    found = drawings(store)
    return environment.get_template("page.html.j2").render(
        store=store,
        styles=styles(store.models),
        words=words,
        summary=words.summary(store.rows),
        blocks=blocks(store.rows, store.models),
        notes=notes(store.rows),
        classifiers=[line.cells for line in classifiers(store.rows)],
        columns=COLUMNS,
        table1=table1(store.rows),
        figures=[_picture(drawn, place) for place, drawn in enumerate(found) if drawn.section == "figures"],
        details=[_picture(drawn, place) for place, drawn in enumerate(found) if drawn.section == "details"],
        examples=[_example(drawn) for drawn in found if isinstance(drawn, examples.Examples)],
        provenance=[provenance(source).replace("`", "") for source in store.sources],
    )


def _picture(drawn: Drawing, place: int) -> dict[str, Any]:
    with drawing():
        svg = inline_svg(drawn.plot(), drawn.title, f"f{place}", drawn.wide)
    return {"title": drawn.title, "wide": drawn.wide, "svg": svg}


def _example(drawn: examples.Examples) -> dict[str, Any]:
    extra = drawn.rows[0].extra
    return {
        "title": drawn.title,
        "thumbnails": drawn.thumbnails,
        "image_to_text": extra.get("image_to_text", []),
        "text_to_image": extra.get("text_to_image", []),
    }
