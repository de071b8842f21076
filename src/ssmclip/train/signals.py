"""Signals that ask a run to stop: noted when they come, agreed on by all processes, answered after a whole step."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

# Ctrl-C; the end that schedulers ask for; the warning that they can be made to send some time before it.
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")

_AGAIN_S = 0.5  # an interrupt so soon after the first is the same one, from the terminal and from a launcher


class Stopped(KeyboardInterrupt):
    """A run was stopped by a signal after a whole step, and has a checkpoint of that step.

    signal: its number; step: finished steps; checkpoint: the folder to resume from; seconds: from the signal until it
    was saved, None where another process had the signal. It is a KeyboardInterrupt so that a program that trains one
    model after another ends too.
    """

    seconds: float | None = None

    def __init__(self, number: int, step: int, checkpoint: Path):
        super().__init__(f"{signal.Signals(number).name} after step {step}; saved {checkpoint}")
        self.signal, self.step, self.checkpoint = number, step, checkpoint


class Signals:
    """A context in which the signals of NAMES are noted in `number` (0: none came) instead of ending the process.

    A second interrupt raises KeyboardInterrupt at once. Signals that this process ignores, as `nohup` and background
    jobs do, stay ignored. Outside the main thread, where Python takes no handlers, nothing changes. A Stopped that
    leaves the context is given the seconds since the first signal.
    """

    def __init__(self, announce: bool = True):
        self.number = 0
        self._announce = announce
        self._noted: float | None = None  # when the first signal came
        self._interrupted: float | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                handler = signal.getsignal(number)
                if handler not in (signal.SIG_IGN, None):  # None: installed by other than Python, cannot be put back
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Stopped) and self._noted is not None:
            error.seconds = time.monotonic() - self._noted
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._interrupted is not None:
            if time.monotonic() - self._interrupted > _AGAIN_S:
                raise KeyboardInterrupt
            return
        if number == signal.SIGINT:
            self._interrupted = time.monotonic()
        if not self.number and self._announce:
            again = "; Ctrl-C again ends at once, unsaved" if number == signal.SIGINT else ""
            # Not print: the signal may have come in the middle of one.
            os.write(2, f"\n{signal.Signals(number).name}: saving after this step{again}\n".encode())
        if not self.number:
            self.number, self._noted = number, time.monotonic()


class Agreement:
    """Decides with all processes at which step a signal that some of them had stops them all.

    On a CPU they agree at once. Elsewhere the answer to a step's question is read `LAG` steps later, when it has
    long arrived: nothing waits for the device.
    """

    LAG = 2

    def __init__(self, accelerator: Accelerator):
        self._accelerator = accelerator
        self._pending: deque[_Arriving] = deque()

    def settle(self, number: int) -> int:
        """Return the number of a signal that stops every process after this step, 0 for none. Collective."""
        if self._accelerator.num_processes == 1:
            return number
        device = self._accelerator.device
        largest = self._accelerator.gather(torch.full((1,), number, device=device)).max()
        if device.type == "cpu":
            return int(largest)
        self._pending.append(_Arriving(largest))
        return self._pending.popleft().value() if len(self._pending) > self.LAG else 0


class _Arriving:
    """A number on its way from a CUDA device."""

    def __init__(self, number: Tensor):
        self._host = torch.empty((), dtype=number.dtype, pin_memory=True).copy_(number, non_blocking=True)
        self._copied = torch.cuda.Event()
        self._copied.record()

    def value(self) -> int:
        self._copied.synchronize()
        return int(self._host)
