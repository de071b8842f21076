"""The Numba kernels as PyTorch operators: torch.compile and torch.export keep them whole, autograd goes through them.

The gradient is an operator too. Its own derivative is that of the gradient `chunked` gives, so a Hessian-vector
product through this path is the true one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmclip.ops.selective_scan import chunked
from ssmclip.ops.selective_scan.launch import Problem, launch, saved_shape

INPUTS = "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias"
_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define(
    f"selective_scan({INPUTS}, bool delta_softplus, bool want_last, bool save) -> (Tensor y, Tensor last, Tensor saved)"
)
_library.define(
    f"selective_scan_backward(Tensor dy, Tensor? dlast, {INPUTS}, Tensor saved, bool delta_softplus) -> "
    "(Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor dbias)"
)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """See `ssmclip.ops.selective_scan`. B and C have four dimensions here."""
    state = torch.promote_types(u.dtype, torch.float32)
    inputs = [x if x is None or x.dtype == state else x.to(state) for x in (u, delta, A, B, C, D, z, delta_bias)]
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = torch.ops.ssmclip.selective_scan(*inputs, delta_softplus, return_last_state, save)
    y = y if y.dtype == u.dtype else y.to(u.dtype)
    return (y, last) if return_last_state else y


def _problem(u, A, B, delta_softplus) -> Problem:
    groups = B.shape[1]
    return Problem(u.shape[0], groups, u.shape[1] // groups, u.shape[2], A.shape[1], delta_softplus)


def _sequence(x: Tensor | None, width: int):
    """(batch, dim, length) with its strides over (batch, group, channel, position, state)."""
    if x is None:
        return None
    batch, channel, position = x.stride()
    return x, (batch, width * channel, channel, position, 0)


def _per_state(x: Tensor):
    """(batch, groups, state, length)."""
    batch, group, state, position = x.stride()
    return x, (batch, group, 0, position, state)


def _parameter(x: Tensor | None, width: int):
    """(dim,) or (dim, state)."""
    if x is None:
        return None
    return x, (0, width * x.stride(0), x.stride(0), 0, x.stride(1) if x.ndim == 2 else 0)


def like(x: Tensor) -> Tensor:
    """New memory, channels next to each other if they are so in x."""
    if x.stride(1) == 1 and x.shape[1] > 1:
        return x.new_empty(x.shape[0], x.shape[2], x.shape[1]).transpose(1, 2)
    return x.new_empty(x.shape)


def _saved(x: Tensor, width: int):
    b, k, n, c = x.stride()
    return x, (b, width * c, c, k, n)


def _inputs(problem, u, delta, A, B, C, D, z, delta_bias):
    width = problem.width
    return {
        "U": _sequence(u, width),
        "DELTA": _sequence(delta, width),
        "A": _parameter(A, width),
        "B": _per_state(B),
        "C": _per_state(C),
        "D": _parameter(D, width),
        "Z": _sequence(z, width),
        "BIAS": _parameter(delta_bias, width),
    }


def _new_outputs(u, A, B, want_last, save):
    """Memory for (y, last, saved)."""
    last = u.new_empty((u.shape[0], *A.shape) if want_last else (0,))
    saved = u.new_empty(saved_shape(*u.shape, A.shape[1]) if save else (0,))
    return like(u), last, saved


@torch.library.impl(_library, "selective_scan", "CPU")
def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, want_last, save):
    problem = _problem(u, A, B, delta_softplus)
    y, last, saved = _new_outputs(u, A, B, want_last, save)
    if u.shape[2] == 0:
        last.zero_()
    tensors = _inputs(problem, u, delta, A, B, C, D, z, delta_bias)
    tensors["Y"] = _sequence(y, problem.width)
    if want_last:
        tensors["LAST"] = last, (last.stride(0), problem.width * last.stride(1), last.stride(1), 0, 1)
    if save:
        tensors["SAVED"] = _saved(saved, problem.width)
    launch("forward", problem, tensors)
    return y, last, saved


@torch.library.register_fake("ssmclip::selective_scan", lib=_library)
def _forward_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, want_last, save):
    return _new_outputs(u, A, B, want_last, save)


def _new_gradients(u, delta, A, B, C, D, z, delta_bias):
    """Memory for the gradients of the inputs, without elements for those that are not there."""
    rest = [u.new_empty((0,) if x is None else x.shape) for x in (A, B, C, D)]
    dz = u.new_empty(0) if z is None else like(z)
    return like(u), like(delta), *rest, dz, u.new_empty((0,) if delta_bias is None else delta_bias.shape)


@torch.library.impl(_library, "selective_scan_backward", "CPU")
def _backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus):
    problem = _problem(u, A, B, delta_softplus)
    if saved.numel() == 0:
        saved = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, False, True)[2]
    du, ddelta, dA, dB, dC, dD, dz, dbias = _new_gradients(u, delta, A, B, C, D, z, delta_bias)
    batch, width, slices = problem.batch, problem.width, problem.slices
    make = torch.zeros if u.numel() == 0 else torch.empty
    # One sum per batch element or slice, added up afterwards in a fixed order.
    each_a = make(batch, *A.shape, dtype=u.dtype)
    each_d, each_bias = make(2, batch, len(A), dtype=u.dtype)
    each_b, each_c = make(2, slices, batch, problem.groups, problem.length, problem.states, dtype=u.dtype)
    tensors = _inputs(problem, u, delta, A, B, C, D, z, delta_bias)
    tensors["SAVED"] = _saved(saved, width)
    for name, x in {"DY": dy, "DU": du, "DDELTA": ddelta, "DZ": None if z is None else dz}.items():
        tensors[name] = _sequence(x, width)
    for name, x in {"DA": each_a, "DLAST": None if dlast is None else dlast.contiguous()}.items():
        if x is not None:
            tensors[name] = x, (x.stride(0), width * x.stride(1), x.stride(1), 0, 1)
    for name, x in {"DB": each_b, "DC": each_c}.items():
        part, b, g, position, n = x.stride()
        tensors[name] = x, (b, g, part, position, n)
    for name, x in {"DD": each_d, "DBIAS": each_bias}.items():
        tensors[name] = x, (x.stride(0), width, 1, 0, 0)
    launch("backward", problem, tensors)
    torch.sum(each_a, 0, out=dA)
    dB.copy_(each_b.sum(0).transpose(2, 3))
    dC.copy_(each_c.sum(0).transpose(2, 3))
    if D is not None:
        torch.sum(each_d, 0, out=dD)
    if delta_bias is not None:
        torch.sum(each_bias, 0, out=dbias)
    return du, ddelta, dA, dB, dC, dD, dz, dbias


@torch.library.register_fake("ssmclip::selective_scan_backward", lib=_library)
def _backward_fake(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus):
    return _new_gradients(u, delta, A, B, C, D, z, delta_bias)


def second_gradient(function, upstream, inputs, grads_of_grads, ctx=None):
    """The derivative of the gradient of a function, in the direction grads_of_grads.

    function(*inputs) -> a tuple of outputs; upstream: the gradients of those outputs, None for none.
    ctx: that of the gradient, which keeps the graph for further products with the same Hessian.
    Returns what upstream and inputs receive, one list, None for the None among them.
    """
    again = torch.is_grad_enabled()  # a third derivative is wanted
    graph = None if again else getattr(ctx, "graph", None)
    if graph is None:
        graph = _gradient_graph(function, upstream, inputs, again)
        if ctx is not None and not again:
            if getattr(ctx, "visited", False):
                ctx.graph = graph
            ctx.visited = True
    leaves, grads = graph
    pairs = [(g, gg) for g, gg in zip(grads, grads_of_grads, strict=True) if g is not None and gg is not None]
    pairs = [(g, gg) for g, gg in pairs if g.requires_grad]
    if not pairs:
        return [None] * len(leaves)
    firsts, directions = zip(*pairs, strict=True)
    wanted = [x for x in leaves if x is not None]
    result = iter(
        torch.autograd.grad(firsts, wanted, directions, retain_graph=True, create_graph=again, allow_unused=True)
    )
    return [None if x is None else next(result) for x in leaves]


def _gradient_graph(function, upstream, inputs, again):
    """Upstream and inputs as they stand in the graph, one list, and the gradients of the inputs."""
    with torch.enable_grad():
        # Aliases: an input may itself be a function of another input, and only the direct way counts here.
        def alias(x):
            return None if x is None else (x.view_as(x) if again and x.requires_grad else x.detach().requires_grad_())

        upstream, inputs = [alias(x) for x in upstream], [alias(x) for x in inputs]
        pairs = [(y, dy) for y, dy in zip(function(*inputs), upstream, strict=True) if dy is not None]
        there = [x for x in inputs if x is not None]
        outputs, dys = zip(*pairs, strict=True)
        grads = iter(torch.autograd.grad(outputs, there, dys, create_graph=True, allow_unused=True))
        return [*upstream, *inputs], [None if x is None else next(grads) for x in inputs]


def register_derivatives(name: str, library: torch.library.Library) -> None:
    """Autograd for the operator `name` and its gradient `name`_backward, which take what those above take."""

    def remember(ctx, inputs, output):
        *tensors, ctx.delta_softplus, _, _ = inputs
        saved = output[2]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, saved)

    def gradient(ctx, dy, dlast, _):
        *inputs, saved = ctx.saved_tensors
        if dy is None:
            dy = torch.zeros_like(inputs[0])
        grads = getattr(torch.ops.ssmclip, f"{name}_backward")(dy, dlast, *inputs, saved, ctx.delta_softplus)
        return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None, None

    def remember_gradient(ctx, inputs, output):
        *tensors, ctx.delta_softplus = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)

    def gradient_of_gradient(ctx, *grads_of_grads):
        """The derivative of what `chunked` gives as the gradient; in its turn differentiable."""
        dy, dlast, *inputs, _ = ctx.saved_tensors

        def scan(*inputs):
            return chunked.selective_scan(*inputs, ctx.delta_softplus, True)

        return *second_gradient(scan, [dy, dlast], inputs, grads_of_grads, ctx), None, None

    register = torch.library.register_autograd
    register(f"ssmclip::{name}", gradient, setup_context=remember, lib=library)
    register(f"ssmclip::{name}_backward", gradient_of_gradient, setup_context=remember_gradient, lib=library)


register_derivatives("selective_scan", _library)
