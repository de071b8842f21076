"""Pass tensors to the compiled kernels: the table of addresses, the blocks, the threads. No autograd here."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from ssmclip.ops.memory import want_large_pages
from ssmclip.ops.threads import run_tasks

log = logging.getLogger(__name__)

# Below this many state updates (a softplus counts as three) waking a second thread costs more than it saves.
PARALLEL_FROM = 1_000_000

RESULTS = {"Y", "SAVED", "DU", "DDELTA", "DZ"}  # as large as the inputs


# The sizes given to these two are symbols where torch.compile traces dynamic shapes.


def steps_between_saved_states(states):
    """In positions: fewer cost memory for the saved states, more outgrow the second-level cache."""
    return 32 if states <= 16 else 64


def saved_shape(batch, channels, length, states):
    """(batch, saved states, state, channel)."""
    steps = steps_between_saved_states(states)
    return batch, (length + steps - 1) // steps, states, channels


@torch.compiler.assume_constant_result
def whole_channels() -> int:
    """Return the number that channels must be multiples of to be whole registers, of float32 as of float64."""
    from ssmclip.ops.simd import REGISTER_BYTES

    return max(8, REGISTER_BYTES // 4)


@dataclass(frozen=True)
class Problem:
    """The parameters of a scan, apart from its tensors.

    groups, width (channels of a group), length, states: as in the kernels; batch elements; delta_softplus;
    image: (height, width) of a map that each group reads in another order, the results summed; None for sequences.
    """

    batch: int
    groups: int
    width: int
    length: int
    states: int
    delta_softplus: bool
    image: tuple[int, int] | None = None

    @property
    def steps(self) -> int:
        return steps_between_saved_states(self.states)

    @property
    def slices(self) -> int:
        """Runs of channel blocks that the backward pass keeps apart, each with its own sums for B and C.

        Depends on the shapes alone, so that the result does not depend on the number of threads.
        """
        tasks = self.batch * (1 if self.image else self.groups)
        return max(1, min(-(-self.width // self.block("backward")), -(-8 // max(tasks, 1))))

    def block(self, kernel: str) -> int:
        """Channels scanned together: 24 KiB of state and A forward, 256 KiB of states and decays backward."""
        budget, whole = 3072 if kernel == "forward" else 1024, whole_channels()
        return min(self.width, 192, max(whole, budget // max(self.states, 1) // whole * whole))


@lru_cache(maxsize=64)
def _order(length: int, image: tuple[int, int] | None, directions: int) -> np.ndarray:
    """Which position each step of a sequence is at, a row per direction (see `ssmclip.ops.cross_scan`)."""
    rows = np.arange(length)
    if image is None:
        return rows[None]
    columns = rows.reshape(image).T.ravel()
    return np.stack([rows, columns, rows[::-1], columns[::-1]][:: 4 // directions])


@dataclass(frozen=True)
class _Plan:
    """How a kernel goes over a problem: what all calls of the same shapes share."""

    sizes: np.ndarray
    order: np.ndarray
    tasks: int
    scratch_bytes: int
    parallel: bool


@lru_cache(maxsize=256)
def _plan(kernel: str, problem: Problem, item: int) -> _Plan:
    from ssmclip.ops.selective_scan.kernels import scratch_bytes

    block, merge = problem.block(kernel), problem.image is not None
    slices = -(-problem.width // block) if kernel == "forward" else problem.slices
    shape = problem.groups, problem.width, problem.length, problem.states
    channels = problem.batch * problem.groups * problem.width
    return _Plan(
        sizes=np.array([*shape, block, problem.steps, slices, merge, problem.delta_softplus], np.int64),
        order=_order(problem.length, problem.image, problem.groups),
        tasks=problem.batch * slices * (1 if merge else problem.groups),
        scratch_bytes=scratch_bytes(block, problem.steps, problem.states, item),
        parallel=channels * problem.length * (problem.states + 3 * problem.delta_softplus) >= PARALLEL_FROM,
    )


@lru_cache(maxsize=4)
def _kernel(name: str, dtype: torch.dtype):
    """(the compiled function, a zero of its type, the rows of its table); compiled before it is returned."""
    from ssmclip.ops.selective_scan import kernels

    start = time.perf_counter()
    run = getattr(kernels, name)
    like = np.float64(0) if dtype == torch.float64 else np.float32(0)
    log.info("loading the CPU kernel %s for %s; compiling it takes up to a minute, once per machine", name, dtype)
    nothing = np.zeros(9, np.int64)
    run(np.zeros((len(kernels.VIEWS), 6), np.int64), nothing, nothing[None], np.zeros(0, np.uint8), 0, 0, like)
    log.info("%s is ready after %.1f s", name, time.perf_counter() - start)
    return run, like, kernels.VIEWS


def launch(kernel: str, problem: Problem, tensors: dict[str, tuple[Tensor, tuple[int, ...]] | None]) -> None:
    """Run the kernel "forward" or "backward" over all tasks.

    tensors: by the names in `kernels.VIEWS`, each with its strides in elements over (batch, group, channel, position,
    state). All of the state's type; the kernel writes the results in place.
    """
    if problem.batch * problem.groups * problem.width * problem.length == 0:
        return
    u = tensors["U"][0]
    item = u.element_size()
    run, like, rows = _kernel(kernel, u.dtype)
    plan = _plan(kernel, problem, item)
    table = [0] * (6 * len(rows))
    for name, entry in tensors.items():
        if entry is not None:
            tensor, (batch, group, channel, position, state) = entry
            if name in RESULTS:
                want_large_pages(tensor)
            at = 6 * rows[name]
            table[at : at + 6] = (
                tensor.data_ptr(),
                batch * item,
                group * item,
                channel * item,
                position * item,
                state * item,
            )
    views = np.array(table, np.int64).reshape(-1, 6)

    def work(first: int, last: int) -> None:
        run(views, plan.sizes, plan.order, np.empty(plan.scratch_bytes, np.uint8), first, last, like)

    run_tasks(work, plan.tasks, plan.parallel)
