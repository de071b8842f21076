"""The blocks of Mamba (used in SiMBA and in language models) and Mamba-2 (used in language models)."""

from __future__ import annotations

import math

import torch
import torch.fx
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from ssmclip import ops
from ssmclip.models.networks.parts import at_least_float32, causal_conv, linear_and_bias

# Leaves of torch.fx's graphs: they look at types and axes, which a traced tensor does not have.
torch.fx.wrap("rearrange")
torch.fx.wrap("at_least_float32")


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
        self.d_state, self.d_conv = d_state, d_conv
        self.dt_rank = math.ceil(dim / 16) if dt_rank is None else dt_rank
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
        """Initialise as in section 3.6: A = -(1..N), D = 1, delta log-uniform in [dt_min, dt_max] at zero input."""
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        _set_steps(self.dt_proj.bias, dt_min, dt_max)
        self.A_log.copy_(torch.arange(1, self.d_state + 1).log().expand_as(self.A_log))
        self.D.fill_(1.0)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        x, z = rearrange(self.in_proj(x), "b l (two d) -> two b d l", two=2)
        x = F.silu(causal_conv(self.conv1d, x, self.d_conv))
        dt, B, C = self.x_proj(rearrange(x, "b d l -> b l d")).split([self.dt_rank, self.d_state, self.d_state], -1)
        delta, delta_bias = linear_and_bias(self.dt_proj, dt)
        y = ops.selective_scan(
            x,
            rearrange(delta, "b l d -> b d l"),
            -torch.exp(at_least_float32(self.A_log)),
            rearrange(B, "b l n -> b n l"),
            rearrange(C, "b l n -> b n l"),
            self.D,
            z=z,
            delta_bias=delta_bias,
            delta_softplus=True,
        )
        return self.out_proj(rearrange(y, "b d l -> b l d"))


class Mamba2(nn.Module):
    """Mamba-2's block (Dao and Gu 2024, arXiv:2405.21060, section 7): all inputs of the scan from one projection.

        in_proj -> causal depthwise conv of x, B, C -> SiLU -> ssd -> RMSNorm(y * SiLU(z)) -> out_proj

    dim: channels in and out; d_state: N, states per channel; d_conv: positions the convolution sees; expand: inner
    channels over dim; head_dim: inner channels that share a decay; n_groups: of heads that share B and C, each
    normalised on its own; bias: of in_proj and out_proj; dt_limit: clamps the steps.
    Parameters are named as in mamba_ssm. Raises ValueError where heads or groups do not come out even.
    """

    def __init__(
        self,
        dim: int,
        d_state: int = 128,
        d_conv: int = 4,
        expand: int = 2,
        head_dim: int = 64,
        n_groups: int = 1,
        bias: bool = False,
        conv_bias: bool = True,
        norm_eps: float = 1e-5,
        dt_limit: tuple[float, float] = (0.0, math.inf),
    ):
        super().__init__()
        inner = expand * dim
        heads = inner // head_dim
        if heads * head_dim != inner or heads % n_groups:
            raise ValueError(
                f"the inner channels must divide into {n_groups} groups of heads of {head_dim} (got {inner})"
            )
        self.inner, self.heads, self.d_state, self.n_groups, self.dt_limit = inner, heads, d_state, n_groups, dt_limit
        self.d_conv = d_conv
        self.mixed = mixed = inner + 2 * n_groups * d_state  # channels of x, B and C
        self.in_proj = nn.Linear(dim, inner + mixed + heads, bias=bias)
        self.conv1d = nn.Conv1d(mixed, mixed, d_conv, groups=mixed, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = GatedRMSNorm(inner, n_groups, norm_eps)
        self.out_proj = nn.Linear(inner, dim, bias=bias)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, dt_min: float = 1e-3, dt_max: float = 1e-1) -> None:
        """Initialise as published: A uniform in [-16, -1], D = 1, steps log-uniform in [dt_min, dt_max] at 0."""
        _set_steps(self.dt_bias, dt_min, dt_max)
        self.A_log.copy_(torch.empty_like(self.A_log).uniform_(1, 16).log())
        self.D.fill_(1.0)

    def forward(self, x: Float[Tensor, "b l c"]) -> Float[Tensor, "b l c"]:
        z, xbc, dt = self.in_proj(x).split([self.inner, self.mixed, self.heads], -1)
        xbc = causal_conv(self.conv1d, rearrange(xbc, "b l d -> b d l"), self.d_conv)
        of_states = self.n_groups * self.d_state
        x, B, C = rearrange(F.silu(xbc), "b d l -> b l d").split([self.inner, of_states, of_states], -1)
        y = ops.ssd(
            rearrange(x, "b l (h p) -> b l h p", h=self.heads),
            dt,
            -torch.exp(at_least_float32(self.A_log)),
            rearrange(B, "b l (g n) -> b l g n", g=self.n_groups),
            rearrange(C, "b l (g n) -> b l g n", g=self.n_groups),
            self.D,
            dt_bias=self.dt_bias,
            dt_softplus=True,
            dt_limit=self.dt_limit,
        )
        return self.out_proj(self.norm(rearrange(y, "b l h p -> b l (h p)"), z))


class GatedRMSNorm(nn.Module):
    """RMSNorm(y * SiLU(z)), each of so many groups of channels by itself; at least in float32."""

    def __init__(self, channels: int, groups: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.groups, self.eps = groups, eps

    def forward(self, y: Float[Tensor, "*b c"], z: Float[Tensor, "*b c"]) -> Float[Tensor, "*b c"]:
        gated = (at_least_float32(y) * F.silu(at_least_float32(z))).unflatten(-1, (self.groups, -1))
        normed = F.rms_norm(gated, gated.shape[-1:], eps=self.eps).flatten(-2)
        return self.weight * normed.to(y.dtype)


def _set_steps(bias: Tensor, dt_min: float, dt_max: float) -> None:
    """Set the bias so that softplus(bias) is log-uniform in [dt_min, dt_max]."""
    dt = torch.empty_like(bias).uniform_(math.log(dt_min), math.log(dt_max)).exp()
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
