"""Grouped convolutions whose second derivative is four convolutions more.

PyTorch's own goes through a loop over the groups, which takes an eighth of a Hessian-vector product of VMamba. Every
derivative of a bilinear map is that map again: with y = conv(x, w), dx and dw its gradient for dy,

    <ddx, dx> + <ddw, dw> = <dy, conv(ddx, w) + conv(x, ddw)>
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CONVOLUTIONS = (torch.conv1d, torch.conv2d, torch.conv3d)


@contextmanager
def grouped_convolutions_by_convolutions() -> Iterator[None]:
    """Replace grouped convolutions by `convolution` inside the context, with the same values and derivatives."""
    with _Mode():
        yield


class _Mode(TorchFunctionMode):
    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: dict | None = None):
        if function in CONVOLUTIONS:
            return convolution(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


def convolution(own: Callable, x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1) -> Tensor:
    """Return own(x, weight, ...) of PyTorch's convolutions, differentiable repeatedly without loops over groups."""
    sides = weight.ndim - 2
    if groups == 1 or isinstance(padding, str) or x.ndim != weight.ndim:
        return own(x, weight, bias, stride, padding, dilation, groups)
    each = [[n] * sides if isinstance(n, int) else list(n) * (sides // len(n)) for n in (stride, padding, dilation)]
    y = _Convolution.apply(x, weight, (*each, False, [0] * sides, groups))
    return y if bias is None else y + bias.view(-1, *[1] * sides)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, how):
        ctx.how = how
        ctx.save_for_backward(x, weight)
        return torch.ops.aten.convolution(x, weight, None, *how)

    @staticmethod
    def backward(ctx, dy):
        wanted = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], False]
        return *_Gradient.apply(dy, *ctx.saved_tensors, ctx.how, wanted), None


class _Gradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, dy, x, weight, how, wanted):
        ctx.how = how
        ctx.save_for_backward(dy, x, weight)
        ctx.set_materialize_grads(False)
        return torch.ops.aten.convolution_backward(dy, x, weight, None, *how, wanted)[:2]

    @staticmethod
    def backward(ctx, ddx, ddweight):
        dy, x, weight = ctx.saved_tensors
        to_dy = to_x = to_weight = None
        if ddx is not None:
            to_dy = _Convolution.apply(ddx, weight, ctx.how)
            to_weight = _Gradient.apply(dy, ddx, weight, ctx.how, [False, True, False])[1]
        if ddweight is not None:
            other = _Convolution.apply(x, ddweight, ctx.how)
            to_dy = other if to_dy is None else to_dy + other
            to_x = _Gradient.apply(dy, x, ddweight, ctx.how, [True, False, False])[0]
        return to_dy, to_x, to_weight, None, None
