"""Rows as tables, for the page and as Markdown for a README."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby, takewhile
from pathlib import Path
from statistics import median

from ssmclip.files import whole
from ssmclip.report.store import Source, final, read_store
from ssmclip.report.words import caveats, distorted_title, interval, metric_name, number, title_of
from ssmclip.rows import Result
from ssmclip.rows.condition import AVERAGE, LEVEL, STEP
from ssmclip.rows.resume import latest
from ssmclip.rows.tasks import family_of, is_distorted

VISIBLE = 12  # lines of a table, before some are folded away
BEGIN, END = "<!-- results -->", "<!-- /results -->"


@dataclass(frozen=True)
class Line:
    """A line of a table: one metric of one data set, with each model's row (None where it was not measured)."""

    title: str
    condition: str
    metric: str
    cells: list[Result | None]

    @property
    def n(self) -> str:
        return " / ".join(dict.fromkeys(f"{row.n:,}" for row in self.cells if row is not None and row.n is not None))

    @property
    def first(self) -> Result:
        return next(row for row in self.cells if row is not None)


@dataclass(frozen=True)
class Block:
    """Lines to read together, with the models that one of them has a number of; folded: those not seen at once."""

    title: str
    models: list[str]
    shown: list[Line]
    folded: list[Line]


def lines(rows: Sequence[Result], models: Sequence[str]) -> list[Line]:
    """Return one line for each task, place and metric outside curves, and one for the speed of training."""
    measured = [*(row for row in final(rows) if LEVEL not in row.where), *speeds(rows)]
    found = {row.key: row for row in measured}
    tasks = dict.fromkeys(row.task for row in measured)
    # One of the rows of each line, tasks together.
    first = {row.key[1:]: row for task in tasks for row in reversed(measured) if row.task == task}
    keys = dict.fromkeys(row.key[1:] for task in tasks for row in measured if row.task == task)
    return [
        Line(title_of(key[0], rows), first[key].condition, key[-1], [found.get((model, *key)) for model in models])
        for key in keys
    ]


def blocks(rows: Sequence[Result], models: Sequence[str]) -> list[Block]:
    """Return the page's tables: one for each long family of tasks (FAMILY/TASK), one shared by the other tasks with the
    same models. A long table shows the first line of each task, or the first VISIBLE lines of a single task."""
    families: dict[str, list[Line]] = {}
    for line in lines(rows, models):
        task = line.first.task
        families.setdefault(family_of(task) or task, []).append(line)
    tables: dict[tuple, list[Line]] = {}
    for family, own in families.items():
        there = tuple(place for place in range(len(models)) if any(line.cells[place] for line in own))
        tables.setdefault((family if len(own) > VISIBLE else "", there), []).extend(own)
    return [_block(family, there, own, models) for (family, there), own in tables.items()]


def _block(family: str, there: Sequence[int], own: Sequence[Line], models: Sequence[str]) -> Block:
    parts = zip(*(line.title.split(", ") for line in own if family), strict=False)
    title = ", ".join(same[0] for same in takewhile(lambda same: len(set(same)) == 1, parts))
    named = [
        replace(
            line,
            title=line.title.removeprefix(title).removeprefix(", ") or title,
            cells=[line.cells[place] for place in there],
        )
        for line in own
    ]
    by_task = [list(those) for _, those in groupby(named, key=lambda line: line.first.task)]
    seen = [those[0] for those in by_task] if len(by_task) > 1 else named[:VISIBLE]
    folded = [line for line in named if line not in seen] if len(named) > VISIBLE else []
    shown = seen if folded else named
    if is_distorted(family):
        title = distorted_title(own[0].first)
    return Block(title, [models[place] for place in there], shown, folded)


def speeds(rows: Sequence[Result]) -> list[Result]:
    """Return each model's median images per second over the logged training steps, as rows."""
    seen: dict[str, list[float]] = {}
    for row in rows:
        if row.metric == "images_per_s" and STEP in row.where:
            seen.setdefault(row.model, []).append(row.value)
    return [
        Result(
            model,
            "train",
            "images_per_s",
            median(values),
            where={AVERAGE: "median over the logged steps"},
            n=len(values),
        )
        for model, values in seen.items()
    ]


def notes(rows: Sequence[Result]) -> list[tuple[str, str, str]]:
    """Return (model, title of the data set, note) for data that were not measured completely, without repetitions.

    >>> part = {"partial": {"used": 100, "of": 360}}
    >>> notes([Result("A", "digits", metric, 0.9, extra=part) for metric in ("top1", "top5")])
    [('A', 'digits', 'partial: 100 of 360 images')]
    """

    def title(row: Result) -> str:
        return distorted_title(row) if is_distorted(row.task) else title_of(row.task, rows)

    return list(dict.fromkeys((row.model, title(row), note) for row in final(rows) for note in caveats(row)))


def table(rows: Sequence[Result]) -> str:
    """Return rows as a Markdown table: a line per metric, a column per model, 95 % intervals in brackets.

    The training curves' rows appear as the speed of training only. Depends on nothing but the rows and their order.

    >>> print(table([Result("A", "digits", "top1", 0.953, 0.928, 0.975, 360)]))
    | data set | measure | n | A |
    |---|---|---|---|
    | digits | top-1 accuracy | 360 | 95.3 % (92.8–97.5) |
    """
    rows, _ = latest(rows)
    models = list(dict.fromkeys(row.model for row in rows))
    text = [["data set", "measure", "n", *models], ["---"] * (3 + len(models))]
    for line in lines(rows, models):
        where = f"{line.title}, {line.condition}" if line.condition else line.title
        text.append([where, metric_name(line.metric), line.n, *(_cell(row) for row in line.cells)])
    rule = "|" + "|".join(text.pop(1)) + "|"
    drawn = ["| " + " | ".join(_escaped(cell) for cell in cells) + " |" for cells in text]
    return "\n".join([drawn[0], rule, *drawn[1:]])


@dataclass(frozen=True)
class Validated:
    """A classifier on a data set: its pictures' (height, width), parameters, MACs and images a second (None: not
    known), and its rows of top1 and top5 (None: not measured)."""

    model: str
    title: str
    size: tuple[int, int]
    parameters: int
    macs: int | None
    top1: Result | None
    top5: Result | None
    images_per_s: float | None

    @property
    def cells(self) -> list[str]:
        """Return the line's text, in the order of COLUMNS."""
        height, width = self.size
        return [
            self.model,
            self.title,
            str(height) if height == width else f"{height}x{width}",
            f"{self.parameters / 1e6:.1f} M",
            f"{self.macs / 1e9:.2f} G" if self.macs else "",
            _cell(self.top1),
            _cell(self.top5),
            f"{self.images_per_s:.0f}" if self.images_per_s else "",
        ]


COLUMNS = ["model", "data set", "resolution", "parameters", "MACs", "top-1", "top-5", "images/s"]


def classifiers(rows: Sequence[Result]) -> list[Validated]:
    """Return a line for each classifier and data set, in the order of MambaOut's table of ImageNet models."""
    plain = {row.key: row for row in final(rows) if row.plain}
    firsts = [row for row in plain.values() if row.extra.get("judge") == "classifier"]
    return [
        Validated(
            row.model,
            title_of(row.task, rows),
            tuple(row.extra["image_size"]),
            row.extra["parameters"]["all"],
            row.extra.get("macs"),
            *(plain.get(replace(row, metric=metric).key) for metric in ("top1", "top5")),
            row.extra.get("images_per_s"),
        )
        for row in firsts
        if row.extra["kind"] == "classification"
    ]


def classifier_table(rows: Sequence[Result]) -> str:
    """Return the classifiers as a Markdown table, "" where there are none."""
    lines = [line.cells for line in classifiers(rows)]
    if not lines:
        return ""
    text = [COLUMNS, ["---"] * len(COLUMNS), *([_escaped(cell) for cell in cells] for cells in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in text)


def update_readme(readme: str | Path, rows_files: Sequence[str | Path]) -> str:
    """Write the table of the rows files between a README's markers, and return the whole new text.

    Raises ValueError unless `<!-- results -->` and `<!-- /results -->` occur once each, in this order.
    """
    readme = Path(readme)
    old = readme.read_text(encoding="utf-8")
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(
            f"{readme} must contain one line {BEGIN} followed by one line {END}; the table goes between them"
        )
    store = read_store(rows_files)
    said = [f"- {_escaped(model)}, {_escaped(title)}: {note}." for model, title, note in notes(store.rows)]
    made = list(dict.fromkeys(_escaped(provenance(source)) for source in store.sources))
    between = [table(store.rows), "", *([*said, ""] if said else []), *made]
    before, after = old[: old.index(BEGIN)], old[old.index(END) :]
    new = f"{before}{BEGIN}\n" + "\n".join(between) + f"\n{after}"
    if new != old:
        with whole(readme) as part:
            part.write_text(new, encoding="utf-8")
    return new


def provenance(source: Source) -> str:
    """Return one sentence on how a rows file was made, as far as its first line says."""
    run = source.run
    versions = run.get("versions") or {}
    parts = [
        f"commit {run['commit']}" if run.get("commit") else "",
        f"PyTorch {versions['torch']}" if versions.get("torch") else "",
        " ".join(str(run[key]) for key in ("device",) if run.get(key)),
        f"{run['cpu']}, {run.get('cores', '?')} cores" if run.get("cpu") else "",
        f"seed {run['seed']}" if run.get("seed") is not None else "",
    ]
    return f"`{source.name}`: " + (", ".join(filter(None, parts)) or "origin unknown") + "."


def _cell(row: Result | None) -> str:
    if row is None:
        return ""
    return number(row.value, row.metric) + (f" ({interval(row)})" if interval(row) else "")


def _escaped(text: str) -> str:
    for mark, safe in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("\n", " "), ("\r", " ")):
        text = text.replace(mark, safe)
    return text
