"""The short convolution of Mamba's blocks: one filter per channel, looking at this position and those before it."""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

__all__ = ["causal_conv1d"]


def causal_conv1d(
    x: Float[Tensor, "B D L"], weight: Float[Tensor, "D K"], bias: Float[Tensor, " D"] | None = None
) -> Float[Tensor, "B D L"]:
    """y[t] = bias + sum over lag < K of weight[K - 1 - lag] x[t - lag], with x = 0 before the first position.

    The result has x's type and, like it, positions or channels next to each other in memory.
    Raises ValueError for shapes that do not fit together.
    """
    if x.ndim != 3 or weight.ndim != 2 or len(weight) != x.shape[1] or weight.shape[1] == 0:
        raise ValueError(
            f"x must be (batch, dim, length) and weight (dim, taps); got {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    y = weight[:, -1, None] * x
    if bias is not None:
        y = y + bias[:, None]
    # Sums of shifted sequences: they keep the memory order of x, which a library convolution would rearrange.
    for lag in range(1, min(weight.shape[1], x.shape[2])):
        y[..., lag:] += weight[:, -1 - lag, None] * x[..., :-lag]
    return y.to(x.dtype)
