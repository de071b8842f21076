"""The first Mamba's block: what SiMBA reads images with, and Mamba language models texts."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ssmclip import ops


class Mamba(nn.Module):
    """One direction of the selective scan over a sequence, gated (Gu and Dao 2023, arXiv:2312.00752, section 3.4).

        in_proj -> causal depthwise conv -> SiLU -> selective scan * SiLU(z) -> out_proj

    dim: channels in and out; d_state: N, states per channel; d_conv: positions the convolution sees; expand: inner
    channels over dim; dt_rank: of the projection to delta, None for dim / 16 rounded up; bias: of in_proj and out_proj.
    Parameters are named as in mamba_ssm.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
    ):
        super().__init__()
        inner = expand * dim
        self.d_state, self.dt_rank = d_state, math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=bias)
        self.conv1d = nn.Conv1d(inner, inner, d_conv, groups=inner, bias=conv_bias)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, d_state))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        """Section 3.6 of the paper: A = -(1..N), D = 1, delta log-uniform in [dt_min, dt_max] at zero input."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        dt = torch.empty_like(self.dt_proj.bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
        self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        x, z = rearrange(self.in_proj(x), "b l (two d) -> two b d l", two=2)
        x = F.silu(ops.causal_conv1d(x, self.conv1d.weight[:, 0], self.conv1d.bias))
        dt, B, C = self.x_proj(rearrange(x, "b d l -> b l d")).split([self.dt_rank, self.d_state, self.d_state], -1)
        y = ops.selective_scan(
            x,
            rearrange(F.linear(dt, self.dt_proj.weight), "b l d -> b d l"),
            -torch.exp(at_least_float32(self.A_log)),
            rearrange(B, "b l n -> b n l"),
            rearrange(C, "b l n -> b n l"),
            self.D,
            z=z,
            delta_bias=self.dt_proj.bias,
            delta_softplus=True,
        )
        return self.out_proj(rearrange(y, "b d l -> b l d"))


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))
