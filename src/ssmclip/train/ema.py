"""A moving average of a model's weights and buffers."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class Ema:
    """`model`: a copy whose every floating-point weight and buffer is the average; others (counters) are copied.

    Buffers matter: an average that leaves them out keeps batch norm's first statistics for ever.
    """

    def __init__(self, model: nn.Module):
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """average = decay * average + (1 - decay) * model."""
        averaged, online = [], []
        new = model.state_dict()
        for name, old in self.model.state_dict().items():
            if old.is_floating_point():
                averaged.append(old)
                online.append(new[name])
            else:
                old.copy_(new[name])
        torch._foreach_lerp_(averaged, online, 1 - decay)


def ema_decay(step: int, steps: int, start: float, schedule: str) -> float:
    """The decay at `step` (from 0) of a run of `steps`, on one of EmaConfig's schedules.

    constant: `start`. warmup: 1 - (1 + step)^(-2/3) until that reaches `start`, as timm's ModelEmaV3; the first step's
    weights are taken whole. cosine: from `start` to 1 along half a cosine, as mamba-clip's.
    """
    if schedule == "constant":
        return start
    if schedule == "warmup":
        return min(start, 1 - (1 + step) ** (-2 / 3))
    return 1 + 0.5 * (start - 1) * (1 + math.cos(math.pi * step / steps))
