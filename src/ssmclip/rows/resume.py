"""A rows file that goes on: what it holds is kept, and what is measured again takes the place of what was there."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ssmclip.rows.result import Result, read_rows, write_rows


def latest(rows: Iterable[Result]) -> tuple[list[Result], int]:
    """Return each key's last row, in the order of the keys' first; and how many earlier rows had another value.

    A resumed run repeats the steps since its checkpoint, with equal values: those do not count.
    """
    kept: dict[tuple[Any, ...], Result] = {}
    replaced = 0
    for row in rows:
        replaced += row.key in kept and repr(kept[row.key].value) != repr(row.value)
        kept[row.key] = row
    return list(kept.values()), replaced


class RowsFile:
    """A rows file that measurements are added to, by this process and by others at the same time.

    Every change is made whole under a lock (a hidden file beside it), starting from what the file holds at that moment:
    a kill loses nothing that was added, and two processes do not lose each other's rows.

    path: the file, which need not exist; run: its first line; same: the names in `run` that all rows of a file share.
    Raises ValueError for a file that is no rows file, or whose rows were measured under other settings.
    """

    def __init__(self, path: str | Path, run: dict[str, Any], same: Sequence[str] = ()):
        self.path, self.run = Path(path), run
        self._lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        self.found: list[Result] = []  # what the file held when it was opened
        if self.path.exists():
            with self._lock:
                drop_half_a_line(self.path)
                before, self.found = read_rows(self.path)
            if self.found:
                _require_same(self.path, before, run, same)

    def rows(self) -> list[Result]:
        """Read what the file holds now."""
        return read_rows(self.path)[1] if self.path.exists() else []

    def add(self, rows: Iterable[Result]) -> None:
        """Put rows into the file, each in the place of an earlier one of its key."""
        made = list(rows)
        self.change(lambda held: latest([*held, *made])[0])

    def change(self, made: Callable[[list[Result]], list[Result]]) -> None:
        """Write what `made` makes of the rows that the file holds now."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            write_rows(self.path, made(self.rows()), self.run)


def drop_half_a_line(path: Path) -> None:
    """Cut off what a kill left of the last line of a rows file. Leaves any other file as it is."""
    first, newline, rest = path.read_bytes().partition(b"\n")
    if newline and first.startswith(b'{"run"') and not rest.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(len(first) + 1 + rest.rfind(b"\n") + 1)


def _require_same(path: Path, before: dict[str, Any], now: dict[str, Any], same: Sequence[str]) -> None:
    """Raise ValueError that names the settings in which the run of a file differs from this one."""
    differing = [
        f"{name} was {was!r}, is {wanted!r}"
        for name, was, wanted in _pairs(before, json.loads(json.dumps(now)), same)
        if was != wanted
    ]
    if differing:
        raise ValueError(
            f"{path} contains rows from different settings ({'; '.join(differing)}): pass the same settings, choose "
            "another file, or delete it"
        )


def _pairs(before: dict[str, Any], now: dict[str, Any], same: Sequence[str]) -> Iterable[tuple[str, Any, Any]]:
    """Yield (name, value before, value now); a group of settings gives one for each of its own."""
    for name in same:
        wanted = now.get(name)
        if name not in before:  # an earlier version did not say
            continue
        if isinstance(wanted, dict):
            yield from _pairs(before[name] or {}, wanted, list(wanted))
        else:
            yield name, before[name], wanted
