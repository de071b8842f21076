"""A rows file that goes on."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from ssmclip.rows.result import Result, read_rows

SAME = ("seed", "image_size", "max_images", "protocol", "prompts")  # of all rows of a file


def rows_before(path: Path, described: dict[str, Any]) -> list[Result]:
    """The rows that `path` has already: none where there is no file.

    They stay until they are measured anew: a run that was killed begins again, with the embeddings that are kept, and
    loses nothing if it is killed again, nor does one that is asked for other models or data sets.
    described: the run that measures now, whose first line will speak of all rows: ValueError where that would be wrong.
    """
    if not path.exists():
        return []
    was, rows = read_rows(path)
    now = json.loads(json.dumps(described))
    differing = [
        f"{name} was {was[name]!r}, is {now[name]!r}" for name in SAME if name in was and was[name] != now[name]
    ]
    if rows and differing:
        raise ValueError(
            f"{path} has {len(rows)} rows measured otherwise ({'; '.join(differing)}): give the same settings, "
            "another --out, or remove it"
        )
    if rows:
        sys.stderr.write(f"{path} has {len(rows)} rows: they stay but where they are measured anew\n")
    return rows


def _key(row: Result) -> tuple[str, ...]:
    return row.model, row.task, row.condition, row.metric


def files_of(out: Path) -> list[Path]:
    """The rows file and its ranks' parts, those that exist, the file itself first.

    A part not yet whole under its own name (``.partial``: being written, or left by a kill) is not one of them.
    """
    parts = sorted(path for path in out.parent.glob(f"{out.name}.rank*") if path.suffix != ".partial")
    return [*([out] if out.exists() else []), *parts]


def _is_part(condition: str) -> bool:
    return "batch=" in condition or condition.startswith("x=")


def drop_half_a_line(path: Path) -> None:
    """Cut off what a kill left of a last line, and nothing else."""
    text = path.read_bytes()
    if text and not text.endswith(b"\n"):
        path.write_bytes(text[: text.rfind(b"\n") + 1])


def refuse_other_settings(path: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    """Raise ValueError naming what differs between the run that a rows file is of and this one."""
    was, wanted = before.get("analysis") or {}, now["analysis"]
    differing = [key for key in wanted if was.get(key) != wanted[key]]
    if before.get("seed") != now["seed"]:
        differing.append("seed")
    if differing:
        told = "; ".join(f"{key} was {was.get(key, before.get(key))!r}" for key in differing)
        raise ValueError(f"{path} holds rows measured otherwise ({told}): give the same settings, or another --out")
