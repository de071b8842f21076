"""The convolution on a GPU, in Triton: any strides, any of the types, sums in float32 (float64 for float64).

So far run in Triton's interpreter only, on a CPU; see `ssmclip.ops.selective_scan.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmclip.ops.causal_conv import cpu
from ssmclip.ops.selective_scan.cpu import like
from ssmclip.ops.selective_scan.triton import power_of_two, state_type

_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define("causal_conv1d_triton(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define(
    "causal_conv1d_triton_backward(Tensor dy, Tensor x, Tensor weight, Tensor? bias) -> "
    "(Tensor dx, Tensor dweight, Tensor dbias)"
)


def causal_conv1d(x, weight, bias=None):
    """See `ssmclip.ops.causal_conv1d`."""
    return torch.ops.ssmclip.causal_conv1d_triton(x, weight, bias)


def _constants(x: Tensor, taps: int) -> dict:
    import triton.language as tl

    return {
        "TYPE": tl.float64 if x.dtype == torch.float64 else tl.float32,
        "TAPS": taps,
        "CHANNELS": min(32, power_of_two(x.shape[1])),
        "STEPS": min(64, power_of_two(x.shape[2])),
        "num_warps": 4,
        "enable_fp_fusion": True,
    }


def _parts(x: Tensor, constants: dict) -> tuple[int, int]:
    """(batch elements x chunks, blocks of channels): a program for each of both."""
    batch, dim, length = x.shape
    return batch * -(-length // constants["STEPS"]), -(-dim // constants["CHANNELS"])


@torch.library.impl(_library, "causal_conv1d_triton", "CUDA")
@torch.library.impl(_library, "causal_conv1d_triton", "CPU")  # Triton's interpreter
def _forward(x, weight, bias):
    y = like(x)
    if x.numel() == 0:
        return y
    from ssmclip.ops.causal_conv import triton_kernels

    constants = _constants(x, weight.shape[1])
    parts, blocks = _parts(x, constants)
    bias = bias if bias is None else bias.contiguous()
    with torch.cuda.device_of(x):
        triton_kernels.forward[(parts * blocks,)](
            *(x, weight.contiguous(), bias, y, *x.shape[1:], *x.stride(), *y.stride()), **constants
        )
    return y


@torch.library.register_fake("ssmclip::causal_conv1d_triton", lib=_library)
def _forward_fake(x, weight, bias):
    return like(x)


def _new_gradients(x, weight, bias):
    return like(x), weight.new_empty(weight.shape), x.new_empty(0) if bias is None else bias.new_empty(bias.shape)


@torch.library.impl(_library, "causal_conv1d_triton_backward", "CUDA")
@torch.library.impl(_library, "causal_conv1d_triton_backward", "CPU")
def _backward(dy, x, weight, bias):
    dx, dweight, dbias = _new_gradients(x, weight, bias)
    if x.numel() == 0:
        return dx, dweight.zero_(), dbias.zero_()
    from ssmclip.ops.causal_conv import triton_kernels

    constants = _constants(x, weight.shape[1])
    parts, blocks = _parts(x, constants)
    each_weight = x.new_empty((parts, *weight.shape), dtype=state_type(x))
    each_bias = x.new_empty((parts, len(weight)), dtype=state_type(x))
    with torch.cuda.device_of(x):
        triton_kernels.backward[(parts * blocks,)](
            *(dy, x, weight.contiguous(), dx, each_weight, each_bias, *x.shape[1:]),
            *(*dy.stride(), *x.stride(), *dx.stride()),
            **constants,
        )
    dweight.copy_(each_weight.sum(0))
    if bias is not None:
        dbias.copy_(each_bias.sum(0))
    return dx, dweight, dbias


@torch.library.register_fake("ssmclip::causal_conv1d_triton_backward", lib=_library)
def _backward_fake(dy, x, weight, bias):
    return _new_gradients(x, weight, bias)


cpu.register_derivatives("causal_conv1d_triton", _library)
