"""The measured cost of models at each image size and text length, as rows.

where: IMAGE (224, or "224x448"), or TOKENS of a text, and ATTENTION if it is not the default.
metrics: parameters (of the tower) · macs (see `count_macs`; extra: the parts) · long_sequence_ratio (MambaOut's r, of
towers that attend; extra: threshold, side) · inference_memory_mb, training_memory_mb (peak for a batch) · latency_ms
(batch of 1; extra: quartiles) · images_per_s, texts_per_s, training_images_per_s, training_texts_per_s · energy_j,
training_energy_j (of an image or text; where the machine does not tell, the extra of the throughput says why) · fits (0
where a measurement did not end; extra: why, timed_out, memory_limit in bytes).
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssmclip.analyze.cost.macs import count_macs, sequence_criterion
from ssmclip.analyze.cost.measure import Job, memory_limit, to_json
from ssmclip.models import names, towers
from ssmclip.rows import Result, append_rows, read_rows, write_rows
from ssmclip.rows.condition import ATTENTION, IMAGE, TOKENS, Where, text

__all__ = ["in_fresh_process", "sweep"]

log = logging.getLogger(__name__)

TASK = "efficiency"
COUNT, COUNTED = "count", ("macs", "parameters", "long_sequence_ratio")
GROWN = 1.25  # free memory, since it did not suffice: what is free is never twice the same
Measure = Callable[[Job], dict[str, Any]]


def sweep(
    models: dict[str, str],
    sizes: Sequence[int | tuple[int, int]],
    lengths: Sequence[int],
    out: str | Path,
    *,
    settings: dict[str, Any] | None = None,
    modes: Sequence[str] = ("inference", "training"),
    run: dict[str, Any] | None = None,
    measure: Measure | None = None,
) -> list[Result]:
    """Measure every model at every size, and its text tower at every length; append the rows to `out` as they come.

    models: label -> name; settings: fields of `Job` other than model, size and training; modes: none to count only;
    run: the file's first line; measure: runs a job, in a fresh process unless given.
    What `out` already has, of counts and of each mode, is not measured again. What does not fit the machine's memory,
    or the model, becomes a row that says why. It is tried again, and the new rows take that one's place, where time ran
    out, where the model could not take it (known in seconds), and where a good deal more memory is free than then; on
    a GPU always.
    Raises UnknownName and ValueError before anything is measured; ValueError too where `out` has measurements of
    another batch size, precision or device.
    """
    out, settings = Path(out), settings or {}
    sizes = [towers.as_size(size) for size in sizes]
    if bad := [length for length in lengths if length < 1]:
        raise ValueError(f"text lengths must be at least 1 token (got {bad[0]})")
    if unknown := set(modes) - {"inference", "training"}:
        raise ValueError(f"unknown modes {sorted(unknown)}; known: inference, training")
    texts = {label: bool(lengths) and names.reads_text(name) for label, name in models.items()}
    known = [row for row in read_rows(out)[1] if row.task == TASK] if out.exists() else []
    if modes:
        _require_same_settings(known, Job("", **settings), out)
    done = {_key(row) for row in known if not _may_fit_now(row, settings)}
    jobs = [
        (label, fields)
        for label, name in models.items()
        for fields in [
            *({"model": name, "image_size": size} for size in sizes),
            *({"model": name, "length": length} for length in lengths if texts[label]),
        ]
    ]
    for label, fields in tqdm(jobs, desc="sizes", disable=None):
        job = Job(**fields, **settings)
        missing = [part for part in (COUNT, *modes) if (label, _place(where_of(job)), part) not in done]
        for rows in _parts(label, job, missing, measure or in_fresh_process):
            _add(out, rows, run)
    return read_rows(out)[1]


def _key(row: Result) -> tuple[str, tuple, str]:
    """Return the model, where, and what the row came with: COUNT, or a mode."""
    if row.metric == "fits":
        part = row.extra.get("mode", COUNT)
    elif row.metric.startswith("training_"):
        part = "training"
    else:
        part = COUNT if row.metric in COUNTED else "inference"
    return row.model, _place(row.where), part


def _place(where: Where) -> tuple:
    return tuple(sorted(where.items()))


def _require_same_settings(known: Sequence[Result], job: Job, out: Path) -> None:
    for row in known:
        for name, value in _settings(job).items():
            if name == "attention" or (name == "batch_size" and row.metric == "latency_ms"):
                continue  # `where` has it; always 1
            if row.extra.get(name, value) != value:
                raise ValueError(
                    f"{out} contains rows with {name} {row.extra[name]} instead of {value}: give another --out"
                )


def _settings(job: Job) -> dict[str, Any]:
    """Return the settings that a measured row records in `extra`."""
    return {name: getattr(job, name) for name in ("batch_size", "device", "precision", "attention")}


def _may_fit_now(row: Result, settings: dict[str, Any]) -> bool:
    """Return whether a row says that something did not fit which may fit now.

    A size beyond a CPU's memory takes minutes to fail, so only more memory is a reason to try again.
    """
    if row.metric != "fits":
        return False
    if "mode" not in row.extra or row.extra.get("timed_out"):
        return True
    limit, grown = memory_limit(Job("", **settings)), 1 if settings.get("memory_limit") else GROWN
    return limit is None or limit > grown * (row.extra.get("memory_limit") or 0)


def _add(out: Path, rows: Sequence[Result], run: dict[str, Any] | None) -> None:
    """Append a part's rows, replacing the row that says it did not fit before."""
    keys = {_key(row) for row in rows}
    head, known = read_rows(out) if out.exists() else ({}, [])
    kept = [row for row in known if not (row.task == TASK and row.metric == "fits" and _key(row) in keys)]
    if len(kept) < len(known):
        write_rows(out, [*kept, *rows], head)
    else:
        append_rows(out, rows, run)


def where_of(job: Job) -> dict[str, int | str]:
    """Return what a job varies, as the keys of a row.

    >>> where_of(Job("m", image_size=(224, 448))), where_of(Job("m", length=77, attention="plain"))
    ({'image': '224x448'}, {'tokens': 77, 'attention': 'plain'})
    """
    if job.length is not None:
        where: dict[str, int | str] = {TOKENS: job.length}
    else:
        height, width = job.image_size
        where = {IMAGE: height if height == width else f"{height}x{width}"}
    return where if job.attention == "fused" else where | {ATTENTION: job.attention}


def in_fresh_process(job: Job, timeout: float | None = None) -> dict[str, Any]:
    """Run `measure(job)` in a new interpreter; return {"failed": why} if it was killed, as when memory runs out."""
    try:
        done = subprocess.run(
            [sys.executable, "-m", "ssmclip.analyze.cost.measure"],
            input=to_json(job),
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired:
        return {"failed": f"took more than {timeout:g} s", "timed_out": True}
    if done.returncode < 0:
        return {"failed": f"killed by signal {-done.returncode}: most likely out of memory"}
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return {"failed": last[:300]}
    return json.loads(done.stdout.splitlines()[-1])


def _parts(label: str, job: Job, parts: Sequence[str], measure: Measure) -> Iterator[list[Result]]:
    """Yield the rows of each part, COUNT or a mode."""
    where, kind = where_of(job), "text" if job.length is not None else "image"

    def row(metric: str, value: float, n: int | None = None, **extra: Any) -> Result:
        return Result(label, TASK, metric, value, where=where, n=n, extra=extra)

    try:
        counted = _counted(job, kind, row) if parts else []
    except ValueError as error:  # a size that this model cannot take; the others may
        if COUNT in parts:
            log.warning("%s, %s: %s", label, text(where), error)
            yield [row("fits", 0.0, why=str(error))]
        return
    for part in parts:
        if part == COUNT:
            yield counted
            continue
        training = part == "training"
        limited = replace(job, training=training, memory_limit=memory_limit(job))
        found = measure(limited)
        if "failed" in found:
            log.warning("%s, %s, %s: %s", label, text(where), part, found["failed"])
            limits = {"timed_out": found.get("timed_out", False), "memory_limit": limited.memory_limit}
            yield [row("fits", 0.0, mode=part, why=found["failed"], **limits, **_settings(job))]
        else:
            yield _measured(job, kind, found, row, training)


def _counted(job: Job, kind: str, row: Callable[..., Result]) -> list[Result]:
    """Return the rows that need no measuring."""
    size = job.image_size or names.own_size(job.model)
    count = count_macs(job.model, size, text_length=job.length)
    parts = getattr(count, kind)
    rows = [row("macs", float(parts.total), parts={name: getattr(parts, name) for name in count.parts})]
    rows.append(row("parameters", float(getattr(count, f"{kind}_parameters"))))
    for tower in sequence_criterion(job.model, size, text_length=job.length):
        if tower["tower"] == kind:
            rows.append(row("long_sequence_ratio", tower["ratio"], **{k: tower[k] for k in ("threshold", "side")}))
    return rows


def _measured(job: Job, kind: str, found: dict[str, Any], row: Callable[..., Result], training: bool) -> list[Result]:
    before, batch = ("training_" if training else ""), found["batch"]
    how = _settings(job)
    memory = "training_memory_mb" if training else "inference_memory_mb"
    rates = {"low": job.batch_size / batch["high"], "high": job.batch_size / batch["low"]}
    if "no_energy" in found:
        rates["no_energy"] = found["no_energy"]
    rows = [
        row(memory, found["memory_mb"], what=found["memory_is"], **how),
        row(f"{before}{kind}s_per_s", job.batch_size / batch["median"], batch["n"], **rates, **how),
    ]
    if "single" in found:
        single = found["single"]
        spread = {"low": 1e3 * single["low"], "high": 1e3 * single["high"]}
        rows.append(row("latency_ms", 1e3 * single["median"], single["n"], **spread, **{**how, "batch_size": 1}))
    if "energy_j" in found:
        rows.append(row(f"{before}energy_j", found["energy_j"] / job.batch_size, batch["n"], **how))
    return rows
