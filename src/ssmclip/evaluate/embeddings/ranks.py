"""Several processes on one task: each takes whole batches in turn, the same as a single process would."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from accelerate import PartialState
from torch import distributed

T = TypeVar("T")


_by_itself: ContextVar[bool] = ContextVar("ssmclip_evaluate_by_itself", default=False)


@contextmanager
def by_itself() -> Iterator[None]:
    """Let this process do a whole task inside the context, even if others were launched with it."""
    token = _by_itself.set(True)
    try:
        yield
    finally:
        _by_itself.reset(token)


def rank() -> tuple[int, int]:
    """Return (this process's number, number of processes); (0, 1) for a single process and inside `by_itself`."""
    if not _by_itself.get() and distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def launched(device: str) -> tuple[int, str]:
    """Join the processes started by `accelerate launch` or torchrun, if any; return this one's number and device.

    device: of each, as asked for; "cuda" becomes each process's own.
    """
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, device
    state = PartialState(cpu=device == "cpu")
    return state.process_index, str(state.device) if device == "cuda" else device


def share(batches: Sequence[T]) -> Sequence[T]:
    """Return this process's batches."""
    number, count = rank()
    return batches[number::count]


def gather(value: Any) -> list[Any]:
    """Return what every process gave, in the order of the processes. Collective."""
    _, count = rank()
    if count == 1:
        return [value]
    values: list[Any] = [None] * count
    distributed.all_gather_object(values, value)
    return values
