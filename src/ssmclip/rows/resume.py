"""Add to a rows file: existing rows are kept, and re-measured rows replace the earlier ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock

from ssmclip.rows.result import Result, read_rows, write_rows


def latest(rows: Iterable[Result]) -> tuple[list[Result], int]:
    """Return each key's last row, in order of first appearance, and how many earlier rows had another value.

    A resumed run repeats the steps since its checkpoint, with equal values: those do not count.
    """
    kept: dict[tuple[Any, ...], Result] = {}
    replaced = 0
    for row in rows:
        replaced += row.key in kept and repr(kept[row.key].value) != repr(row.value)
        kept[row.key] = row
    return list(kept.values()), replaced


class RowsFile:
    """A rows file that several processes may add measurements to at the same time.

    Every change is atomic and made under a lock (a hidden file next to it), starting from the file's current rows:
    killing the process loses nothing that was added, and two processes do not lose each other's rows.

    path: the file, which need not exist; run: its first line; same: the names in `run` that all rows of a file share.
    Raises ValueError if the file is not a rows file, or contains rows from different settings.
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
        """Read the file's current rows."""
        return read_rows(self.path)[1] if self.path.exists() else []

    def add(self, rows: Iterable[Result]) -> None:
        """Add rows to the file; each replaces an earlier row with the same key."""
        made = list(rows)
        self.change(lambda held: latest([*held, *made])[0])

    def change(self, made: Callable[[list[Result]], list[Result]]) -> None:
        """Replace the file's current rows with what `made` returns for them."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            write_rows(self.path, made(self.rows()), self.run)


def drop_half_a_line(path: Path) -> None:
    """Remove an incomplete last line, left by a killed process, from a rows file. Any other file is left unchanged."""
    first, newline, rest = path.read_bytes().partition(b"\n")
    if newline and first.startswith(b'{"run"') and not rest.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(len(first) + 1 + rest.rfind(b"\n") + 1)


def _require_same(path: Path, before: dict[str, Any], now: dict[str, Any], same: Sequence[str]) -> None:
    """Raise ValueError naming the settings that differ between the run of a file and this one."""
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
    """Yield (name, value before, value now); a group of settings yields one for each of its fields."""
    for name in same:
        wanted = now.get(name)
        if name not in before:  # an earlier version did not say
            continue
        if isinstance(wanted, dict):
            yield from _pairs(before[name] or {}, wanted, list(wanted))
        else:
            yield name, before[name], wanted
