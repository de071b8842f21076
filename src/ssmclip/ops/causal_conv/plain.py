"""The definition, quick enough anywhere: sums of shifted sequences, which keep the memory order of x."""

from __future__ import annotations


def causal_conv1d(x, weight, bias=None):
    """See `ssmclip.ops.causal_conv1d`."""
    y = weight[:, -1, None] * x
    if bias is not None:
        y = y + bias[:, None]
    for lag in range(1, min(weight.shape[1], x.shape[2])):
        y[..., lag:] += weight[:, -1 - lag, None] * x[..., :-lag]
    return y.to(x.dtype)
