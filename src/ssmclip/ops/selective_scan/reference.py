"""The definition. Every other file in this folder must agree with it.

B batch · D channels · L positions · N states per channel · G groups of channels that share B and C

    h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t]
    y[t] = C[t] h[t] + D u[t];  y *= silu(z)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import repeat


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """See `ssmclip.ops.selective_scan`. B and C have four dimensions here."""
    state = torch.promote_types(u.dtype, torch.float32)
    x, delta, A = u.to(state), delta.to(state), A.to(state)
    per_group = u.shape[1] // B.shape[1]
    B = repeat(B.to(state), "b g n l -> b (g d) n l", d=per_group)
    C = repeat(C.to(state), "b g n l -> b (g d) n l", d=per_group)
    if delta_bias is not None:
        delta = delta + delta_bias.to(state)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)

    h = x.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for t in range(u.shape[2]):
        step = delta[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[..., t] * x[:, :, t, None]
        ys.append((C[..., t] * h).sum(-1))
    y = torch.stack(ys, dim=-1) if ys else torch.zeros_like(x)

    if D is not None:
        y = y + D.to(state)[:, None] * x
    if z is not None:
        y = y * F.silu(z.to(state))
    y = y.to(u.dtype)
    return (y, h) if return_last_state else y
