"""Deletion and insertion curves, which test a map by what it does to the model (Petsiuk et al. 2018, arXiv:1806.07421).

Deletion takes the pixels away, most important first: a good map makes the score fall at once, its area is small.
Insertion brings them back to a blurred picture: a good map makes the score rise at once, its area is large.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torchvision.transforms.functional import gaussian_blur

__all__ = ["area", "blurred", "deletion", "insertion"]

Score = Callable[[Float[Tensor, "n c h w"]], Float[Tensor, " n"]]

BLUR, SIGMA = 11, 5.0  # pixels: the authors' insertion game


def deletion(
    score: Score, image: Float[Tensor, "c h w"], saliency: Float[Tensor, "h w"], steps: int, batch_size: int = 16
) -> Float[Tensor, " points"]:
    """Return the scores while the image turns to zero, the mean colour of a normalised one, in `steps` equal parts.

    The first is the image's own, the last that of no image. Equally important pixels go row by row.
    """
    return _curve(score, image, torch.zeros_like(image), saliency, steps, batch_size)


def insertion(
    score: Score, image: Float[Tensor, "c h w"], saliency: Float[Tensor, "h w"], steps: int, batch_size: int = 16
) -> Float[Tensor, " points"]:
    """Return the scores while a blurred image turns into the image, in `steps` equal parts."""
    return _curve(score, blurred(image), image, saliency, steps, batch_size)


def area(curve: Float[Tensor, " points"]) -> float:
    """Return the area under a curve over the share of pixels, from 0 to 1, by the trapezoidal rule."""
    return float(torch.trapezoid(curve.double()) / (len(curve) - 1))


def blurred(image: Float[Tensor, "c h w"]) -> Float[Tensor, "c h w"]:
    """Return the image under a Gaussian of 5 pixels, cut at 11 (or at the image's side, if it is smaller)."""
    side = min(BLUR, min(image.shape[-2:]) // 2 * 2 - 1)
    return image if side < 3 else gaussian_blur(image, side, SIGMA)


def _curve(
    score: Score, start: Tensor, end: Tensor, saliency: Tensor, steps: int, batch_size: int
) -> Float[Tensor, " points"]:
    if steps < 1:
        raise ValueError(f"a curve must have at least 1 step (got {steps})")
    if saliency.shape != start.shape[-2:]:
        raise ValueError(
            f"the map must have the image's {tuple(start.shape[-2:])} pixels (got {tuple(saliency.shape)})"
        )
    rank = _ranks(saliency)
    changed = [round(rank.numel() * step / steps) for step in range(steps + 1)]
    scores = []
    with torch.no_grad():
        for counts in torch.tensor(changed, device=start.device).split(batch_size):
            turned = rank < counts[:, None, None]
            scores.append(score(torch.where(turned[:, None], end, start)))
    return torch.cat(scores)


def _ranks(saliency: Float[Tensor, "h w"]) -> Int[Tensor, "h w"]:
    """0 for the most important pixel, 1 for the next ..."""
    order = saliency.flatten().argsort(descending=True, stable=True)
    ranks = torch.empty_like(order)
    ranks[order] = torch.arange(len(order), device=order.device)
    return ranks.view(saliency.shape)
