"""Plain PyTorch in matrix products, any device, differentiable any number of times (the paper's section 6).

The sequence is cut into chunks of Q positions. With a[t] = dt[t] A, within a chunk every output sees every earlier
input at once, and chunks see each other through the states at their borders, which are carried along one by one:

    y[i] = sum over j <= i of (C[i] . B[j]) exp(a[j+1] + ... + a[i]) dt[j] x[j]  +  exp(a[1] + ... + a[i]) C[i] h[0]
    h[Q] = exp(a[1] + ... + a[Q]) h[0]  +  sum over j of exp(a[j+1] + ... + a[Q]) dt[j] x[j] (outer) B[j]

Every exponential is of a sum over some of the steps, added up for itself and never a difference of two longer sums:
with A < 0 and dt >= 0 none exceeds 1, and a step that forgets everything costs the steps after it no digit.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from ssmclip.ops.selective_scan.chunked import carry

CHUNK = 64  # positions


def ssd(*inputs, **options):
    """See `ssmclip.ops.ssd`."""
    return around(scan, *inputs, **options)


def around(
    scan,
    x,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    dt_softplus=False,
    dt_limit=(0.0, math.inf),
    return_final_states=False,
    widen=True,
):
    """`ssmclip.ops.ssd` from its core: scan(x, step, A, B, C, initial states or None, whether to return the last state)

    -> (y, last state), all in the state's type, steps as they act. widen: False gives it x, B and C as they came.
    """
    dtype, state = x.dtype, torch.promote_types(x.dtype, torch.float32)
    rest = (dt, A, D, z, dt_bias, initial_states)
    step, A, D, z, dt_bias, initial = (t if t is None else t.to(state) for t in rest)
    if widen:
        x, B, C = (t.to(state) for t in (x, B, C))
    if dt_bias is not None:
        step = step + dt_bias
    if dt_softplus:
        step = F.softplus(step)
    if tuple(dt_limit) != (0.0, math.inf) or not dt_softplus:
        step = step.clamp(*dt_limit)
    y, last = scan(x, step, A, B, C, initial, return_final_states)
    if D is not None:
        y = torch.addcmul(y, x.to(state), D[:, None])
    if z is not None:
        y = y * F.silu(z)
    y = y.to(dtype)
    return (y, last) if return_final_states else y


def cut(length: int, longest: int) -> tuple[int, int]:
    """(count, size) of equal chunks of at most `longest` positions that hold a sequence; one chunk at least."""
    count = max(1, math.ceil(length / longest))
    return count, max(1, math.ceil(length / count))


def scan(x, step, A, B, C, initial, want_last):
    """The core, see `around`."""
    with torch.autocast(x.device.type, enabled=False):  # or products would be in half precision
        return _scan(x, step, A, B, C, initial, want_last)


def _scan(x, step, A, B, C, initial, want_last):
    length, groups = x.shape[1], B.shape[2]
    count, size = cut(length, CHUNK)
    padding = count * size - length  # steps of no size: they change no state
    drive = F.pad(step[..., None] * x, (0, 0, 0, 0, 0, padding))
    drive = rearrange(drive, "b (c q) (g r) p -> b c q g r p", c=count, g=groups)
    log_decay = rearrange(F.pad(step * A, (0, 0, 0, padding)), "b (c q) (g r) -> b c g r q", c=count, g=groups)
    B, C = (rearrange(F.pad(t, (0, 0, 0, 0, 0, padding)), "b (c q) g n -> b c q g n", c=count) for t in (B, C))

    decay = torch.exp(segment_sums(log_decay))
    mix = torch.einsum("bcign,bcjgn->bcgij", C, B)[:, :, :, None] * decay
    y = torch.einsum("bcgrij,bcjgrp->bcigrp", mix, drive)

    last = None
    if count > 1 or want_last or initial is not None:
        to_end = rearrange(decay[..., -1, :], "b c g r q -> b c q g r 1")
        added = torch.einsum("bcqgn,bcqgrp->bcgrpn", B, to_end * drive)
        from_start = torch.exp(log_decay.cumsum(-1))
        keep = from_start[..., -1, None, None]
        # Without an initial state nothing is inherited, not even 0 times a decay: NaN where a growing state overflows.
        before, first = torch.zeros_like(added[:, 0]), added[:, 0]
        if initial is not None:
            before = rearrange(initial, "b (g r) p n -> b g r p n", g=groups)
            first = keep[:, 0] * before + first
        after = carry(torch.mul, first, keep[:, 1:].movedim(1, 0), added[:, 1:].movedim(1, 0), dim=1)
        inherited = torch.einsum("bcqgn,bcgrpn->bcqgrp", C, torch.cat([before[:, None], after[:, :-1]], 1))
        y = y + inherited * rearrange(from_start, "b c g r q -> b c q g r 1")
        last = rearrange(after[:, -1], "b g r p n -> b (g r) p n")
    return rearrange(y, "b c q g r p -> b (c q) (g r) p")[:, :length], last


def segment_sums(a: Tensor) -> Tensor:
    """(..., Q) -> (..., Q, Q): a[j+1] + ... + a[i] at row i, column j; minus infinity where j > i."""
    size = a.shape[-1]
    below = torch.ones(size, size, dtype=torch.bool, device=a.device).tril(-1)
    sums = a[..., None].expand(*a.shape, size).masked_fill(~below, 0).cumsum(-2)
    return sums.masked_fill(below.T, -math.inf)
