"""AdamW: which parameters decay, and the learning rate at every step."""

from __future__ import annotations

import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn

from ssmclip.config import OptimiserConfig, ScheduleConfig

# State-space parameters by the last part of their name, in every published layout: A_log(s) sets the time constants and
# D the skip; decay would pull every time constant towards one value. Biases of any shape, dt's too, go by name.
_NEVER_DECAYED = re.compile(r"^(A_logs?|Ds?|logit_scale|logit_bias)$|bias")


def decays(rule: str, name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter, by its full name and number of dimensions.

    "original", as mamba-clip's training script: not to anything of fewer than two dimensions, nor where the full name
    contains "bias", "ln" or "bn". That decays A_log(s), which is two-dimensional.
    "ssm": not to anything of fewer than two dimensions (norms, biases, D, logit scale), nor A_log(s), D(s) and biases
    (dt's included) of any shape.
    """
    if parameter.ndim < 2:
        return False
    if rule == "original":
        return not any(part in name for part in ("bias", "ln", "bn"))
    return not _NEVER_DECAYED.search(name.rsplit(".", 1)[-1])


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]], weight_decay: float, rule: str
) -> list[dict[str, object]]:
    """Two groups for an optimiser, with and without decay; frozen parameters are in neither."""
    with_decay, without = [], []
    for name, parameter in parameters:
        if parameter.requires_grad:
            (with_decay if decays(rule, name, parameter) else without).append(parameter)
    return [{"params": with_decay, "weight_decay": weight_decay}, {"params": without, "weight_decay": 0.0}]


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """AdamW over the trainable parameters; fused (one pass over memory a step) where the device has that."""
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = parameter_groups(model.named_parameters(), config.weight_decay, config.decay_rule)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def lr_schedule(steps: int, config: ScheduleConfig, peak: float) -> np.ndarray:
    """The learning rate at every step: float64 (steps,). Linear from start_lr to peak, then half a cosine to end_lr.

    mamba-clip's, to the bit: the warm-up's last step already has the peak, and so has the first step after it; the
    cosine's last step is one short of end_lr.
    """
    warmup = np.linspace(config.start_lr, peak, config.warmup_steps)
    rest = np.arange(steps - config.warmup_steps)
    cosine = config.end_lr + 0.5 * (peak - config.end_lr) * (1 + np.cos(np.pi * rest / max(len(rest), 1)))
    return np.concatenate([warmup, cosine])


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = float(lr)
