"""A moving average of a model's weights and buffers."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn


class Ema:
    """A moving average. `model`: a copy with averaged floating-point weights and buffers; the others are copied.

    Buffers matter: an average without them would keep batch norm's initial statistics for ever. Parameters that are
    frozen when the average begins are shared with the model.
    """

    def __init__(self, model: nn.Module):
        frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
        shared = {id(parameter): parameter for parameter in frozen.values()}
        self.model = copy.deepcopy(model, shared).eval().requires_grad_(False)
        self._frozen = frozenset(frozen)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """Set average = decay * average + (1 - decay) * model."""
        averaged, online = [], []
        new = model.state_dict()
        for name, old in self.model.state_dict().items():
            if name in self._frozen:
                continue
            if old.is_floating_point():
                averaged.append(old)
                online.append(new[name])
            else:
                old.copy_(new[name])
        torch._foreach_lerp_(averaged, online, 1 - decay)


def ema_decay(step: int, steps: int, start: float, schedule: str) -> float:
    """Return the decay at `step` (from 0) of a run of `steps`, on one of EmaConfig's schedules.

    constant: `start`. warmup: 1 - (1 + step)^(-2/3) until it reaches `start`, as timm's ModelEmaV3; the first step's
    weights are copied. cosine: from `start` to 1 along half a cosine, as in mamba-clip.
    """
    if schedule == "constant":
        return start
    if schedule == "warmup":
        return min(start, 1 - (1 + step) ** (-2 / 3))
    return 1 + 0.5 * (start - 1) * (1 + math.cos(math.pi * step / steps))
