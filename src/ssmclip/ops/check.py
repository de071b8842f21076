"""Check an operator's arguments."""

from __future__ import annotations

import torch
from torch import Tensor

TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_tensor(name: str, tensor: Tensor | None, shape: tuple[int, ...], u: Tensor) -> None:
    """Raise ValueError unless the tensor has this shape, one of `TYPES` (as u) and lies where u lies."""
    if tensor is None:
        return
    if tensor.shape != shape:
        raise ValueError(
            f"{name} must have shape {shape} to match the first input {tuple(u.shape)} (got {tuple(tensor.shape)})"
        )
    if tensor.dtype not in TYPES or u.dtype not in TYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in TYPES)
        raise ValueError(
            f"{name} and the first input must be real floating point ({known}; got {tensor.dtype} and {u.dtype})"
        )
    if tensor.device != u.device:
        raise ValueError(
            f"{name} must be on the device of the first input, {u.device} (got {tensor.device}): move one of them"
        )
