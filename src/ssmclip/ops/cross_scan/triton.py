"""The scans of a map in all directions on a GPU, in Triton: read in place, no sequence is built.

The kernels are those of the selective scan, a direction is a group, and a position's place on the map is computed where
it is read or written. Each direction writes its own result, in x's type, and they are added up afterwards: four
times as many programs as if the directions took turns, and the same sums every time.

So far run in Triton's interpreter only, on a CPU; see `ssmclip.ops.selective_scan.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmclip.ops.cross_scan import cpu
from ssmclip.ops.selective_scan import triton as scan
from ssmclip.ops.selective_scan.triton import Scans, Strided

_INPUTS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias"
_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define(f"cross_selective_scan_triton({_INPUTS}, bool delta_softplus, bool save) -> (Tensor y, Tensor saved)")
_library.define(
    f"cross_selective_scan_triton_backward(Tensor dy, {_INPUTS}, Tensor saved, bool delta_softplus) -> "
    "(Tensor dx, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dbias)"
)


def cross_selective_scan(x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, delta_weight=None):
    """See `ssmclip.ops.cross_selective_scan`."""
    if delta_weight is not None:
        delta = torch.einsum("bkhwr,kdr->bkhwd", delta, delta_weight.to(delta.dtype))
    inputs = x, delta, A, B, C, D, delta_bias
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    return torch.ops.ssmclip.cross_selective_scan_triton(*inputs, delta_softplus, save)[0]


def _scans(x: Tensor, A: Tensor, delta_softplus: bool) -> Scans:
    batch, rows, columns, dim = x.shape
    return Scans(batch, A.shape[0], dim, rows * columns, A.shape[2], delta_softplus, (rows, columns))


def _rows(x: Tensor) -> Tensor:
    """The same maps with one stride for all positions; copied only where they have none."""
    if x.shape[-3] == 1 or x.stride(-3) == x.shape[-2] * x.stride(-2):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a map of one column any stride


# Strides as the kernels want them.


def _shared(x: Tensor) -> Strided:
    """(batch, rows, columns, dim), the same for all directions."""
    x = _rows(x)
    return x, (x.stride(0), 0, x.stride(3), x.stride(2))


def _directed(x: Tensor) -> Strided:
    """(batch, direction, rows, columns, dim)"""
    x = _rows(x)
    return x, (x.stride(0), x.stride(1), x.stride(4), x.stride(3))


def _per_state(x: Tensor) -> Strided:
    """(batch, direction, rows, columns, state)"""
    x = _rows(x)
    return x, (x.stride(0), x.stride(1), x.stride(3), x.stride(4))


NO_GATE: Strided = None, (0, 0, 0, 0)


def _new_outputs(x, A, save):
    """Memory for (y, saved)."""
    batch, rows, columns, dim = x.shape
    return x.new_empty(x.shape), scan.new_states(x, batch, A.shape[0] * dim, rows * columns, A.shape[2], save)


@torch.library.impl(_library, "cross_selective_scan_triton", "CUDA")
@torch.library.impl(_library, "cross_selective_scan_triton", "CPU")  # Triton's interpreter
def _forward(x, delta, A, B, C, D, delta_bias, delta_softplus, save):
    y, saved = _new_outputs(x, A, save)
    if x.numel() == 0:
        return y, saved
    each = x.new_empty(len(x), len(A), *x.shape[1:])
    inputs = _shared(x), _directed(delta), A, _per_state(B), _per_state(C), D, NO_GATE, delta_bias
    scan.forward(_scans(x, A, delta_softplus), *inputs, _directed(each), saved.new_empty(0), saved)
    return torch.sum(each, 1, out=y), saved


@torch.library.register_fake("ssmclip::cross_selective_scan_triton", lib=_library)
def _forward_fake(x, delta, A, B, C, D, delta_bias, delta_softplus, save):
    return _new_outputs(x, A, save)


def _new_gradients(*inputs):
    """Memory for the gradients of the inputs, in their types; without elements for those that are not there."""
    return tuple(inputs[0].new_empty(0) if x is None else x.new_empty(x.shape) for x in inputs)


@torch.library.impl(_library, "cross_selective_scan_triton_backward", "CUDA")
@torch.library.impl(_library, "cross_selective_scan_triton_backward", "CPU")
def _backward(dy, x, delta, A, B, C, D, delta_bias, saved, delta_softplus):
    gradients = _new_gradients(x, delta, A, B, C, D, delta_bias)
    if x.numel() == 0:
        return tuple(t.zero_() for t in gradients)
    if saved.numel() == 0:
        saved = _forward(x, delta, A, B, C, D, delta_bias, delta_softplus, True)[1]
    dx, ddelta, dA, dB, dC, dD, dbias = gradients
    each = x.new_empty(len(x), len(A), *x.shape[1:])
    each_a, each_b, each_c, each_d, each_bias = scan.backward(
        _scans(x, A, delta_softplus),
        *(_shared(dy), _shared(x), _directed(delta), _per_state(B), _per_state(C), NO_GATE),
        dlast=None,
        parameters=(A, D, delta_bias),
        saved=saved,
        results=(_directed(each), _directed(ddelta), NO_GATE),
    )
    torch.sum(each, 1, out=dx)
    for gradient, each_of_it in ((dA, each_a), (dB, each_b), (dC, each_c), (dD, each_d), (dbias, each_bias)):
        if gradient.numel():
            gradient.copy_(each_of_it.view(gradient.shape))
    return gradients


@torch.library.register_fake("ssmclip::cross_selective_scan_triton_backward", lib=_library)
def _backward_fake(dy, x, delta, A, B, C, D, delta_bias, saved, delta_softplus):
    return _new_gradients(x, delta, A, B, C, D, delta_bias)


cpu.register_derivatives("cross_selective_scan_triton", _library)
