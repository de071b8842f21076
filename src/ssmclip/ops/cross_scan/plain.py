"""The definition, in PyTorch: four sequences (or two, or one), scanned, merged. Any device, any number of derivatives.

The first half of the directions are read forwards, row by row and then column by column, the second half are the same
backwards: of two both are rows, and one is the rows forwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from ssmclip.ops.selective_scan import BACKENDS as SCANS
from ssmclip.ops.selective_scan.chunked import joined

DIRECTIONS = (4, 2, 1)


def cross_scan(x: Float[Tensor, "B C H W"], directions: int = 4) -> Float[Tensor, "B K C L"]:
    """Return a map as four sequences of length H * W; or as two, row by row and back, or as one, row by row.

    Raises ValueError for another number of directions.

    >>> cross_scan(torch.arange(6.0).view(1, 1, 2, 3)).squeeze()
    tensor([[0., 1., 2., 3., 4., 5.],
            [0., 3., 1., 4., 2., 5.],
            [5., 4., 3., 2., 1., 0.],
            [5., 2., 4., 1., 3., 0.]])
    """
    check_directions(directions)
    forwards = [rearrange(x, "b c h w -> b c (h w)")]
    if directions == 4:
        forwards.append(rearrange(x, "b c h w -> b c (w h)"))
    return _with_backwards(forwards, [] if directions == 1 else forwards)


def check_directions(directions: int) -> None:
    """Raise ValueError for a number of directions that a map cannot be scanned in."""
    if directions not in DIRECTIONS:
        raise ValueError(f"the scan's directions must be {', '.join(map(str, DIRECTIONS))} (got {directions})")


def _with_backwards(forwards: list[Tensor], backwards: list[Tensor]) -> Float[Tensor, "B K C L"]:
    return joined([x[:, None] for x in (*forwards, *(x.flip(-1) for x in backwards))], 1)


def cross_merge(y: Float[Tensor, "B K C L"], height: int, width: int) -> Float[Tensor, "B C H W"]:
    """Put four sequences, two or one back on the map and sum them: the transpose of `cross_scan`.

    Raises ValueError when the length is not height * width, or for another number of sequences.
    """
    check_directions(y.shape[1])
    if y.shape[-1] != height * width:
        raise ValueError(
            f"the sequences' length must be height * width of the map {height} x {width} (got {y.shape[-1]})"
        )
    # Unbound: the gradients of four selections would each fill a tensor of zeros as large as y.
    forwards, backwards = _halves(y)
    if backwards:
        forwards = [x + back.flip(-1) for x, back in zip(forwards, backwards, strict=True)]
    sides = {"h": height, "w": width}
    merged = rearrange(forwards[0], "b c (h w) -> b c h w", **sides)
    return merged if len(forwards) == 1 else merged + rearrange(forwards[1], "b c (w h) -> b c h w", **sides)


def _halves(directed: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Return the directions, axis 1, that are read forwards, and those read backwards."""
    each = list(directed.unbind(1))
    forwards = (len(each) + 1) // 2
    return each[:forwards], each[forwards:]


def sequences(maps: Float[Tensor, "B K H W C"]) -> Float[Tensor, "B K C L"]:
    """A map for each direction, each in the order of its own."""
    orders = ("b h w c -> b c (h w)", "b h w c -> b c (w h)")
    return _with_backwards(
        *([rearrange(one, order) for one, order in zip(half, orders, strict=False)] for half in _halves(maps))
    )


def project(delta: Float[Tensor, "B K H W R"], weight: Float[Tensor, "K D R"]) -> Float[Tensor, "B K H W D"]:
    """A matrix for each direction."""
    b, _, h, w, _ = delta.shape
    delta = torch.bmm(rearrange(delta, "b k h w r -> k (b h w) r"), rearrange(weight, "k d r -> k r d"))
    return rearrange(delta, "k (b h w) d -> b k h w d", b=b, h=h, w=w)


def composed(backend: str) -> Callable[..., Tensor]:
    """`cross_selective_scan` over this back end of `selective_scan`."""
    return partial(_cross_selective_scan, SCANS[backend].run)


def _cross_selective_scan(scan, x, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, delta_weight=None):
    directions, (height, width) = len(A), x.shape[1:3]
    if delta_weight is not None:
        delta = project(delta, delta_weight.to(delta.dtype))
    y = scan(
        rearrange(cross_scan(rearrange(x, "b h w d -> b d h w"), directions), "b k d l -> b (k d) l"),
        rearrange(sequences(delta), "b k d l -> b (k d) l"),
        rearrange(A, "k d n -> (k d) n"),
        sequences(B),
        sequences(C),
        None if D is None else rearrange(D, "k d -> (k d)"),
        None,
        None if delta_bias is None else rearrange(delta_bias, "k d -> (k d)"),
        delta_softplus,
    )
    y = cross_merge(rearrange(y, "b (k d) l -> b k d l", k=directions), height, width)
    return rearrange(y, "b d h w -> b h w d")
