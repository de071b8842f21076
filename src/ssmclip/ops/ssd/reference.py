"""The definition. Every other file in this folder must agree with it.

B batch · L positions · H heads · P channels of a head · N states per channel · G groups of heads that share B and C

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] (outer) B[t]        one (P, N) matrix per head; dt[t] and A are numbers
    y[t] = h[t] C[t] + D x[t];  y *= silu(z)
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import repeat


def ssd(
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
):
    """See `ssmclip.ops.ssd`."""
    state = torch.promote_types(x.dtype, torch.float32)
    u, dt, A = x.to(state), dt.to(state), A.to(state)
    heads_of_a_group = x.shape[2] // B.shape[2]
    B = repeat(B.to(state), "b l g n -> b l (g r) n", r=heads_of_a_group)
    C = repeat(C.to(state), "b l g n -> b l (g r) n", r=heads_of_a_group)
    if dt_bias is not None:
        dt = dt + dt_bias.to(state)
    if dt_softplus:
        dt = F.softplus(dt)
    dt = dt.clamp(*dt_limit)

    h = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3], dtype=state)
    if initial_states is not None:
        h = h + initial_states
    ys = []
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t] * A)[..., None, None]
        h = decay * h + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]
        ys.append((h * C[:, t, :, None]).sum(-1))
    y = torch.stack(ys, 1) if ys else torch.zeros_like(u)

    if D is not None:
        y = y + D.to(state)[:, None] * u
    if z is not None:
        y = y * F.silu(z.to(state))
    y = y.to(x.dtype)
    return (y, h) if return_final_states else y
