"""Rows files, read together as the input of a report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ssmclip.rows import Result, read_rows
from ssmclip.rows.condition import BATCH, STEP
from ssmclip.rows.precision import as_models
from ssmclip.rows.resume import latest
from ssmclip.rows.tasks import HESSIAN, SURFACES


@dataclass(frozen=True)
class Source:
    """A rows file: its name (with its folder's, at most: a report may be passed on), first line, number of rows."""

    name: str
    run: dict[str, Any]
    count: int


@dataclass(frozen=True)
class Store:
    """The rows of all files, each key once, the last read. replaced: how many differed."""

    rows: list[Result]
    sources: list[Source]
    replaced: int

    @property
    def models(self) -> list[str]:
        return list(dict.fromkeys(row.model for row in self.rows))


def read_store(files: Sequence[str | Path]) -> Store:
    """Read rows files together. A model in bfloat16 is one of its own, "A (bfloat16)".

    Raises FileNotFoundError, and ValueError for a line that is not a row, for no rows at all, and for two training runs
    of one name, whose steps would be joined into one curve.
    """
    rows: list[Result] = []
    sources = []
    runs: dict[str, Path] = {}  # a training run's name -> its rows file
    paths = [Path(path) for path in files]
    same_name = Counter(path.name for path in paths)
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"rows file not found: {path}")
        run, found = read_rows(path)
        # Only a run's own file names its model in the first line.
        for name in {row.model for row in found if row.task == "train" and "model" in run}:
            if runs.setdefault(name, path).resolve() != path.resolve():
                raise ValueError(
                    f"{runs[name]} and {path} are two training runs called {name!r}: report them separately, or "
                    "rename the model in the rows of one of them"
                )
        sources.append(
            Source(path.name if same_name[path.name] == 1 else f"{path.parent.name}/{path.name}", run, len(found))
        )
        rows += found
    if not rows:
        raise ValueError(f"nothing to report: no rows in {', '.join(str(path) for path in files) or 'no files'}")
    kept, replaced = latest(as_models(rows))
    return Store(kept, sources, replaced)


def by_task(rows: Iterable[Result]) -> list[Result]:
    """Return the rows grouped by task, in the order of each task's first row, so that models stand side by side."""
    rows = list(rows)
    place = {task: i for i, task in enumerate(dict.fromkeys(row.task for row in rows))}
    return sorted(rows, key=lambda row: place[row.task])


def final(rows: Iterable[Result]) -> list[Result]:
    """Return the rows that are part of neither a training curve nor a distribution or surface."""
    return [row for row in rows if STEP not in row.where and not is_point(row)]


def is_point(row: Result) -> bool:
    """Return whether a row is one of many, of a batch or of a point on a surface: too many to list."""
    return (row.task == HESSIAN and BATCH in row.where) or row.task in SURFACES
