"""What the networks share: heads, types, and layers inside a block whose weights a fused operator takes.

Quantisation, LoRA, pruning and offloading put another module, a hook or another forward in a layer's place: its
`weight` is then not what the layer computes with, or is no tensor at all. A layer that is PyTorch's own and untouched
gives its weights to the operator; any other is called.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ssmclip import ops

__all__ = ["at_least_float32", "build_head", "causal_conv", "dtype_of", "is_untouched", "linear_and_bias"]


def is_untouched(layer: nn.Module, kind: type[nn.Module]) -> bool:
    """Return whether calling the layer is `kind`'s forward with the layer's own weights, and nothing else."""
    hooks = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    return type(layer) is kind and not any(hooks) and "forward" not in layer.__dict__


def linear_and_bias(layer: nn.Module, x: Float[Tensor, "... i"]) -> tuple[Float[Tensor, "... o"], Tensor | None]:
    """Return a linear layer's product, and the bias that is still to be added: None where it is in the product."""
    if is_untouched(layer, nn.Linear):
        return F.linear(x, layer.weight), layer.bias
    return layer(x), None


def causal_conv(layer: nn.Module, x: Float[Tensor, "b d l"], taps: int) -> Float[Tensor, "b d l"]:
    """Return a depthwise convolution over this position and the taps - 1 before it. layer: one without padding."""
    if is_untouched(layer, nn.Conv1d):
        return ops.causal_conv1d(x, layer.weight[:, 0], layer.bias)
    return layer(F.pad(x, (taps - 1, 0)))


def at_least_float32(x: Tensor) -> Tensor:
    """Return float16 and bfloat16 as float32, and anything wider as it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def build_head(model: nn.Module, features: int, classes: int) -> nn.Module:
    """Return a linear head of the device, type and mode of `model`; an Identity for 0 classes."""
    if classes == 0:
        return nn.Identity().train(model.training)
    weight = next(model.parameters(), torch.empty(0))
    return nn.Linear(features, classes, device=weight.device, dtype=weight.dtype).train(model.training)


def dtype_of(layer: nn.Module, default: torch.dtype) -> torch.dtype:
    """Return the type of a layer's weights, `default` where it has none."""
    weight = getattr(layer, "weight", None)
    if isinstance(weight, Tensor):
        return weight.dtype
    return next((p.dtype for p in layer.parameters() if p.is_floating_point()), default)
