"""Report the progress of a run: rows, trackers, a progress bar; and watch for non-finite numbers."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ssmclip.config import TrainConfig
from ssmclip.data.pairs.samples import draw_seed
from ssmclip.rows import Result, append_rows, describe_run, read_rows, write_rows
from ssmclip.rows.condition import SOURCE, STEP
from ssmclip.rows.resume import drop_half_a_line
from ssmclip.train.trackers import TrackedRun, Trackers, tracker_names


class NonFinite(ValueError):
    """A non-finite loss or gradient. The message has the step, the batch's keys and the last checkpoint."""


@dataclass(frozen=True)
class Measured:
    """One step's numbers, still on the device. `step` counts finished steps, from 1."""

    step: int
    loss: Tensor
    grad_norm: Tensor
    keys: list[str]
    skipped: bool  # the gradient scaler found an overflow and left the weights alone


class Watch:
    """A buffer of each step's loss and gradient norm, read all at once so that the CPU rarely waits for the GPU."""

    def __init__(self):
        self._pending: list[Measured] = []

    def add(self, measured: Measured) -> None:
        self._pending.append(measured)

    def look(self, average=lambda values: values) -> tuple[float, float] | None:
        """Return (loss, gradient norm) of the newest step, averaged over processes by `average`; None without a step.

        Raises NonFinite at the first step with non-finite numbers. A step that the gradient scaler skipped for its
        gradients passes.
        """
        if not self._pending:
            return None
        pending, self._pending = self._pending, []
        numbers = average(torch.stack([torch.stack([m.loss.float(), m.grad_norm.float()]) for m in pending])).tolist()
        for measured, (loss, norm) in zip(pending, numbers, strict=True):
            if not (_finite(loss) and (_finite(norm) or measured.skipped)):
                keys = ", ".join(measured.keys)
                raise NonFinite(f"step {measured.step}: loss {loss}, gradient norm {norm}; keys of the batch: {keys}")
        return numbers[-1][0], numbers[-1][1]


class Repeats:
    """Counts pairs that are in their batch already: where a pass ends within it, or the data have fewer pairs.

    count: how many there were, over all processes and steps looked at.
    """

    def __init__(self, count: int = 0):
        self.count = count
        self._pending: list[Tensor] = []

    def add(self, keys: list[str]) -> None:
        """Note the keys of this process's part of a step's batch."""
        self._pending.append(torch.tensor([draw_seed(key) for key in keys]))

    def look(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> int:
        """Add the steps noted since the last look to `count`, and return it.

        gather: concatenates tensors of all processes, which call this at the same steps.
        """
        if self._pending:
            own, self._pending = torch.stack(self._pending), []  # (steps, batch of a process)
            parts = gather(own.to(device)).cpu().unflatten(0, (-1, len(own)))  # (processes, steps, batch)
            keys = parts.transpose(0, 1).flatten(1).sort(dim=1).values
            self.count += int((keys[:, 1:] == keys[:, :-1]).sum())
        return self.count


def _finite(value: float) -> bool:
    return abs(value) < float("inf")  # False for NaN too


class Log:
    """The main process's rows.jsonl, trackers and progress bar; silent in any other process.

    Rows have the name of the run's folder, like those of `ssmclip evaluate`: two runs of one model are two curves.
    """

    def __init__(self, out: Path, config: TrainConfig, start: int, device: str, speaks: bool):
        self._out, self._config, self._speaks = out, config, speaks
        self._name = out.resolve().name
        if not speaks:
            return
        truncate_rows(out / "rows.jsonl", start)
        _rename_rows(out / "rows.jsonl", self._name)
        if not (out / "rows.jsonl").exists():
            append_rows(out / "rows.jsonl", [], describe_run(config.seed, device, model=config.model.label))
        self._bar = tqdm(
            total=config.steps,
            initial=start,
            unit="step",
            disable=not config.logging.progress,
            file=sys.stderr,
            mininterval=0.2 if sys.stderr.isatty() else 30,  # a log file wants a line now and then
        )
        self._trackers = Trackers(tracker_names(config.logging), TrackedRun(out, start, config), self.say)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self._since, self._steps = time.perf_counter(), 0

    def stepped(self) -> None:
        if self._speaks:
            self._steps += 1
            self._bar.update(1)

    def numbers(self, step: int, numbers: dict[str, float], device: torch.device) -> None:
        """Write a training step's numbers, with memory and the speed since the last call."""
        if not self._speaks:
            return
        seconds = time.perf_counter() - self._since
        speed = {"images_per_s": self._steps * self._config.batch_size / seconds, "memory_mib": peak_memory_mib(device)}
        numbers = {**numbers, **speed}
        self.rows(step, [Result(self._name, "train", k, float(v), where={STEP: step}) for k, v in numbers.items()])
        shown = {
            "images/s": "images_per_s",
            "loss": "loss",
            "|g|": "grad_norm",
            "scale": "logit_scale",
            "MiB": "memory_mib",
        }
        postfix = {name: f"{numbers[key]:.4g}" for name, key in shown.items() if key in numbers}
        self._bar.set_postfix(postfix, refresh=False)
        self._restart_clock()

    def counts(self, step: int, metric: str, by_source: Mapping[str, float]) -> None:
        """Write a count of each source of the data, as rows that differ in their source."""
        if self._speaks:
            rows = [Result(self._name, "train", metric, n, where={STEP: step, SOURCE: s}) for s, n in by_source.items()]
            self.rows(step, rows)

    def rows(self, step: int, rows: Iterable[Result]) -> None:
        """Write rows that have their step in `where`, under the run's name."""
        rows = [replace(row, model=self._name) for row in rows]
        append_rows(self._out / "rows.jsonl", rows)
        self._trackers.log(rows, step)

    def pause(self) -> _Pause:
        """Exclude what runs inside from the training speed."""
        return _Pause(self)

    def say(self, text: str) -> None:
        if self._speaks:
            self._bar.write(text, file=sys.stderr)

    def close(self, hurry: bool = False) -> None:
        """End the bar and the trackers; in a hurry, hardly waiting for slow ones."""
        if self._speaks:
            self._bar.close()
            self._trackers.close(hurry)


class _Pause:
    def __init__(self, log: Log):
        self._log = log

    def __enter__(self) -> None:
        self._from = time.perf_counter()

    def __exit__(self, *_) -> None:
        if self._log._speaks:
            self._log._since += time.perf_counter() - self._from


def truncate_rows(path: Path, step: int) -> None:
    """Remove rows of steps after `step`, and an incomplete last line; do nothing without a file."""
    if not path.exists():
        return
    drop_half_a_line(path)
    head, rows = read_rows(path)
    write_rows(path, [row for row in rows if row.where.get(STEP, 0) <= step], head)


def _rename_rows(path: Path, name: str) -> None:
    """Rename the rows of a run started when rows had the model's name, or in a folder of another name."""
    head, rows = read_rows(path) if path.exists() else ({}, [])
    if any(row.model != name for row in rows):
        write_rows(path, [replace(row, model=name) for row in rows], head)


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory used so far, of the GPU or of this process (0 if the system does not report it)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)  # bytes there, KiB elsewhere
