"""The effective receptive field: which pixels move the feature in the middle (Luo et al. 2016, arXiv:1701.04128)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ssmclip.analyze.saliency.positions import evaluating, last_map

__all__ = ["logarithmic", "receptive_field", "share_of_area"]

DECADES = 4  # of the logarithmic map


def receptive_field(network: nn.Module, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "h w"]:
    """Return the magnitude of the derivative of the centre's features with respect to each pixel.

    The features are the positive ones in the middle of the image tower's last map, summed over channels, as in the
    figures of RepLKNet and VMamba (all of them add up to a constant behind a LayerNorm with equal weights); magnitudes
    are summed over colours and averaged over the images. Raises ValueError as `last_map` does, for no images, and where
    the features do not depend on the image.
    """
    if not len(images):
        raise ValueError("no images to average over: give at least one")
    total = torch.zeros(images.shape[-2:], dtype=images.dtype, device=images.device)
    with evaluating(network):
        for image in images:
            pixels = image[None].detach().requires_grad_()
            features = last_map(network, pixels).features
            centre = features[:, features.shape[1] // 2, features.shape[2] // 2].relu().sum()
            (gradient,) = torch.autograd.grad(centre, pixels)
            total += gradient[0].abs().sum(0)
    if not total.any():
        raise ValueError(f"the last features of {type(network).__name__} do not depend on the image: train it first")
    return total / len(images)


def logarithmic(field: Float[Tensor, "h w"]) -> Float[Tensor, "h w"]:
    """Return the field on a logarithmic scale: 1 for its maximum, 0 for 1e-4 of that and less."""
    return 1 + (field / field.max()).clamp(min=10.0**-DECADES).log10() / DECADES


def share_of_area(field: Float[Tensor, "h w"], share: float) -> float:
    """Return the area of the smallest box around the middle that holds this share of the field, over the image's.

    The box has the image's shape. Small means that the middle sees little more than its surroundings.
    """
    height, width = field.shape
    total = field.sum()
    for row in range((height + 1) // 2 + 1):
        # As far from the middle as the edge is, over the image's height or width.
        column = round(row * width / height)
        rows = slice(max(height // 2 - row, 0), height // 2 + row + 1)
        columns = slice(max(width // 2 - column, 0), width // 2 + column + 1)
        box = field[rows, columns]
        if box.sum() >= share * total * (1 - 1e-12):
            return box.numel() / field.numel()
    return 1.0
