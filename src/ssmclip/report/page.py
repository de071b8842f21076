"""Rows files -> one HTML page that needs no network, and next to it the rows and the figures as files."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from ssmclip.files import whole
from ssmclip.report import words
from ssmclip.report.figures import examples
from ssmclip.report.figures.base import Drawing, drawings, explained
from ssmclip.report.store import Store, read_store
from ssmclip.report.style import drawing, inline_svg, standalone, styles
from ssmclip.report.table1 import table1
from ssmclip.report.tables import COLUMNS, blocks, classifiers, notes, provenance
from ssmclip.rows import write_rows

PAGE = "report.html"
FILES = "report_files"  # the folder next to the page with all that can be downloaded
ROWS = "rows.jsonl"
LONGEST = 80  # letters of an anchor


def write_report(rows_files: Sequence[str | Path], out: str | Path) -> Path:
    """Write `out`/report.html from rows files and return its path.

    `out`/report_files has what the page links to: all rows in one file, each figure as SVG and its numbers as CSV.

    Raises FileNotFoundError for a missing file, ValueError for a line that is not a row, for no rows at all and for
    rows whose `extra` a figure cannot draw, OSError if `out` cannot be written. Each file is written whole or not, and
    the page last.
    """
    store = read_store(rows_files)
    page = Path(out) / PAGE
    with explained("the page shows"):
        html, files = render(store)
    for name, content in files.items():
        _write(page.with_name(FILES) / name, content)
    write_rows(
        page.with_name(FILES) / ROWS, store.rows, {"files": {source.name: source.run for source in store.sources}}
    )
    _write(page, html)
    return page


def render(store: Store) -> tuple[str, dict[str, str]]:
    """Return the page's HTML, and its figures' files by name. The template escapes everything that comes from rows."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["thousands"] = lambda n: f"{n:,}"
    environment.filters["digest"] = digest
    anchors = Anchors()
    found = [_shown(drawn, place, anchors) for place, drawn in enumerate(drawings(store))]
    html = environment.get_template("page.html.j2").render(
        store=store,
        anchors=anchors,
        folder=FILES,
        rows_file=ROWS,
        styles=styles(store.models),
        words=words,
        summary=words.summary(store.rows),
        blocks=blocks(store.rows, store.models),
        notes=notes(store.rows),
        classifiers=[line.cells for line in classifiers(store.rows)],
        columns=COLUMNS,
        table1=table1(store.rows),
        shown={
            section: [figure for figure in found if figure["section"] == section]
            for section in ("overview", "figures", "examples", "details")
        },
        provenance=[provenance(source).replace("`", "") for source in store.sources],
    )
    return html, {name: content for figure in found for name, content in figure["files"].items()}


class Anchors:
    """Ids of the page's headings, from their words: the same rows give the same ids, and none occurs twice.

    >>> anchors = Anchors()
    >>> [anchors("figure", title) for title in ("Loss, <b>A</b>", "Loss: b A b", "数字")]
    ['figure-loss-b-a-b', 'figure-loss-b-a-b-2', 'figure']
    """

    def __init__(self) -> None:
        self.used: set[str] = set()

    def __call__(self, kind: str, title: str = "") -> str:
        stem = re.sub("[^a-z0-9]+", "-", f"{kind} {title}".lower()).strip("-")[:LONGEST].strip("-")
        name, count = stem, 1
        while name in self.used:
            count += 1
            name = f"{stem}-{count}"
        self.used.add(name)
        return name


def digest(script: str) -> str:
    """Return what the page's security policy calls a script: no other script than this one may run."""
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()


def as_csv(frame: Sequence[dict[str, Any]]) -> str:
    """Return a figure's numbers as CSV, a line for each, with all their digits."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for entry in frame for key in entry)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(frame)
    return text.getvalue()


def _shown(drawn: Drawing, place: int, anchors: Anchors) -> dict[str, Any]:
    anchor = anchors("figure", drawn.title)
    about = {"title": drawn.title, "anchor": anchor, "section": drawn.section, "wide": drawn.wide}
    files = {f"{anchor}.csv": as_csv(drawn.frame())}
    if isinstance(drawn, examples.Examples):  # the page sets them as text
        return about | _example(drawn) | {"files": files}
    with drawing():
        svg = inline_svg(drawn.plot(), drawn.title, f"f{place}-", drawn.wide)
    return about | {"svg": svg, "files": {f"{anchor}.svg": standalone(svg)} | files}


def _example(drawn: examples.Examples) -> dict[str, Any]:
    extra = drawn.rows[0].extra
    return {
        "thumbnails": drawn.thumbnails,
        "image_to_text": extra.get("image_to_text", []),
        "text_to_image": extra.get("text_to_image", []),
    }


def _write(path: Path, text: str) -> None:
    with whole(path) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
