"""The kernels as PyTorch operators, for channels next to each other in memory; everything else is left to `plain`."""

from __future__ import annotations

import torch
from torch import Tensor

from ssmclip.ops.causal_conv import plain
from ssmclip.ops.selective_scan.cpu import second_gradient
from ssmclip.ops.threads import run_tasks

PARALLEL_FROM = 1_000_000  # products, below which waking a second thread costs more than it saves
BLOCK = 256  # channels whose gradients are summed together

_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define("causal_conv1d(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define(
    "causal_conv1d_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)"
)


def causal_conv1d(x, weight, bias=None):
    """See `ssmclip.ops.causal_conv1d`."""
    alike = x.dtype == weight.dtype and (bias is None or bias.dtype == x.dtype)
    if alike and x.dtype in (torch.float32, torch.float64) and x.stride(1) == 1 and x.shape[1] > 1:
        return torch.ops.ssmclip.causal_conv1d(x, weight, bias)
    return plain.causal_conv1d(x, weight, bias)


def _rows(x: Tensor):
    """(memory from x's first element on, elements between batch elements, elements between positions)."""
    batch, dim, length = x.shape
    span = (batch - 1) * x.stride(0) + (length - 1) * x.stride(2) + dim
    return x.as_strided((span,), (1,)).detach().numpy(), x.stride(0), x.stride(2)


def _new(x: Tensor) -> Tensor:
    """(B, L, D)"""
    return x.new_empty(x.shape[0], x.shape[2], x.shape[1])


@torch.library.impl(_library, "causal_conv1d", "CPU")
def _forward(x, weight, bias):
    from ssmclip.ops.causal_conv import kernels

    y = _new(x)
    if x.numel():
        bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
        arrays = *_rows(x), weight.detach().T.contiguous().numpy(), bias.detach().contiguous().numpy(), y.numpy()

        def work(first: int, last: int) -> None:
            kernels.forward(*arrays, first, last)

        run_tasks(work, x.shape[0] * x.shape[2], x.numel() * weight.shape[1] >= PARALLEL_FROM)
    return y.transpose(1, 2)


@torch.library.register_fake("ssmclip::causal_conv1d", lib=_library)
def _forward_fake(x, weight, bias):
    return _new(x).transpose(1, 2)


@torch.library.impl(_library, "causal_conv1d_backward", "CPU")
def _backward(dy, x, weight, bias):
    from ssmclip.ops.causal_conv import kernels

    batch, dim, _ = x.shape
    taps = weight.detach().T.contiguous()
    dx, dtaps, dbias = _new(x), x.new_zeros(batch, *taps.shape), x.new_zeros(batch, dim)
    if x.numel():
        dy = dy if dy.stride(1) == 1 else dy.transpose(1, 2).contiguous().transpose(1, 2)
        arrays = *_rows(x), *_rows(dy), taps.numpy(), dx.numpy(), dtaps.numpy(), dbias.numpy(), BLOCK

        def work(first: int, last: int) -> None:
            kernels.backward(*arrays, first, last)

        run_tasks(work, batch * -(-dim // BLOCK), x.numel() * weight.shape[1] >= PARALLEL_FROM)
    # One sum per batch element, added up in a fixed order.
    dbias = x.new_empty(0) if bias is None else dbias.sum(0)
    return dx.transpose(1, 2), dtaps.sum(0).T.contiguous(), dbias


@torch.library.register_fake("ssmclip::causal_conv1d_backward", lib=_library)
def _backward_fake(dy, x, weight, bias):
    return _new(x).transpose(1, 2), weight.new_empty(weight.shape), x.new_empty((0,) if bias is None else bias.shape)


def register_derivatives(name: str, library: torch.library.Library) -> None:
    """Autograd for the operator `name` and its gradient `name`_backward, which take what those above take."""

    def remember(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def gradient(ctx, dy):
        inputs = ctx.saved_tensors
        if dy is None:
            return None, None, None
        grads = getattr(torch.ops.ssmclip, f"{name}_backward")(dy, *inputs)
        return tuple(None if x is None else g for x, g in zip(inputs, grads, strict=True))

    def gradient_of_gradient(ctx, *grads_of_grads):
        """The derivative of what `plain` gives as the gradient; in its turn differentiable."""
        dy, *inputs = ctx.saved_tensors
        return tuple(second_gradient(lambda *own: (plain.causal_conv1d(*own),), [dy], inputs, grads_of_grads, ctx))

    register = torch.library.register_autograd
    register(f"ssmclip::{name}", gradient, setup_context=remember, lib=library)
    register(f"ssmclip::{name}_backward", gradient_of_gradient, setup_context=remember, lib=library)


register_derivatives("causal_conv1d", _library)
