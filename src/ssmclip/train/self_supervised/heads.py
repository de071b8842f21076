"""Heads that self-supervised losses train on top of the image features: multi-layer perceptrons with batch norm."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce


class BatchNorm(nn.Module):
    """Normalise by the statistics of the batch, over all processes, in training and always: there are no others.

    It is torch's SyncBatchNorm without running statistics, on any device. Each process has as many rows.
    """

    def __init__(self, width: int, world_size: int = 1, eps: float = 1e-5):
        super().__init__()
        norm = nn.BatchNorm1d(width)
        self.weight, self.bias = norm.weight, norm.bias
        self.world_size, self.eps = world_size, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, width), normalised. Raises ValueError for one row in all."""
        if self.world_size == 1:
            return F.batch_norm(x, None, None, self.weight, self.bias, training=True, eps=self.eps)
        wide = x.float() if x.dtype.itemsize < 4 else x
        mean = all_reduce(wide.mean(0)) / self.world_size
        variance = all_reduce((wide - mean).square().mean(0)) / self.world_size
        scaled = (wide - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
        return scaled.to(x.dtype)


def mlp(widths: Sequence[int], *, bias: bool = True, world_size: int = 1) -> nn.Sequential:
    """Return linear layers from widths[0] to widths[-1], with batch norm and ReLU after each but the last."""
    layers: list[nn.Module] = []
    for given, made in pairwise(widths[:-1]):
        layers += [nn.Linear(given, made, bias=bias), BatchNorm(made, world_size), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1], bias=bias))
