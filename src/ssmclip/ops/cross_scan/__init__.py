"""VMamba's cross scan (Liu et al., 2024, arXiv:2401.10166): a map read as K = 4 sequences, and back.

0 row by row · 1 column by column · 2 and 3 the same two backwards

To ask what the directions are good for, K may be 2, the rows in both directions (every second one of the four), or 1,
the rows alone: causal, the result at a position depends on nothing after it.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ssmclip.ops.check import check_tensor
from ssmclip.ops.cross_scan import cpu, plain, triton
from ssmclip.ops.cross_scan.plain import check_directions, cross_merge, cross_scan
from ssmclip.ops.dispatch import Backend, choose

__all__ = ["BACKENDS", "check_directions", "cross_merge", "cross_scan", "cross_selective_scan"]


BACKENDS = {
    "triton": Backend(triton.cross_selective_scan, devices=("cuda",), needs="triton"),
    "cpu": Backend(cpu.cross_selective_scan, devices=("cpu",), needs="numba"),
    "chunked": Backend(plain.composed("chunked")),
    "reference": Backend(plain.composed("reference")),
}


def cross_selective_scan(
    x: Float[Tensor, "B H W D"],
    delta: Float[Tensor, "B K H W D"] | Float[Tensor, "B K H W R"],
    A: Float[Tensor, "K D N"],
    B: Float[Tensor, "B K H W N"],
    C: Float[Tensor, "B K H W N"],
    D: Float[Tensor, "K D"] | None = None,
    delta_bias: Float[Tensor, "K D"] | None = None,
    delta_softplus: bool = True,
    delta_weight: Float[Tensor, "K D R"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "B H W D"]:
    """Selective scans over a map, one per direction, and their sum: cross_merge(selective_scan(cross_scan(x))).

    K directions, 4, 2 or 1: those of the head of this module. Everything is in map order, channels last:
    delta[:, k, i, j] is what direction k uses at row i, column j. Any strides; the last dimension is copied where it is
    not contiguous. With delta_weight, delta has R numbers for each position, and its product with the direction's
    matrix is what the scan uses: the back end `cpu` then keeps no tensor of K maps, neither forward nor for the
    gradient. State and result types, derivatives and errors are those of `selective_scan`.
    """
    _check(x, delta, A, B, C, D, delta_bias, delta_weight)
    run = choose(BACKENDS, backend, x.device.type)
    return run(x, delta, A, B, C, D, delta_bias, delta_softplus, delta_weight)


def _check(x, delta, A, B, C, D, delta_bias, delta_weight) -> None:
    if x.ndim != 4 or A.ndim != 3:
        raise ValueError(
            f"x must be (batch, height, width, dim) and A (directions, dim, state) "
            f"(got {tuple(x.shape)}, {tuple(A.shape)})"
        )
    batch, height, width, dim = x.shape
    directions, _, state = A.shape
    check_directions(directions)
    numbers = dim
    if delta_weight is not None:
        numbers = delta.shape[-1]
        check_tensor("delta_weight", delta_weight, (directions, dim, numbers), x)
    check_tensor("delta", delta, (batch, directions, height, width, numbers), x)
    check_tensor("A", A, (directions, dim, state), x)
    check_tensor("B", B, (batch, directions, height, width, state), x)
    check_tensor("C", C, (batch, directions, height, width, state), x)
    check_tensor("D", D, (directions, dim), x)
    check_tensor("delta_bias", delta_bias, (directions, dim), x)
