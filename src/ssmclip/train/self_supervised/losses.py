"""Losses between views of an image, of features that need not have unit length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather


def nt_xent(one: Tensor, other: Tensor, temperature: float, rank: int = 0, world_size: int = 1) -> Tensor:
    """Return the mean loss of finding a view's other view among the views of all images (SimCLR, arXiv:2002.05709).

    one, other (B, E): two views of each image of this process. With s = cosine / temperature it is the mean over both
    views of -log exp s(one_i, other_i) / [sum_j exp s(one_i, other_j) + sum_{j != i} exp s(one_i, one_j)]. The
    views of all processes are negatives, gathered with gradient; each process has the rows of its own images.
    """
    one, other = (F.normalize(view.float() if view.dtype.itemsize < 4 else view, dim=-1) for view in (one, other))
    all_one, all_other = (_gathered(view, world_size) for view in (one, other))
    places = torch.arange(len(one), device=one.device) + rank * len(one)
    itself = F.one_hot(places, len(all_one)).bool()

    def loss(rows: Tensor, others: Tensor, alike: Tensor) -> Tensor:
        same_view = (rows @ alike.T / temperature).masked_fill(itself, float("-inf"))
        return F.cross_entropy(torch.cat([rows @ others.T / temperature, same_view], 1), places)

    return (loss(one, all_other, all_one) + loss(other, all_one, all_other)) / 2


def _gathered(rows: Tensor, world_size: int) -> Tensor:
    return torch.cat(all_gather(rows.contiguous())) if world_size > 1 else rows


def prediction_distance(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the mean of 2 - 2 cos between rows, without a gradient to the targets (BYOL, arXiv:2006.07733)."""
    predictions, targets = (x.float() if x.dtype.itemsize < 4 else x for x in (predictions, targets.detach()))
    return 2 - 2 * F.cosine_similarity(predictions, targets, dim=-1).mean()
