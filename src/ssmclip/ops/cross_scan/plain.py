"""The definition, in PyTorch: four sequences, scanned, merged. Any device, any number of derivatives."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ssmclip.ops.selective_scan import BACKENDS as SCANS
from ssmclip.ops.selective_scan.chunked import joined


def cross_scan(x: Float[Tensor, "B C H W"]) -> Float[Tensor, "B 4 C L"]:
    """Return a map as four sequences of length H * W.

    >>> cross_scan(torch.arange(6.0).view(1, 1, 2, 3)).squeeze()
    tensor([[0., 1., 2., 3., 4., 5.],
            [0., 3., 1., 4., 2., 5.],
            [5., 4., 3., 2., 1., 0.],
            [5., 2., 4., 1., 3., 0.]])
    """
    rows = rearrange(x, "b c h w -> b c (h w)")
    columns = rearrange(x, "b c h w -> b c (w h)")
    return joined([x[:, None] for x in (rows, columns, rows.flip(-1), columns.flip(-1))], 1)


def cross_merge(y: Float[Tensor, "B 4 C L"], height: int, width: int) -> Float[Tensor, "B C H W"]:
    """Put four sequences back on the map and sum them: the transpose of `cross_scan`.

    Raises ValueError when the length is not height * width.
    """
    if y.shape[-1] != height * width:
        raise ValueError(
            f"the sequences' length must be height * width of the map {height} x {width} (got {y.shape[-1]})"
        )
    # Unbound: the gradients of four selections would each fill a tensor of zeros as large as y.
    rows, columns, rows_back, columns_back = y.unbind(1)
    rows, columns = rows + rows_back.flip(-1), columns + columns_back.flip(-1)
    sides = {"h": height, "w": width}
    return rearrange(rows, "b c (h w) -> b c h w", **sides) + rearrange(columns, "b c (w h) -> b c h w", **sides)


def sequences(maps: Float[Tensor, "B 4 H W C"]) -> Float[Tensor, "B 4 C L"]:
    """Four maps, each in the order of its own direction."""
    orders = ("b h w c -> b c (h w)", "b h w c -> b c (w h)")
    rows, columns, rows_back, columns_back = (
        rearrange(one, order) for one, order in zip(maps.unbind(1), 2 * orders, strict=True)
    )
    return joined([x[:, None] for x in (rows, columns, rows_back.flip(-1), columns_back.flip(-1))], 1)


def project(delta: Float[Tensor, "B 4 H W R"], weight: Float[Tensor, "4 D R"]) -> Float[Tensor, "B 4 H W D"]:
    """A matrix for each direction."""
    b, _, h, w, _ = delta.shape
    delta = torch.bmm(rearrange(delta, "b k h w r -> k (b h w) r"), rearrange(weight, "k d r -> k r d"))
    return rearrange(delta, "k (b h w) d -> b k h w d", b=b, h=h, w=w)


def composed(backend: str) -> Callable[..., Tensor]:
    """`cross_selective_scan` over this back end of `selective_scan`."""
    return partial(_cross_selective_scan, SCANS[backend].run)


def _cross_selective_scan(scan, x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, delta_weight=None):
    height, width = x.shape[1:3]
    if delta_weight is not None:
        delta = project(delta, delta_weight.to(delta.dtype))
    y = scan(
        rearrange(cross_scan(rearrange(x, "b h w d -> b d h w")), "b k d l -> b (k d) l"),
        rearrange(sequences(delta), "b k d l -> b (k d) l"),
        rearrange(A, "k d n -> (k d) n"),
        sequences(B),
        sequences(C),
        None if D is None else rearrange(D, "k d -> (k d)"),
        None,
        None if delta_bias is None else rearrange(delta_bias, "k d -> (k d)"),
        delta_softplus,
    )
    y = cross_merge(rearrange(y, "b (k d) l -> b k d l", k=4), height, width)
    return rearrange(y, "b d h w -> b h w d")
