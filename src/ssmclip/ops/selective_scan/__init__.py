"""The selective scan of Mamba (Gu and Dao, 2023, arXiv:2312.00752), with mamba_ssm's interface and no compiler."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ssmclip.ops.check import check_tensor
from ssmclip.ops.dispatch import Backend, choose
from ssmclip.ops.selective_scan import chunked, cpu, reference, triton

__all__ = ["BACKENDS", "selective_scan"]

BACKENDS = {
    "triton": Backend(triton.selective_scan, devices=("cuda",), needs="triton"),
    "cpu": Backend(cpu.selective_scan, devices=("cpu",), needs="numba"),
    "chunked": Backend(chunked.selective_scan),
    "reference": Backend(reference.selective_scan),
}


def selective_scan(
    u: Float[Tensor, "B D L"],
    delta: Float[Tensor, "B D L"],
    A: Float[Tensor, "D N"],
    B: Float[Tensor, "B G N L"] | Float[Tensor, "B N L"],
    C: Float[Tensor, "B G N L"] | Float[Tensor, "B N L"],
    D: Float[Tensor, " D"] | None = None,
    z: Float[Tensor, "B D L"] | None = None,
    delta_bias: Float[Tensor, " D"] | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str = "auto",
) -> Float[Tensor, "B D L"] | tuple[Float[Tensor, "B D L"], Float[Tensor, "B D N"]]:
    """h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t];  y[t] = C[t] h[t] + D u[t];  y *= silu(z).

    delta_bias is added to delta before the softplus. B and C of three dimensions are one group; channel d belongs to
    group d // (D / G). The state is float32 whatever the input (float64 for float64), y has u's type.
    return_last_state: return (y, h after the last position), h in the state's type.

    Differentiable any number of times on every back end. Second and higher derivatives of the `cpu` and `triton` back
    ends are computed by `chunked`: right, but slower and with (batch, dim, length, state) tensors. Under
    torch.func's derivatives and in forward mode everything is: "auto" takes `chunked`, the two raise RuntimeError.

    Raises ValueError for shapes, types and devices that do not fit together, UnknownName for an unknown back end.
    """
    if B.ndim == 3:
        B = B.unsqueeze(1)
    if C.ndim == 3:
        C = C.unsqueeze(1)
    _check(u, delta, A, B, C, D, z, delta_bias)
    run = choose(BACKENDS, backend, u.device.type)
    return run(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)


def _check(u, delta, A, B, C, D, z, delta_bias) -> None:
    if u.ndim != 3 or A.ndim != 2 or B.ndim != 4:
        raise ValueError(
            f"u must be (batch, dim, length), A (dim, state), B and C (batch, [groups,] state, length) "
            f"(got u {tuple(u.shape)}, A {tuple(A.shape)}, B {tuple(B.shape)}, C {tuple(C.shape)})"
        )
    batch, dim, length = u.shape
    state, groups = A.shape[1], B.shape[1]
    if groups == 0 or dim % groups:
        raise ValueError(f"the groups of B must divide the {dim} channels of u (got {groups})")
    wanted = {
        "delta": (delta, (batch, dim, length)),
        "A": (A, (dim, state)),
        "B": (B, (batch, groups, state, length)),
        "C": (C, (batch, groups, state, length)),
        "D": (D, (dim,)),
        "z": (z, (batch, dim, length)),
        "delta_bias": (delta_bias, (dim,)),
    }
    for name, (tensor, shape) in wanted.items():
        check_tensor(name, tensor, shape, u)
