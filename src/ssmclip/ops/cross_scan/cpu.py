"""All scans in one pass over the map, on the CPU: no sequence is built, the sum is taken as the rows are read.

The kernels are those of the selective scan; a direction is a group that shares x and y with the others. With a
`delta_weight`, delta is as many maps as directions and is never there as a whole: it is made for some batch elements at
a time, in memory that is used again, and made again for the gradient.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmclip.ops.cross_scan import plain
from ssmclip.ops.selective_scan.cpu import second_gradient
from ssmclip.ops.selective_scan.launch import Problem, launch, saved_shape, whole_channels

DELTA_BYTES = 4 * 2**20  # of delta at a time: the cache of a core or two

_INPUTS = "Tensor x, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? delta_bias, Tensor? delta_weight"
_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define(f"cross_selective_scan({_INPUTS}, bool delta_softplus, bool save) -> (Tensor y, Tensor saved)")
_library.define(
    f"cross_selective_scan_backward(Tensor dy, {_INPUTS}, Tensor saved, bool delta_softplus) -> "
    "(Tensor dx, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dbias, Tensor dweight)"
)


def cross_selective_scan(x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, delta_weight=None):
    """See `ssmclip.ops.cross_selective_scan`."""
    state = torch.promote_types(x.dtype, torch.float32)
    inputs = [
        t if t is None or t.dtype == state else t.to(state) for t in (x, delta, A, B, C, D, delta_bias, delta_weight)
    ]
    dim = x.shape[-1]
    # Rows of the map are read as whole registers; where nothing is computed, operations are counted as defined.
    if missing := -dim % whole_channels() if x.device.type != "meta" else 0:
        last, before_last = (0, missing), (0, 0, 0, missing)
        of_delta = last if delta_weight is None else None
        pads = [last, of_delta, before_last, None, None, last, last, before_last]
        inputs = [t if t is None or p is None else F.pad(t, p) for t, p in zip(inputs, pads, strict=True)]
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, _ = torch.ops.ssmclip.cross_selective_scan(*inputs, delta_softplus, save)
    y = y if y.shape[-1] == dim else y[..., :dim]
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _problem(x: Tensor, A: Tensor, delta_softplus: bool) -> Problem:
    batch, height, width, dim = x.shape
    return Problem(batch, A.shape[0], dim, height * width, A.shape[2], delta_softplus, (height, width))


def _parts(x: Tensor, delta_weight: Tensor | None, at_least: int) -> Iterator[tuple[int, int]]:
    """First and end of the batch elements whose delta is there at the same time: all where it is given."""
    batch, height, width, dim = x.shape
    each = 0 if delta_weight is None else delta_weight.shape[0] * height * width * dim * x.element_size()
    step = batch if each == 0 else max(at_least, DELTA_BYTES // each)
    return ((first, min(first + step, batch)) for first in range(0, batch, max(step, 1)))


def _memory(x: Tensor, weight: Tensor, parts: list[tuple[int, int]]) -> Tensor:
    """For the longest of the parts: (direction, batch * height * width, dim)."""
    most = max((end - first for first, end in parts), default=0)
    return x.new_empty(weight.shape[0], most * x.shape[1] * x.shape[2], x.shape[-1])


def _rank_first(weight: Tensor | None) -> Tensor | None:
    """(directions, dim, rank) as (directions, rank, dim): products as narrow as the rank are several times faster."""
    return None if weight is None else weight.transpose(1, 2).contiguous()


def _project(delta: Tensor, weight: Tensor | None, memory: Tensor | None) -> Tensor:
    """(batch, direction, height, width, rank) times (direction, rank, dim), in the memory given."""
    if weight is None:
        return delta
    for low_rank, matrix, rows in zip(delta.unbind(1), weight, memory, strict=True):
        low_rank = low_rank.reshape(-1, weight.shape[1])
        torch.mm(low_rank, matrix, out=rows[: len(low_rank)])
    return _as_map(memory, delta)


def _as_map(memory: Tensor, delta: Tensor) -> Tensor:
    batch, _, height, width, _ = delta.shape
    return memory[:, : batch * height * width].unflatten(1, (batch, height, width)).transpose(0, 1)


def _rows(x: Tensor) -> Tensor:
    """The same map with channels contiguous and one stride for all positions; copied only where it is not so."""
    rows_follow = x.stride(-3) == x.shape[-2] * x.stride(-2) or x.shape[-3] == 1
    if rows_follow and (x.stride(-1) == 1 or x.shape[-1] == 1):
        return x
    return x.clone(memory_format=torch.contiguous_format)  # contiguous() leaves a map of one column any stride


# Strides over (batch, group, channel, position, state), as the kernels want them.


def _shared(x: Tensor):
    """(batch, height, width, dim), the same for all directions."""
    return x, (x.stride(0), 0, 1, x.stride(2), 0)


def _directed(x: Tensor):
    """(batch, direction, height, width, dim)."""
    return x, (x.stride(0), x.stride(1), 1, x.stride(3), 0)


def _per_state(x: Tensor):
    """(batch, direction, height, width, state)."""
    return x, (x.stride(0), x.stride(1), 0, x.stride(3), 1)


def _parameter(x: Tensor):
    """(direction, dim) or (direction, dim, state)."""
    return x, (0, x.stride(0), x.stride(1), 0, x.stride(2) if x.ndim == 3 else 0)


def _inputs(x, delta, A, B, C, D, delta_bias):
    tensors = {
        "U": _shared(_rows(x)),
        "DELTA": _directed(_rows(delta)),
        "A": _parameter(A),
        "B": _per_state(_rows(B)),
        "C": _per_state(_rows(C)),
    }
    if D is not None:
        tensors["D"] = _parameter(D)
    if delta_bias is not None:
        tensors["BIAS"] = _parameter(delta_bias)
    return tensors


def _saved(x: Tensor, dim: int):
    b, k, n, c = x.stride()
    return x, (b, dim * c, c, k, n)


def _new_outputs(x, A, save):
    batch, height, width, dim = x.shape
    saved = saved_shape(batch, A.shape[0] * dim, height * width, A.shape[2]) if save else (0,)
    return x.new_empty(x.shape), x.new_empty(saved)


@torch.library.impl(_library, "cross_selective_scan", "CPU")
def _forward(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, save):
    y, saved = _new_outputs(x, A, save)
    x = _rows(x)
    parts = list(_parts(x, delta_weight, torch.get_num_threads()))
    memory, weight = None, _rank_first(delta_weight)
    if weight is not None:
        memory = _memory(x, weight, parts)
    for first, end in parts:
        own = slice(first, end)
        step = _project(delta[own], weight, memory)
        tensors = {**_inputs(x[own], step, A, B[own], C[own], D, delta_bias), "Y": _shared(y[own])}
        if save:
            tensors["SAVED"] = _saved(saved[own], x.shape[-1])
        launch("forward", _problem(x[own], A, delta_softplus), tensors)
    return y, saved


@torch.library.register_fake("ssmclip::cross_selective_scan", lib=_library)
def _forward_fake(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, save):
    return _new_outputs(x, A, save)


def _new_gradients(x, delta, *rest):
    *rest, weight = (x.new_empty((0,) if t is None else t.shape) for t in rest)
    if weight.ndim == 1:
        ddelta = x.new_empty(delta.shape)
    else:  # in the order in which the products write them
        ddelta = x.new_empty(delta.transpose(0, 1).shape).transpose(0, 1)
        weight = weight.new_empty(weight.transpose(1, 2).shape).transpose(1, 2)
    return x.new_empty(x.shape), ddelta, *rest, weight


@torch.library.impl(_library, "cross_selective_scan_backward", "CPU")
def _backward(dy, x, delta, A, B, C, D, delta_bias, delta_weight, saved, delta_softplus):
    if saved.numel() == 0:
        saved = _forward(x, delta, A, B, C, D, delta_bias, delta_weight, delta_softplus, True)[1]
    dx, ddelta, dA, dB, dC, dD, dbias, dweight = _new_gradients(x, delta, A, B, C, D, delta_bias, delta_weight)
    dweight.zero_()
    x, dy = _rows(x), _rows(dy)
    # How the batch is cut decides the order of sums: not by the number of threads.
    parts = list(_parts(x, delta_weight, 4))
    memory, memory_back, weight = None, None, _rank_first(delta_weight)
    if weight is not None:
        memory, memory_back = (_memory(x, weight, parts) for _ in range(2))
    make = torch.zeros if x.numel() == 0 else torch.empty
    # One sum per batch element or slice, added up afterwards in a fixed order.
    each_a = make(len(x), *A.shape, dtype=x.dtype)
    each_d, each_bias = make(2, len(x), *A.shape[:2], dtype=x.dtype)
    for first, end in parts:
        own = slice(first, end)
        problem = _problem(x[own], A, delta_softplus)
        each_b, each_c = make(2, problem.slices, *B[own].shape, dtype=x.dtype)
        step = _project(delta[own], weight, memory)
        dstep = ddelta[own] if weight is None else _as_map(memory_back, delta[own])
        tensors = _inputs(x[own], step, A, B[own], C[own], D, delta_bias)
        tensors |= {"SAVED": _saved(saved[own], x.shape[-1]), "DY": _shared(dy[own]), "DU": _shared(dx[own])}
        tensors["DDELTA"] = _directed(dstep)
        for name, t in {"DB": each_b, "DC": each_c}.items():
            s, b, g, _, position, n = t.stride()
            tensors[name] = t, (b, g, s, position, n)
        for name, t in {"DA": each_a[own], "DD": each_d[own], "DBIAS": each_bias[own]}.items():
            tensors[name] = t, (t.stride(0), t.stride(1), t.stride(2), 0, 1)
        launch("backward", problem, tensors)
        torch.sum(each_b, 0, out=dB[own])
        torch.sum(each_c, 0, out=dC[own])
        if weight is not None:
            _project_back(dstep, delta[own], weight, ddelta[own], dweight.transpose(1, 2))
    torch.sum(each_a, 0, out=dA)
    if D is not None:
        torch.sum(each_d, 0, out=dD)
    if delta_bias is not None:
        torch.sum(each_bias, 0, out=dbias)
    return dx, ddelta, dA, dB, dC, dD, dbias, dweight


def _project_back(dstep, delta, weight, ddelta, dweight) -> None:
    """The gradient of `_project`: written to ddelta, added to dweight."""
    for k, matrix in enumerate(weight):
        above, low_rank = dstep[:, k].flatten(0, 2), delta[:, k].reshape(-1, weight.shape[1])
        torch.mm(above, matrix.T, out=ddelta[:, k].flatten(0, 2))
        dweight[k].addmm_(low_rank.T, above)


@torch.library.register_fake("ssmclip::cross_selective_scan_backward", lib=_library)
def _backward_fake(dy, x, delta, A, B, C, D, delta_bias, delta_weight, saved, delta_softplus):
    return _new_gradients(x, delta, A, B, C, D, delta_bias, delta_weight)


def register_derivatives(name: str, library: torch.library.Library) -> None:
    """Autograd for the operator `name` and its gradient `name`_backward, which take what those above take, or the same
    without `delta_weight`.
    """

    def remember(ctx, inputs, output):
        *tensors, ctx.delta_softplus, _ = inputs
        saved = output[1]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)

    def gradient(ctx, dy, _):
        *inputs, saved = ctx.saved_tensors
        if dy is None:
            return (None,) * (len(inputs) + 2)
        grads = getattr(torch.ops.ssmclip, f"{name}_backward")(dy, *inputs, saved, ctx.delta_softplus)
        return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None

    def remember_gradient(ctx, inputs, output):
        *tensors, ctx.delta_softplus = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def gradient_of_gradient(ctx, *grads_of_grads):
        """The derivative of what `chunked` gives as the gradient; in its turn differentiable."""
        dy, *inputs, _ = ctx.saved_tensors
        chunked = plain.composed("chunked")

        def scan(x, delta, A, B, C, D, delta_bias, delta_weight=None):
            return (chunked(x, delta, A, B, C, D, delta_bias, ctx.delta_softplus, delta_weight),)

        return *second_gradient(scan, [dy], inputs, grads_of_grads, ctx), None, None

    register = torch.library.register_autograd
    register(f"ssmclip::{name}", gradient, setup_context=remember, lib=library)
    register(f"ssmclip::{name}_backward", gradient_of_gradient, setup_context=remember_gradient, lib=library)


register_derivatives("cross_selective_scan", _library)
