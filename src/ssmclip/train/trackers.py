"""Send a run's rows to experiment trackers, through Accelerate: TensorBoard, trackio, W&B, MLflow and others, by name.

They show numbers; rows.jsonl has them. So a thread feeds each tracker, and one that cannot reach its server, or fails
later, is left out after one warning: training neither ends nor waits.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker

from ssmclip.config import LoggingConfig, TrainConfig, to_dict
from ssmclip.registry import UnknownName
from ssmclip.rows import Result, read_rows
from ssmclip.rows.condition import STEP

TENSORBOARD = "tensorboard"
_PACKAGES = ("tensorboard", "aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "trackio", "wandb")
_START_S = 10.0  # that training waits for a tracker to start, as data workers had better not be forked meanwhile
_END_S = 20.0  # that it waits at its end for what is not yet sent
_HURRY_S = 1.0  # the same when a signal or an error ends it
_NOT_IN_TAGS = re.compile(r"[^\w./ -]")  # characters that MLflow refuses


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker needs to know of a run. start: its finished steps; folder: where it is written."""

    folder: Path
    start: int
    config: TrainConfig

    @property
    def name(self) -> str:
        return self.folder.resolve().name

    @property
    def id(self) -> str:
        """Return 16 letters and digits that a resumed run has again, and a new run in the same folder has not."""
        created = read_rows(self.folder / "rows.jsonl")[0].get("created", "")
        return hashlib.sha256(f"{self.folder.resolve()} {created}".encode()).hexdigest()[:16]

    def settings(self) -> dict[str, Any]:
        return dict(_flat(to_dict(self.config)))


def _tensorboard(run: TrackedRun) -> dict[str, Any]:
    return {"run_name": TENSORBOARD, "logging_dir": str(run.folder), "purge_step": run.start + 1}


def _wandb(run: TrackedRun) -> dict[str, Any]:
    project = run.config.logging.project
    return {"run_name": project, "name": run.name, "id": run.id, "resume": "allow", "dir": str(run.folder)}


def _trackio(run: TrackedRun) -> dict[str, Any]:
    resume = "allow" if run.start else "never"
    return {"run_name": run.config.logging.project, "name": run.name, "resume": resume}


def _mlflow(run: TrackedRun) -> dict[str, Any]:
    return {"experiment_name": run.config.logging.project, "run_name": run.name}


# Arguments of Accelerate's classes that name a run and, if they can, continue it. Others get the project alone.
_ARGUMENTS: dict[str, Callable[[TrackedRun], dict[str, Any]]] = {
    TENSORBOARD: _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "mlflow": _mlflow,
}


def tracker_names(logging: LoggingConfig) -> list[str]:
    """Return the names of a run's trackers, each once.

    Raises UnknownName for one that Accelerate does not know, ValueError for one whose package is not installed.
    """
    names = list(dict.fromkeys([*([TENSORBOARD] if logging.tensorboard else []), *logging.trackers]))
    for name in names:
        if name not in LOGGER_TYPE_TO_CLASS:
            raise UnknownName("tracker", name, LOGGER_TYPE_TO_CLASS)
        if name in _PACKAGES and find_spec(name) is None:
            raise ValueError(f"the tracker {name} is not installed: pip install {name}, or leave it out of `logging`")
    return names


def build_tracker(name: str, run: TrackedRun) -> GeneralTracker:
    """Return Accelerate's tracker of a name, not started. Raises what its package raises."""
    kind = LOGGER_TYPE_TO_CLASS[name]
    if name in _ARGUMENTS:
        return kind(**_ARGUMENTS[name](run))
    folder = [str(run.folder)] if kind.requires_logging_directory else []
    return kind(run.config.logging.project, *folder)


class Trackers:
    """The trackers of a run, each in its thread. say: shows a line to the user, from any thread."""

    def __init__(self, names: Sequence[str], run: TrackedRun, say: Callable[[str], None]):
        self._say = say
        self._senders = [_Sender(name, run, say) for name in names]
        for sender in self._senders:
            sender.ready.wait(_START_S)

    def log(self, rows: Iterable[Result], step: int) -> None:
        """Hand over the rows of a step, as TASK/METRIC: value, with what `where` has but the step after a slash."""
        values = {tag(row): float(row.value) for row in rows}
        for sender in self._senders:
            if sender.is_alive():
                sender.queue.put((values, step))

    def close(self, hurry: bool = False) -> None:
        """Wait until everything is sent, but not for long; in a hurry, hardly."""
        for sender in self._senders:
            sender.queue.put(None)
        for sender in self._senders:
            sender.join(_HURRY_S if hurry else _END_S)
            if sender.is_alive():
                self._say(f"warning: the tracker {sender.name} did not take all numbers in time; rows.jsonl has them")


def tag(row: Result) -> str:
    """Return a row's name in trackers.

    >>> tag(Result("tiny", "digits", "top1", 0.5, where={"step": 3, "level": "2"}))
    'digits/top1/2'
    """
    others = [str(value) for key, value in row.where.items() if key != STEP]
    return _NOT_IN_TAGS.sub("_", "/".join([row.task, row.metric, *others]))


class _Sender(Thread):
    """A thread that starts a tracker, logs what comes through `queue` until a None, and finishes the tracker.

    ready: set when the tracker has started, or never will.
    """

    def __init__(self, name: str, run: TrackedRun, say: Callable[[str], None]):
        super().__init__(name=name, daemon=True)
        self.queue: SimpleQueue[tuple[dict[str, float], int] | None] = SimpleQueue()
        self.ready = Event()
        self._run, self._say = run, say
        self.start()

    def run(self) -> None:
        try:
            self._feed(self._begin())
        except (Exception, SystemExit) as error:  # packages raise anything
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self._say(
                f"warning: the tracker {self.name} is left out ({reason}): see that its server can be reached, or "
                "leave it out of `logging`. rows.jsonl has every number"
            )
        finally:
            self.ready.set()

    def _begin(self) -> GeneralTracker:
        tracker = build_tracker(self.name, self._run)
        tracker.start()
        if self.name != TENSORBOARD:  # which would show them as a run of their own
            tracker.store_init_configuration(self._run.settings())
        self.ready.set()
        return tracker

    def _feed(self, tracker: GeneralTracker) -> None:
        while (item := self.queue.get()) is not None:
            values, step = item
            tracker.log(values, step=step)
        tracker.finish()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Yield nested settings as (dotted name, value), values that are neither numbers nor text as text.

    >>> dict(_flat({"steps": 9, "data": {"sizes": [1, 2]}}))
    {'steps': 9, 'data.sizes': '[1, 2]'}
    """
    for name, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value if isinstance(value, int | float | str) else str(value)
