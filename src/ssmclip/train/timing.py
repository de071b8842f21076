"""Measure where the time of training steps goes: in waiting for data, and in the slowest step or process."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class StepTimes:
    """The seconds of this process's steps since they were last read. What runs between `ended` and `begin` is left out.

    clock: returns seconds.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._begin = clock()
        self._steps: list[float] = []
        self._wait = 0.0

    def begin(self) -> None:
        """Begin a step now."""
        self._begin = self._clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Count what runs inside as waiting for the step's batch."""
        begin = self._clock()
        yield
        self._wait += self._clock() - begin

    def ended(self) -> None:
        """End the step."""
        self._steps.append(self._clock() - self._begin)

    def read(self, gather: Callable[[Tensor], Tensor], device: torch.device) -> dict[str, float]:
        """Return the times of the steps since the last call, over all processes, which call this at the same steps.

        step_s, data_wait_s: means over steps and processes of a step's seconds, and of those spent waiting for data;
        slowest_step_s: the longest step of any process; slowest_data_wait_s: the mean wait of the process that waits
        longest. Processes wait for each other in every step, so one that reads slowly lengthens all their steps and
        shows in slowest_data_wait_s alone. A GPU works behind the process, which catches up when numbers are written:
        there the means are right, and slowest_step_s is the step that had to catch up.
        gather: concatenates tensors of all processes along the first dimension. Raises ValueError without a step.
        """
        if not self._steps:
            raise ValueError("the times of no step can be read: end a step first")
        count = len(self._steps)
        own = [sum(self._steps) / count, self._wait / count, max(self._steps)]
        self._steps, self._wait = [], 0.0
        step, wait, longest = gather(torch.tensor([own], device=device)).cpu().T
        return {
            "step_s": float(step.mean()),
            "slowest_step_s": float(longest.max()),
            "data_wait_s": float(wait.mean()),
            "slowest_data_wait_s": float(wait.max()),
        }
