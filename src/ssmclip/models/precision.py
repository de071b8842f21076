"""The arithmetic of a model that is evaluated: float32, bfloat16, or whichever is faster on the device.

In bfloat16 the weights and all that passes between layers are bfloat16; decays, states of scans and sums inside kernels
stay float32, and so do the scale and the bias of a CLIP's logits, which are exponents and no layer's weights.
Embeddings, logits and all that is computed from them are float32 whatever the network's arithmetic is.
"""

from __future__ import annotations

import torch
from torch import nn

from ssmclip.models.towers import LOGITS
from ssmclip.registry import UnknownName
from ssmclip.rows.precision import AUTO, BFLOAT16, FLOAT32, PRECISIONS

__all__ = ["convert", "has_bfloat16", "resolve"]


def resolve(precision: str, device: str | torch.device = "cpu") -> str:
    """Return "float32" or "bfloat16": the given precision, for "auto" bfloat16 where the device multiplies it natively.

    Raises UnknownName for any other.
    """
    if precision not in PRECISIONS:
        raise UnknownName("precision", precision, PRECISIONS)
    if precision == AUTO:
        return BFLOAT16 if has_bfloat16(torch.device(device)) else FLOAT32
    return precision


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions that multiply bfloat16, without which it is slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


def convert(network: nn.Module, precision: str) -> nn.Module:
    """Return the network itself, its weights in a precision that `resolve` returned; for float32 as they are."""
    if precision == FLOAT32:
        return network
    of_logits = [getattr(network, name, None) for name in LOGITS]
    kept = [(parameter, parameter.data) for parameter in of_logits if parameter is not None]
    network.to(getattr(torch, precision))
    for parameter, value in kept:
        parameter.data = value
    return network
