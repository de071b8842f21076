"""Examples for a report: small images, and the model's answers to them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ssmclip.data.images import thumbnail
from ssmclip.rows.payloads import Match


def thumbnails(dataset: Any, places: Sequence[int]) -> dict[str, str]:
    """Return place (as text, for JSON) -> thumbnail of `dataset[place]`."""
    pictures = {}
    for place in dict.fromkeys(places):
        item = dataset[place]
        pictures[str(place)] = thumbnail(item[0] if isinstance(item, tuple) else item)
    return pictures


def draw(n: int, count: int, seed: int) -> list[int]:
    """Return `count` of n places at random, so that examples are not selected."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:count].tolist()


def found(scores: Tensor, items: Sequence[str], right: set[int], top: int) -> list[Match]:
    """Return the `top` items by scores (m,): which, how high, and whether it is one of the right places."""
    best = scores.topk(min(top, len(scores)))
    pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [Match(item=items[place], score=round(score, 4), right=place in right) for place, score in pairs]


def matrix(scores: Tensor) -> list[list[float]]:
    """Return scores (rows, columns) as numbers for a row's `extra`."""
    return [[round(value, 4) for value in line] for line in scores.tolist()]
