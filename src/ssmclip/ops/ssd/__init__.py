"""The scan of Mamba-2 (Dao and Gu, 2024, "state space duality", arXiv:2405.21060), with mamba_ssm's interface."""

from __future__ import annotations

import math

from jaxtyping import Float
from torch import Tensor

from ssmclip.ops.check import check_tensor
from ssmclip.ops.dispatch import Backend, choose
from ssmclip.ops.ssd import chunked, cpu, reference, triton

__all__ = ["BACKENDS", "ssd"]


BACKENDS = {
    "triton": Backend(triton.ssd, devices=("cuda",), needs="triton"),
    "cpu": Backend(cpu.ssd, devices=("cpu",), needs="numba"),
    "chunked": Backend(chunked.ssd),
    "reference": Backend(reference.ssd),
}


def ssd(
    x: Float[Tensor, "B L H P"],
    dt: Float[Tensor, "B L H"],
    A: Float[Tensor, " H"],
    B: Float[Tensor, "B L G N"],
    C: Float[Tensor, "B L G N"],
    D: Float[Tensor, " H"] | None = None,
    z: Float[Tensor, "B L H P"] | None = None,
    dt_bias: Float[Tensor, " H"] | None = None,
    initial_states: Float[Tensor, "B H P N"] | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, math.inf),
    return_final_states: bool = False,
    *,
    backend: str = "auto",
) -> Float[Tensor, "B L H P"] | tuple[Float[Tensor, "B L H P"], Float[Tensor, "B H P N"]]:
    """h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] (outer) B[t];  y[t] = h[t] C[t] + D x[t];  y *= silu(z).

    The arguments of mamba_ssm's `mamba_chunk_scan_combined`, without a chunk size, which changes no value. dt_bias is
    added to dt before the softplus, dt_limit clamps what comes out; head h belongs to group h // (H / G).
    initial_states: h before the first position, zero when left out. The state is float32 whatever the input (float64
    for float64), y has x's type. return_final_states: return (y, h after the last position), h in the state's type.

    Differentiable any number of times on every back end. Second and higher derivatives of the `cpu` and `triton` back
    ends are computed by `chunked`, and under torch.func's derivatives and in forward mode everything is.

    Raises ValueError for shapes, types and devices that do not fit together, UnknownName for an unknown back end.
    """
    _check(x, dt, A, B, C, D, z, dt_bias, initial_states)
    run = choose(BACKENDS, backend, x.device.type)
    return run(x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit, return_final_states)


def _check(x, dt, A, B, C, D, z, dt_bias, initial_states) -> None:
    if x.ndim != 4 or B.ndim != 4:
        raise ValueError(
            f"x must be (batch, length, heads, channels), B and C (batch, length, groups, state) "
            f"(got x {tuple(x.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)})"
        )
    batch, length, heads, channels = x.shape
    groups, state = B.shape[2:]
    if groups == 0 or heads % groups:
        raise ValueError(f"the groups of B must divide the {heads} heads of x (got {groups})")
    wanted = {
        "dt": (dt, (batch, length, heads)),
        "A": (A, (heads,)),
        "B": (B, (batch, length, groups, state)),
        "C": (C, (batch, length, groups, state)),
        "D": (D, (heads,)),
        "z": (z, (batch, length, heads, channels)),
        "dt_bias": (dt_bias, (heads,)),
        "initial_states": (initial_states, (batch, heads, channels, state)),
    }
    for name, (tensor, shape) in wanted.items():
        check_tensor(name, tensor, shape, x)
