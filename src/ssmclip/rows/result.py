"""The format of every measurement: a row. All figures and tables are drawn from rows. Needs no torch.

A rows file is JSON lines. Its first line describes the run that made it, every further line is one Result:

    {"run": {"commit": "...", "versions": {...}, "seed": 0, "device": "cpu", "created": "..."}}
    {"model": "CLIP-VMamba-Nano", "task": "digits", "metric": "top1", "value": 0.97, "where": {"step": 200}, ...}

Files of earlier versions have a text, `condition`, instead of `where` and `against`; they can be read as well.
"""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from ssmclip.files import parse_json, whole
from ssmclip.rows import condition
from ssmclip.rows.condition import Where

PACKAGES = ("ssmclip", "torch", "timm", "open_clip_torch", "numba", "numpy")


@dataclass(frozen=True)
class Result:
    """One measured number.

    model, task, metric: names; value: the number, in the metric's unit (fractions for accuracies and
    recalls); ci_low, ci_high: its 95 % interval, None if there is none; n: the number of observations;
    where: the condition, a mapping of the keys in `condition.KEYS`, such as {"step": 200} or {"level": "0.3"};
    against: the model whose value was subtracted, "" if the value is not a difference;
    extra: anything else a figure needs, JSON-able (per-class values, names, settings; see `payloads`).
    Raises UnknownName or TypeError if `where` is not such a mapping.
    """

    model: str
    task: str
    metric: str
    value: float
    ci_low: float | None = None
    ci_high: float | None = None
    n: int | None = None
    where: Where = field(default_factory=dict)
    against: str = ""
    extra: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        object.__setattr__(self, "where", condition.checked(self.where))

    @property
    def condition(self) -> str:
        """Return `where` and `against` as readable text: "step=200", "minus B", "" if both are empty."""
        return condition.text(self.where, self.against)

    @property
    def plain(self) -> bool:
        """Return whether `where` and `against` are both empty."""
        return not self.where and not self.against

    @property
    def key(self) -> tuple[Any, ...]:
        """Return the row's identity: a later row with the same key replaces it."""
        return self.model, self.task, self.place, self.metric

    @property
    def place(self) -> tuple[Any, ...]:
        """Return `where` and `against` as one hashable value that ignores order."""
        return (*sorted(self.where.items()), self.against)


_NUMBER = (int, float)
_TYPES = {name: str for name in ("model", "task", "metric", "against")} | {
    "value": _NUMBER,
    "ci_low": (*_NUMBER, type(None)),
    "ci_high": (*_NUMBER, type(None)),
    "n": (int, type(None)),
    "where": dict,
    "extra": dict,
}


def describe_run(seed: int | None = None, device: str = "cpu", **more: Any) -> dict[str, Any]:
    """Return the first line of a rows file: commit, versions, seed, device, and `more` (JSON-able)."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "commit": _commit(),
        "versions": versions,
        "seed": seed,
        "device": device,
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        **more,
    }


def write_rows(path: str | Path, rows: Iterable[Result], run: dict[str, Any] | None = None) -> None:
    """Write a rows file atomically."""
    lines = [json.dumps({"run": run or describe_run()}), *(_dumps(row) for row in rows)]
    with whole(path) as part:
        part.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def append_rows(path: str | Path, rows: Iterable[Result], run: dict[str, Any] | None = None) -> None:
    """Add rows to a file; a new file gets its first line."""
    path = Path(path)
    if not path.exists():
        write_rows(path, rows, run)
        return
    with path.open("a", encoding="utf-8") as file:
        file.write("".join(_dumps(row) + "\n" for row in rows))


def read_rows(path: str | Path) -> tuple[dict[str, Any], list[Result]]:
    """Read a rows file as (run, rows). Raises ValueError naming the first line that is not a row."""
    run: dict[str, Any] = {}
    rows = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line)
            if isinstance(record, dict) and "run" in record:
                run = record["run"]
                if not isinstance(run, dict):
                    raise TypeError(f"run must be an object (got {str(run)[:40]!r})")
            else:
                rows.append(_row(record))
        except (ValueError, TypeError, OverflowError) as error:
            raise ValueError(f"{path}, line {number}: not a result row ({error})") from error
    return run, rows


def _row(record: Any) -> Result:
    if not isinstance(record, dict):
        raise TypeError(f"a row must be an object (got {str(record)[:40]!r})")
    if isinstance(was := record.pop("condition", ""), str):  # of an earlier version
        record = dict(zip(("where", "against"), condition.parse(was), strict=True)) | record
    else:
        raise TypeError(f"condition must be text (got {str(was)[:40]!r})")
    if extra := set(record) - set(_TYPES):
        raise ValueError(f"unknown fields {sorted(extra)}")
    if "value" in record and record["value"] is None:
        record["value"] = math.nan
    for name, value in record.items():
        if not isinstance(value, _TYPES[name]):
            raise TypeError(f"{name} is {str(value)[:40]!r}")
    for place in (record.get("where") or {}).values():
        if isinstance(place, int):
            float(place)  # as figures do: raises OverflowError
    numbers = {name: float(record[name]) for name in ("value", "ci_low", "ci_high") if record.get(name) is not None}
    return Result(**record | numbers)


def _dumps(row: Result) -> str:
    record = {key: value for key, value in asdict(row).items() if value is not None}
    record = {key: value for key, value in record.items() if value or key not in ("where", "against", "extra")}
    if isinstance(row.value, float) and not math.isfinite(row.value):
        record["value"] = None  # JSON has no NaN
    return json.dumps(record)


def _commit() -> str:
    try:
        here = Path(__file__).parent
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=here, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass  # not Linux: the platform module's word has to do
    return platform.processor() or platform.machine()
