"""Plain PyTorch, about 2 sqrt(L) steps instead of L, any device, differentiable any number of times.

The sequence is cut into K chunks of T positions. All chunks run side by side from a zero state (T steps), the state
at the end of each is carried into the next (K steps), and what a chunk inherited is added, decayed:

    h[k, t] = local[k, t] + exp(sum over s <= t of delta[k, s] A) h[k - 1, T]

Every exponential is of a sum of delta A, never of a difference or a negated sum: with A < 0 and delta >= 0 none
exceeds 1, so nothing overflows however large delta A is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """See `ssmclip.ops.selective_scan`. B and C have four dimensions here."""
    state = torch.promote_types(u.dtype, torch.float32)
    x, delta, A, B, C = u.to(state), delta.to(state), A.to(state), B.to(state), C.to(state)
    if delta_bias is not None:
        delta = delta + delta_bias.to(state)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    groups = B.shape[1]
    step = rearrange(delta, "b (g d) l -> l b g d 1", g=groups)
    drive = rearrange(delta * x, "b (g d) l -> l b g d 1", g=groups) * rearrange(B, "b g n l -> l b g 1 n")
    h = recurrence(step * rearrange(A, "(g d) n -> g d n", g=groups), drive)
    y = rearrange((h * rearrange(C, "b g n l -> l b g 1 n")).sum(-1), "l b g d -> b (g d) l")

    if D is not None:
        y = y + D.to(state)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(state))
    y = y.to(u.dtype)
    if not return_last_state:
        return y
    last = h[-1] if len(h) else h.new_zeros(h.shape[1:])
    return y, rearrange(last, "b g d n -> b (g d) n")


def recurrence(log_decay: Tensor, drive: Tensor) -> Tensor:
    """h[t] = exp(log_decay[t]) h[t-1] + drive[t] from h = 0, along the first dimension, shapes alike."""
    length = len(drive)
    if length <= 1:
        return drive + 0 * log_decay  # nothing decays yet, but a gradient of zero is a gradient
    size = math.ceil(math.sqrt(length))
    count = math.ceil(length / size)
    # The padding comes last and nothing reads it.
    padding = drive.new_zeros(count * size - length, *drive.shape[1:])
    log_decay = joined([log_decay, padding], 0).unflatten(0, (count, size))
    first, later = joined([drive, padding], 0).unflatten(0, (count, size)).split([1, size - 1], 1)

    decay = torch.exp(log_decay.split([1, size - 1], 1)[1])
    h = carry(torch.mul, first.squeeze(1), decay.movedim(1, 0), later.movedim(1, 0), dim=1)

    # The first chunk inherits nothing: not even 0 times its total, which is NaN where a growing state overflows.
    if count > 1:
        first, later = h.split([1, count - 1])
        total = log_decay.split([1, count - 1])[1].cumsum(1)
        ends = h[: count - 1, -1]
        inherited = carry(_decayed, ends[0], total[: count - 2, -1], ends[1:], dim=0)
        h = joined([first, later + _decayed(inherited[:, None], total)], 0)
    return h.flatten(0, 1)[:length]


def carry(decayed: Callable[[Tensor, Tensor], Tensor], first: Tensor, decays: Tensor, drives: Tensor, dim: int):
    """first, and decayed(state, decay) + drive for each decay and drive along their first dimension; stacked on dim."""
    if len(decays) and torch.compiler.is_exporting():
        # One node that repeats, where a loop would become as many as it has rounds.
        from torch._higher_order_ops import scan

        def step(state, pair):
            state = decayed(state, pair[0]) + pair[1]
            return state, state.clone()

        states = scan(step, first.clone(memory_format=torch.contiguous_format), (decays, drives))[1]
        return torch.cat([first[None], states]).movedim(0, dim)
    states = [first]
    for decay, drive in zip(decays, drives, strict=True):
        states.append(decayed(states[-1], decay) + drive)
    return joined([state.unsqueeze(dim) for state in states], dim)


class _Joined(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(dim, *parts):
        return torch.cat(parts, dim)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.dim, *parts = inputs
        ctx.sizes = [part.shape[ctx.dim] for part in parts]

    @staticmethod
    def backward(ctx, grad):
        return None, *grad.split(ctx.sizes, ctx.dim)

    @staticmethod
    def jvp(ctx, _, *tangents):
        return torch.cat(tangents, ctx.dim)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """torch.cat for second derivatives.

    Its own gradient cuts a piece out for every part, and the gradient of each cut is as large as the whole, all zeros
    but for the piece; the gradient of a split is one tensor. Compilers get torch.cat, and have no second derivative.
    """
    return torch.cat(parts, dim) if torch.compiler.is_compiling() else _Joined.apply(dim, *parts)


def _decayed(state: Tensor, log_decay: Tensor) -> Tensor:
    """exp(log_decay) state, where nothing grown beyond the largest number is still nothing, not NaN."""
    beyond = (state == 0) & (log_decay > math.log(torch.finfo(state.dtype).max))
    return torch.exp(log_decay.masked_fill(beyond, -math.inf)) * state
