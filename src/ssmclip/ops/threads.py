"""Run numbered tasks on as many threads as PyTorch uses. The work must release the GIL.

On Linux they are PyTorch's own threads, those of its OpenMP library: they wait for the next task awake, for some
milliseconds, so that a thread of ours would share a core with one that does nothing. Elsewhere, and in a forked child,
where those threads are gone, a pool of Python's.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_Work = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


def _openmp():
    """GOMP_parallel(work, argument, threads, flags) of the OpenMP library in this process, None where there is none."""
    function = getattr(ctypes.CDLL(None), "GOMP_parallel", None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes, function.restype = (_Work, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
    return function


_teams = [_openmp()]  # empty in a forked child
_pools: dict[int, ThreadPoolExecutor] = {}
os.register_at_fork(after_in_child=_teams.clear)
os.register_at_fork(after_in_child=_pools.clear)


def run_tasks(work: Callable[[int, int], None], count: int, parallel: bool) -> None:
    """Call work(first, last) until the tasks 0 .. count - 1 are done, each exactly once.

    Which thread does which task is left to chance: what a task computes must not depend on it.
    parallel: False keeps to the calling thread. Waking a thread costs some 50 us, on a busy machine milliseconds.
    An exception of work is raised here, when all threads are done.
    """
    threads = min(torch.get_num_threads(), count) if parallel else 1
    if threads <= 1:
        work(0, count)
        return
    share = max(1, count // (4 * threads))
    starts = itertools.count(0, share)  # next() of it is atomic

    def shares() -> None:
        while (first := next(starts)) < count:
            work(first, min(first + share, count))

    (_in_a_team if any(_teams) else _in_a_pool)(shares, threads)


def _in_a_team(shares: Callable[[], None], threads: int) -> None:
    """Let OpenMP's threads, including the calling one, each call shares()."""
    errors: list[BaseException] = []

    def called(_) -> None:
        try:
            shares()
        except BaseException as error:  # C has no way to pass it on
            errors.append(error)

    _teams[0](_Work(called), None, threads, 0)
    if errors:
        raise errors[0]


def _in_a_pool(shares: Callable[[], None], threads: int) -> None:
    """Let the calling thread and Python's each call shares()."""
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="ssmclip-ops")
    others = [_pools[threads].submit(shares) for _ in range(threads - 1)]
    try:
        shares()
    finally:
        for other in others:
            other.result()
