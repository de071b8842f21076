"""Checkpoint folders that are written atomically, and the run folder that contains them.

    RUN/config.json                       the TrainConfig
    RUN/.lock                             held by the process that trains
    RUN/open_clip_config.json             the model
    RUN/rows.jsonl, RUN/tensorboard/      measurements
    RUN/checkpoints/step_00000100/        open_clip_config.json, open_clip_model.safetensors, state.pt
    RUN/checkpoints/last, best            text files that name a folder

A checkpoint is written next to its final name, flushed to the disk if the file system can do that, then renamed: a
killed process or a full disk never damages earlier checkpoints.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from ssmclip.config import TrainConfig, changed_fields, from_dict, to_dict
from ssmclip.files import PARTIAL, flush, locked, parse_json, whole
from ssmclip.models import CheckpointError
from ssmclip.models.files.weights import first_line
from ssmclip.registry import UnknownName
from ssmclip.rows import read_rows

_STEP = re.compile(r"step_(\d{8,})")
# What every training state has, and its types; of each process, and of the best validation if there was one.
_STATE = {"step": int, "ranks": list, "optimiser": dict, "scaler": dict | None, "online": dict | None}
_STATE |= {"best": dict | None, "skips": int}
_RANK = {"rng": dict, "cursor": dict | None}
_BEST = {"step": int, "value": float}
_ADVICE = "remove its folder to resume from the previous checkpoint"
# Groups, and beginnings of settings, without influence on what is learnt.
_HARMLESS = ("logging.", "validation.", "checkpoint.", "data.cache_", "data.retries")


@contextmanager
def run_folder(out: Path, config: TrainConfig, resume: bool) -> Iterator[None]:
    """Create the run folder, or check that it belongs to this run, and lock it against other processes until the end.

    Raises PermissionError when it cannot be written to; FileExistsError when it has a run and `resume` is false, or
    when another process trains in it; FileNotFoundError when it has no run and `resume` is true; ValueError when it
    has a run of another config, naming the fields that differ (those of logging, validation and checkpoint may).
    """
    try:
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise PermissionError(f"cannot write to {out} ({error.strerror}): choose another --out") from error
    with locked(out / ".lock", f"another process is training in {out}: wait for it, or choose another --out"):
        _prepare(out, config, resume)
        yield


def _prepare(out: Path, config: TrainConfig, resume: bool) -> None:
    settings, rows = out / "config.json", out / "rows.jsonl"
    if resume:
        if not settings.exists():
            raise FileNotFoundError(f"{out} contains no run to resume: start one without --resume")
        refuse_changes(read_settings(settings), config, out)
        for leftover in (out / "checkpoints").glob(".*"):
            shutil.rmtree(leftover, ignore_errors=True)
        for part in (*out.glob(f"*{PARTIAL}"), *(out / "checkpoints").glob(f"*{PARTIAL}")):
            part.unlink(missing_ok=True)
    elif checkpoints(out) or (rows.exists() and read_rows(rows)[1]):
        raise FileExistsError(f"{out} already contains a run: continue it with --resume, or choose another --out")
    else:  # new, or left by a start that failed
        rows.unlink(missing_ok=True)
    write_text(settings, json.dumps(to_dict(config), indent=2) + "\n")


def refuse_changes(old: TrainConfig, new: TrainConfig, out: Path) -> None:
    """Raise ValueError naming the fields that must not differ between a run and its continuation."""
    changed = {k: v for k, v in changed_fields(old, new).items() if not k.startswith(_HARMLESS)}
    if changed:
        told = "; ".join(f"{name} was {was!r}, now {now!r}" for name, (was, now) in changed.items())
        raise ValueError(
            f"{out}: the run to resume has different settings ({told}). Pass the same settings, or choose another --out"
        )


def checkpoint_folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step_{step:08d}"


def save_checkpoint(
    run: Path, step: int, save_model: Callable[[Path], None], state: dict[str, Any], keep: int, best_step: int | None
) -> Path:
    """Write a checkpoint, point `last` (and `best`) at it, and remove old ones.

    save_model(folder) writes the model's files; `state` becomes state.pt; the newest `keep` and the best one are kept.
    Raises CheckpointError when it cannot be written, as on a full disk; earlier checkpoints are then unchanged.
    """
    final = checkpoint_folder(run, step)
    folder = final.parent
    partial = folder / f".partial-{final.name}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        save_model(partial)
        with (partial / "state.pt").open("wb") as file:
            torch.save(state, file)
        for path in [*partial.iterdir(), partial]:
            flush(path)
        if final.exists():  # left by a run that was killed between these two lines' renames
            shutil.rmtree(final)
        partial.rename(final)
        flush(folder)
        name_checkpoints(run, step, best_step)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        left = last_checkpoint(run)
        raise CheckpointError(
            f"could not save {final}: {error}. "
            + (
                f"The previous checkpoint is complete: {left}; free some space and pass --resume"
                if left
                else "There is no earlier checkpoint"
            )
        ) from error
    best = folder / "best"  # which may be of a metric that is no longer asked for
    named = best.read_text(encoding="utf-8").strip() if best.is_file() else ""
    for old in checkpoints(run)[:-keep]:
        if old.name != named:
            _remove(old)
    return final


def _remove(checkpoint: Path) -> None:
    """Remove an old checkpoint; if one of its files is in use, leave it rather than stop the run."""
    doomed = checkpoint.with_name(f".old-{checkpoint.name}")  # so that a half-deleted one never looks like one
    with suppress(OSError):  # Windows does not rename what is open; the next step tries again
        shutil.rmtree(doomed, ignore_errors=True)  # left by an attempt before
        shutil.rmtree(checkpoint.rename(doomed), ignore_errors=True)


def name_checkpoints(run: Path, step: int, best_step: int | None) -> None:
    """Point `last` (and `best`) at their folders."""
    write_text(run / "checkpoints" / "last", f"step_{step:08d}\n")
    if best_step is not None:
        write_text(run / "checkpoints" / "best", f"step_{best_step:08d}\n")


def checkpoints(run: Path) -> list[Path]:
    """Return the run's checkpoint folders, oldest first."""
    found = [p for p in (run / "checkpoints").glob("step_*") if _STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=lambda p: int(p.name[5:]))


def last_checkpoint(run: Path) -> Path | None:
    return checkpoints(run)[-1] if checkpoints(run) else None


def config_of_run(folder: str | Path) -> TrainConfig | None:
    """Return the settings of a run folder, or of the run a checkpoint folder belongs to; None for any other folder.

    Raises ValueError for a config.json that this package did not write.
    """
    folder = Path(folder)
    for run in (folder, folder.absolute().parents[1] if folder.absolute().parent.name == "checkpoints" else folder):
        if (run / "checkpoints").is_dir() and (run / "config.json").is_file():
            return read_settings(run / "config.json")
    return None


def read_settings(path: Path) -> TrainConfig:
    """Read a run's config.json. Raises ValueError naming the file for one that this package did not write."""
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"they must be an object, got {type(values).__name__}")
        return from_dict(values)
    except (ValueError, UnknownName) as error:
        raise ValueError(f"{path} is not a run's settings ({error}): restore it, or choose another --out") from error


def load_training_state(checkpoint: Path) -> dict[str, Any]:
    """Load a checkpoint's state.pt: tensors and plain containers only, no code.

    Raises CheckpointError, also for a state that lacks an entry, or that is of another step than its folder's name.
    """
    path = checkpoint / "state.pt"
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises another type for every way a file can be broken
        raise CheckpointError(f"cannot read the training state {path} ({first_line(error)}): {_ADVICE}") from error
    if wrong := _wrong_entries(state):
        names = ", ".join(wrong)
        raise CheckpointError(f"{path} is not a training state (missing or invalid: {names}): {_ADVICE}")
    named = _STEP.fullmatch(checkpoint.name)
    if named and state["step"] != int(named[1]):
        raise CheckpointError(
            f"{path} must be of the step in its folder's name, {int(named[1])} (got {state['step']}): {_ADVICE}"
        )
    return state


def _wrong_entries(state: Any) -> list[str]:
    """Return the names of a training state's entries that are missing or of another type."""
    wrong = _misfits(state, _STATE)
    if wrong:
        return wrong
    wrong = [f"ranks[{i}].{name}" for i, rank in enumerate(state["ranks"]) for name in _misfits(rank, _RANK)]
    wrong += [f"best.{name}" for name in (_misfits(state["best"], _BEST) if state["best"] is not None else [])]
    return wrong + ["step"] * (state["step"] < 0) + ["ranks"] * (not state["ranks"])


def _misfits(entries: Any, kinds: dict[str, Any]) -> list[str]:
    held = entries if isinstance(entries, dict) else {}
    return [name for name, kind in kinds.items() if not isinstance(held.get(name, ...), kind)]


@contextmanager
def restoring(checkpoint: Path | None) -> Iterator[None]:
    """Turn what torch raises when a training state does not fit what it is loaded into, into CheckpointError.

    checkpoint: where the state is from; without one, errors pass unchanged.
    """
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        if checkpoint is None or isinstance(error, (CheckpointError, torch.OutOfMemoryError)):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{checkpoint / 'state.pt'} does not fit this run ({reason}): {_ADVICE}") from error


def write_text(path: Path, text: str) -> None:
    """Write a small file atomically."""
    with whole(path, durable=True) as part:
        part.write_text(text, encoding="utf-8")
