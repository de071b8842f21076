"""Geometry of two sets of unit vectors, independent of retrieval.

n images · m texts · d embedding dimensions · q queries
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

K = 10  # neighbours of a query, for hubness
BLOCK = 1024


def geometry(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], owner: Int[Tensor, " m"]
) -> list[tuple[str, float]]:
    """Return (name, value) of each measure; those that need more points are omitted. owner: the image of each text."""
    measures = [("alignment", alignment(images[owner], texts)), ("modality_gap", modality_gap(images, texts))]
    for name, points, queries in (("image", images, texts), ("text", texts, images)):
        if len(points) > 1:
            measures.append((f"{name}_uniformity", uniformity(points)))
        if len(points) > K:
            measures.append((f"{name}_hubness", hubness(queries, points)))
    return measures


def k_occurrence(queries: Float[Tensor, "q d"], items: Float[Tensor, "m d"], k: int = K) -> Int[Tensor, " m"]:
    """Return how many queries have each item among their k nearest (by dot product), `BLOCK` queries at a time."""
    counts = torch.zeros(len(items), dtype=torch.int64)
    for block in queries.split(BLOCK):
        counts += torch.bincount((block @ items.T).topk(k, dim=1).indices.flatten(), minlength=len(items))
    return counts


def hubness(queries: Float[Tensor, "q d"], items: Float[Tensor, "m d"], k: int = K) -> float:
    """Return the skewness of the k-occurrence (Radovanovic et al. 2010): above 0, a few items are near to everything.

    0 when every item occurs equally often.
    """
    counts = k_occurrence(queries, items, k).double()
    off = counts - counts.mean()
    spread = off.square().mean().sqrt()
    return 0.0 if spread == 0 else (off.pow(3).mean() / spread.pow(3)).item()


def alignment(first: Float[Tensor, "m d"], second: Float[Tensor, "m d"]) -> float:
    """Return the mean squared distance between the two of a pair (Wang and Isola 2020, equation 1 with alpha = 2)."""
    return (first - second).double().square().sum(dim=1).mean().item()


def uniformity(points: Float[Tensor, "n d"], t: float = 2.0) -> float:
    """Return log mean exp(-t |x - y|^2) over different points (Wang and Isola 2020, equation 2); low: even."""
    n = len(points)
    total = 0.0
    for block in points.split(BLOCK):
        squared = (2 - 2 * (block @ points.T)).clamp(min=0)
        total += torch.exp(-t * squared).double().sum().item()
    # A point's distance to itself is 0, up to rounding of its unit length.
    own = torch.exp(-t * (2 - 2 * points.square().sum(dim=1)).clamp(min=0)).double().sum().item()
    return torch.tensor((total - own) / (n * (n - 1)), dtype=torch.float64).log().item()


def modality_gap(images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"]) -> float:
    """Return the distance between the two centres (Liang et al. 2022, section 2)."""
    return (images.double().mean(dim=0) - texts.double().mean(dim=0)).norm().item()
