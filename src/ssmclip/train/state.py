"""Capture and restore a process's random state, as tensors and plain containers that load safely."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state(device: torch.device) -> dict[str, Any]:
    """Return the state of Python's, NumPy's and torch's global generators, and the device's."""
    kind, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (kind, keys.tolist(), position, has_gauss, cached),
        "torch": device_rng(device),
    }


def set_rng_state(device: torch.device, state: dict[str, Any]) -> None:
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    set_device_rng(device, state["torch"])


def device_rng(device: torch.device) -> list[torch.Tensor]:
    """Return the states of torch's generators for a model on `device`: the CPU's, then the accelerator's if any."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return states


def set_device_rng(device: torch.device, states: list[torch.Tensor]) -> None:
    torch.set_rng_state(states[0].cpu())
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1].cpu(), device)


@contextmanager
def same_rng_after(device: torch.device) -> Iterator[None]:
    """Restore the generators' state after what runs inside."""
    state = rng_state(device)
    try:
        yield
    finally:
        set_rng_state(device, state)
