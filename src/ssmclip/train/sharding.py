"""Gather the full states of a model and optimiser, also if FSDP has sharded them over processes."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint import state_dict as whole
from torch.distributed.tensor import DTensor

from ssmclip.train.build import is_sharded

_WHOLE = whole.StateDictOptions(full_state_dict=True, cpu_offload=True)
_SCALARS = ("logit_scale", "logit_bias")


def prepare_scalars(model: nn.Module) -> nn.Module:
    """Give the logit scale and bias one dimension of 1, as FSDP cannot shard zero-dimensional parameters."""
    for name in _SCALARS:
        value = getattr(model, name, None)
        if value is not None:
            setattr(model, name, nn.Parameter(value.detach().reshape(1)))
    return model


def gathered(value: torch.Tensor) -> torch.Tensor:
    """Return the full tensor of one that may be sharded over processes (collective in that case)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def model_state(accelerator: Accelerator, model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the state_dict of the unwrapped model (under FSDP: in the main process; collective)."""
    if not is_sharded(accelerator):
        return accelerator.unwrap_model(model).state_dict()
    state = whole.get_model_state_dict(model, options=_WHOLE)
    return {name: value.reshape(()) if name in _SCALARS else value for name, value in state.items()}


def optimiser_state(accelerator: Accelerator, model: nn.Module, optimiser: Any) -> dict[str, Any]:
    """Return the optimiser's state (under FSDP: by parameter name, in the main process; collective)."""
    if not is_sharded(accelerator):
        return optimiser.state_dict()
    return whole.get_optimizer_state_dict(model, optimiser.optimizer, options=_WHOLE)


def load_optimiser(accelerator: Accelerator, model: nn.Module, optimiser: Any, state: dict[str, Any]) -> None:
    """Load what `optimiser_state` returned."""
    if not is_sharded(accelerator):
        optimiser.load_state_dict(state)
    else:
        whole.set_optimizer_state_dict(model, optimiser.optimizer, state, options=_WHOLE)
