"""The chunked form on a CPU: products by BLAS, the rest in one pass (`kernels`), a gradient that recomputes.

Registered as operators: torch.compile and torch.export keep them whole. The gradient's own derivative is that of the
gradient `chunked` gives.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmclip.ops.selective_scan.cpu import second_gradient
from ssmclip.ops.ssd import chunked
from ssmclip.ops.threads import run_tasks

CHUNK = 128  # positions: up to this many no state is needed at all
PARALLEL_FROM = 100_000  # pairs of positions, below which waking a second thread costs more than it saves

_INPUTS = "Tensor x, Tensor step, Tensor A, Tensor B, Tensor C, Tensor? initial"
_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define(f"ssd({_INPUTS}, bool want_last) -> (Tensor y, Tensor last)")
_library.define(
    f"ssd_backward(Tensor dy, Tensor? dlast, {_INPUTS}) -> "
    "(Tensor dx, Tensor dstep, Tensor dA, Tensor dB, Tensor dC, Tensor dinitial)"
)


def _full_precision(function):
    """The function where autocast does not take half the digits of its products."""

    def run(*inputs):
        with torch.autocast("cpu", enabled=False):
            return function(*inputs)

    return run


def ssd(*inputs, **options):
    """See `ssmclip.ops.ssd`."""
    return chunked.around(torch.ops.ssmclip.ssd, *inputs, **options)


class _Chunks:
    """The inputs cut into T chunks of Q positions, and what the forward pass makes of each.

    x: (T, Q, H, P) and, heads first, by_head: (T, H, Q, P); step: (T, H, Q); B, C: (T, G, Q, N);
    scores: (T, G, Q, Q), mix: (T, H, Q, Q), from_start and to_end: (T, H, Q) as in `kernels.forward`.
    """

    def __init__(self, x, step, A, B, C):
        from ssmclip.ops.ssd import kernels

        self.batch, self.length, self.heads, self.width = x.shape
        self.groups = B.shape[2]
        self.count, self.size = chunked.cut(self.length, CHUNK)
        self.x, self.A = self.cut(x), A.contiguous()
        self.by_head = self.x.transpose(1, 2).contiguous()
        self.step = self.cut(step).transpose(1, 2).contiguous()
        self.B, self.C = (self.cut(t).transpose(1, 2).contiguous() for t in (B, C))
        self.scores = self.C @ self.B.mT
        self.mix = x.new_empty(*self.step.shape, self.size)
        self.from_start, self.to_end = torch.empty_like(self.step), torch.empty_like(self.step)
        self.run(kernels.forward, self.heads, self.mix, self.from_start, self.to_end)

    def cut(self, t: Tensor) -> Tensor:
        """(B, L, ...) -> (T, Q, ...). Positions added at the end have steps of no size, which change no state."""
        padding = self.count * self.size - self.length
        if padding:
            t = F.pad(t, (0, 0) * (t.ndim - 2) + (0, padding))
        return t.reshape(-1, self.size, *t.shape[2:])

    def whole(self, t: Tensor) -> Tensor:
        """(T, Q, ...) -> (B, L, ...)"""
        return t.reshape(self.batch, -1, *t.shape[2:])[:, : self.length]

    def by_group(self, t: Tensor) -> Tensor:
        """(T, Q, H, P) -> (T, G, Q, heads of a group x P)"""
        return t.reshape(*t.shape[:2], self.groups, -1).transpose(1, 2)

    def by_position(self, t: Tensor) -> Tensor:
        """The inverse of `by_group`."""
        return t.transpose(1, 2).reshape(*t.shape[:1], self.size, self.heads, self.width)

    def run(self, kernel, tasks_of_a_chunk: int, *others: Tensor) -> None:
        arrays = [t.detach().numpy() for t in (self.step, self.A, self.scores, *others)]

        def work(first: int, last: int) -> None:
            kernel(*arrays, first, last)

        run_tasks(work, len(self.step) * tasks_of_a_chunk, self.mix.numel() >= PARALLEL_FROM)

    def over_chunks(self, t: Tensor) -> Tensor:
        """(T, ...) -> (B, chunks, ...)"""
        return t.unflatten(0, (self.batch, self.count))

    def states(self, initial: Tensor | None) -> tuple[Tensor, Tensor]:
        """States before every chunk, (T, G, heads of a group x P, N), and after the last, (B, H, P, N)."""
        added = self.by_group(self.x * _at_positions(self.to_end)).mT @ self.B
        each = self.over_chunks(added.view(len(added), self.heads, self.width, -1))
        keep = self.over_chunks(self.from_start[:, :, -1, None, None])
        state = torch.zeros_like(each[:, 0]) if initial is None else initial
        before = torch.empty_like(each)
        for k in range(self.count):
            before[:, k] = state
            state = each[:, k] if k == 0 and initial is None else torch.addcmul(each[:, k], keep[:, k], state)
        return before.view(added.shape), state


def _at_positions(t: Tensor) -> Tensor:
    """(T, H, Q) -> (T, Q, H, 1)"""
    return t.transpose(1, 2)[..., None]


def _new_outputs(x, B, want_last):
    """Memory for (y, last)."""
    batch, _, heads, width = x.shape
    return x.new_empty(x.shape), x.new_empty((batch, heads, width, B.shape[3]) if want_last else (0,))


@torch.library.impl(_library, "ssd", "CPU")
@_full_precision
def _forward(x, step, A, B, C, initial, want_last):
    if x.numel() == 0:
        y, last = _new_outputs(x, B, want_last)
        return y, last.zero_() if initial is None or not want_last else last.copy_(initial)
    chunks = _Chunks(x, step, A, B, C)
    y = (chunks.mix @ chunks.by_head).transpose(1, 2)
    last = x.new_empty(0)
    if chunks.count > 1 or want_last or initial is not None:
        before, state = chunks.states(initial)
        inherited = chunks.by_position(chunks.C @ before.mT)
        y = torch.addcmul(y, inherited, _at_positions(chunks.from_start))
        last = state.contiguous() if want_last else last
    return chunks.whole(y).contiguous(), last.clone() if last is initial else last


@torch.library.register_fake("ssmclip::ssd", lib=_library)
def _forward_fake(x, step, A, B, C, initial, want_last):
    return _new_outputs(x, B, want_last)


def _new_gradients(x, step, A, B, C, initial):
    """Memory for the gradients of the inputs, without elements for an initial state that is not there."""
    return *(t.new_empty(t.shape) for t in (x, step, A, B, C)), x.new_empty((0,) if initial is None else initial.shape)


@torch.library.impl(_library, "ssd_backward", "CPU")
@_full_precision
def _backward(dy, dlast, x, step, A, B, C, initial):
    from ssmclip.ops.ssd import kernels

    if x.numel() == 0:
        gradients = [t.zero_() for t in _new_gradients(x, step, A, B, C, initial)]
        if initial is not None and dlast is not None:
            gradients[-1].copy_(dlast)
        return tuple(gradients)
    chunks = _Chunks(x, step, A, B, C)
    dy = chunks.cut(dy)
    dy_by_head = dy.transpose(1, 2).contiguous()
    dmix = dy_by_head @ chunks.by_head.mT
    dx = (chunks.mix.mT @ dy_by_head).transpose(1, 2)
    dstart, dend, dtotal = (torch.zeros_like(t) for t in (chunks.step, chunks.step, chunks.step[..., 0]))
    dB, dC, dinitial = torch.zeros_like(chunks.B), torch.zeros_like(chunks.C), x.new_empty(0)
    if chunks.count > 1 or dlast is not None or initial is not None:
        before, _ = chunks.states(initial)
        dy_there = chunks.by_group(dy * _at_positions(chunks.from_start))
        dafter, dtotal, dinitial = _states_back(chunks, dy_there.mT @ chunks.C, dlast, before)
        torch.matmul(dy_there, before, out=dC)
        torch.matmul(chunks.by_group(chunks.x * _at_positions(chunks.to_end)), dafter, out=dB)
        inherited = chunks.by_position(chunks.C @ before.mT)
        dstart = (inherited * dy).sum(-1).transpose(1, 2).contiguous()
        dadded = chunks.by_position(chunks.B @ dafter.mT)
        dend = (dadded * chunks.x).sum(-1).transpose(1, 2).contiguous()
        dx = torch.addcmul(dx, dadded, _at_positions(chunks.to_end))
        dinitial = dinitial if initial is not None else x.new_empty(0)
    dscores, dstep = torch.empty_like(chunks.scores), torch.empty_like(chunks.step)
    dA = torch.empty_like(chunks.step[..., 0], memory_format=torch.contiguous_format)
    chunks.run(kernels.backward, chunks.groups, dmix, dstart, dend, dtotal, dscores, dstep, dA)
    dC += dscores @ chunks.B
    dB += dscores.mT @ chunks.C
    by_position = (dx, dstep.transpose(1, 2), dB.transpose(1, 2), dC.transpose(1, 2))
    dx, dstep, dB, dC = (chunks.whole(t).contiguous() for t in by_position)
    return dx, dstep, dA.sum(0), dB, dC, dinitial


def _states_back(chunks, own, dlast, before):
    """Gradients of the states after every chunk (shaped as `before`), of every chunk's decay (T, H), of the initial.

    own: what a chunk's outputs give the state before it.
    """
    shape = len(own), chunks.heads, chunks.width, -1
    own, before = chunks.over_chunks(own.reshape(shape)), chunks.over_chunks(before.view(shape))
    keep = chunks.over_chunks(chunks.from_start[:, :, -1, None, None])
    state = torch.zeros_like(own[:, 0]) if dlast is None else dlast
    dafter = torch.empty_like(own)
    for k in reversed(range(chunks.count)):
        dafter[:, k] = state
        state = torch.addcmul(own[:, k], keep[:, k], state)
    dtotal = (dafter * before).sum((-1, -2)).flatten(0, 1)
    return dafter.view(len(chunks.step), chunks.groups, -1, own.shape[-1]), dtotal, state


@torch.library.register_fake("ssmclip::ssd_backward", lib=_library)
def _backward_fake(dy, dlast, x, step, A, B, C, initial):
    return _new_gradients(x, step, A, B, C, initial)


def _remember(ctx, inputs, output):
    *tensors, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _gradient(ctx, dy, dlast):
    inputs = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = torch.ops.ssmclip.ssd_backward(dy, dlast, *inputs)
    return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None


def _remember_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _second_gradient(ctx, *grads_of_grads):
    """The derivative of what `chunked` gives as the gradient; in its turn differentiable."""
    dy, dlast, *inputs = ctx.saved_tensors

    def scan(*inputs):
        y, last = chunked.scan(*inputs, dlast is not None)
        return y, last

    return tuple(second_gradient(scan, [dy, dlast], inputs, grads_of_grads))


torch.library.register_autograd("ssmclip::ssd", _gradient, setup_context=_remember, lib=_library)
torch.library.register_autograd(
    "ssmclip::ssd_backward", _second_gradient, setup_context=_remember_gradient, lib=_library
)
