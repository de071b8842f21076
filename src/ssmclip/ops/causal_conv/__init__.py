"""The short convolution of Mamba's blocks: one filter per channel, looking at this position and those before it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from ssmclip.ops.causal_conv import cpu, plain, triton
from ssmclip.ops.check import check_tensor
from ssmclip.ops.dispatch import Backend, choose

__all__ = ["BACKENDS", "causal_conv1d"]


# No recurrence, so the definition has nothing to cut into chunks: it answers to both names.
BACKENDS = {
    "triton": Backend(triton.causal_conv1d, devices=("cuda",), needs="triton"),
    "cpu": Backend(cpu.causal_conv1d, devices=("cpu",), needs="numba"),
    "chunked": Backend(plain.causal_conv1d),
    "reference": Backend(plain.causal_conv1d),
}


def causal_conv1d(
    x: Float[Tensor, "B D L"],
    weight: Float[Tensor, "D K"],
    bias: Float[Tensor, " D"] | None = None,
    *,
    backend: str = "auto",
) -> Float[Tensor, "B D L"]:
    """y[t] = bias + sum over lag < K of weight[K - 1 - lag] x[t - lag], with x = 0 before the first position.

    The result has x's type and, like it, positions or channels next to each other in memory.
    Raises ValueError for shapes, types and devices that do not fit together, UnknownName for an unknown back end.
    """
    if x.ndim != 3 or weight.ndim != 2 or len(weight) != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"x must be (batch, dim, length) and weight (dim, taps) (got {tuple(x.shape)} and {tuple(weight.shape)})"
        )
    check_tensor("weight", weight, (x.shape[1], weight.shape[1]), x)
    check_tensor("bias", bias, (x.shape[1],), x)
    return choose(BACKENDS, backend, x.device.type)(x, weight, bias)
