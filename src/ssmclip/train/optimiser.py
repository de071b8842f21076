"""AdamW: which parameters have weight decay, and the learning rate at every step."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ssmclip.config import OptimiserConfig, ScheduleConfig

# State-space parameters by the last part of their name, in every published layout: A_log(s) sets the time constants and
# D the skip; decay would pull every time constant towards one value. Biases of any shape, dt's too, go by name.
_NEVER_DECAYED = re.compile(r"^(A_logs?|Ds?|logit_scale|logit_bias)$|bias")

# timm's towers call theirs blocks, open_clip's own resblocks.
_IMAGE_BLOCK = re.compile(r"visual\..*blocks\.")
_NOT_TEXT = re.compile(r"visual\.|logit_|(text\.)?(text_projection|proj\b)")


def decays(rule: str, name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies to a parameter, by its full name and number of dimensions.

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


def in_text_tower(name: str) -> bool:
    """Return whether a parameter of a CLIP, by full name, belongs to the text tower, excluding its projection."""
    return not _NOT_TEXT.match(name)


def freeze_text_tower(model: nn.Module) -> None:
    """Freeze the text tower, except its projection."""
    for name, parameter in model.named_parameters():
        if in_text_tower(name):
            parameter.requires_grad_(False)


def parameter_groups(parameters: Iterable[tuple[str, nn.Parameter]], config: OptimiserConfig) -> list[dict[str, Any]]:
    """Return an optimiser's groups, each with one learning rate and decay; frozen parameters are in none.

    A group's `lr_scale`, which `set_lr` reads, is its learning rate over the others'.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in parameters:
        if parameter.requires_grad:
            kind = lr_scale(name, config), decays(config.decay_rule, name, parameter)
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": members, "weight_decay": config.weight_decay if decay else 0.0, "lr_scale": scale}
        for (scale, decay), members in groups.items()
    ]


def lr_scale(name: str, config: OptimiserConfig) -> float:
    """Return a parameter's learning rate relative to `config.lr`, by its full name in a CLIP."""
    if in_text_tower(name):
        return config.text_lr_scale
    return config.block_lr_scale if _IMAGE_BLOCK.match(name) else 1.0


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.AdamW:
    """Return AdamW over the trainable parameters; fused (one pass over memory per step) if the device supports it."""
    fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
    groups = parameter_groups(model.named_parameters(), config)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def lr_schedule(steps: int, config: ScheduleConfig, peak: float) -> np.ndarray:
    """Return the learning rates, float64 (steps,): linear from start_lr to peak, then half a cosine to end_lr.

    Bit-identical to mamba-clip's: the warm-up's last step already has the peak, and so has the first step after it; the
    cosine's last step is one short of end_lr.
    """
    warmup = np.linspace(config.start_lr, peak, config.warmup_steps)
    rest = np.arange(steps - config.warmup_steps)
    cosine = config.end_lr + 0.5 * (peak - config.end_lr) * (1 + np.cos(np.pi * rest / max(len(rest), 1)))
    return np.concatenate([warmup, cosine])


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = float(lr) * group.get("lr_scale", 1.0)
