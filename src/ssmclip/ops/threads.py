"""Numbered tasks on as many threads as PyTorch uses. The work must release the GIL."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

_pools: dict[int, ThreadPoolExecutor] = {}

# A fork keeps the pool and loses its threads.
os.register_at_fork(after_in_child=_pools.clear)


def run_tasks(work: Callable[[int, int], None], count: int, parallel: bool) -> None:
    """Call work(first, last) until the tasks 0 .. count - 1 are done, each exactly once.

    Which thread does which task is left to chance: what a task computes must not depend on it.
    parallel: False keeps to the calling thread. Waking a thread costs some 50 us, on a busy machine milliseconds.
    """
    threads = min(torch.get_num_threads(), count) if parallel else 1
    if threads <= 1:
        work(0, count)
        return
    if threads not in _pools:
        _pools[threads] = ThreadPoolExecutor(threads - 1, thread_name_prefix="ssmclip-ops")
    share = max(1, count // (4 * threads))
    starts = itertools.count(0, share)  # next() of it is atomic

    def shares() -> None:
        while (first := next(starts)) < count:
            work(first, min(first + share, count))

    others = [_pools[threads].submit(shares) for _ in range(threads - 1)]
    shares()
    for other in others:
        other.result()
