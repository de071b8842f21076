"""The bootstrap of statistics that take few different values: exact, in a fraction of the time.

n images · k distinct rows · r resamples
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from ssmclip.evaluate.statistics.metrics import LEVEL

RESAMPLES = 10_000


def bootstrap_of_rows(
    statistic: Callable[[Tensor, Tensor], Tensor], rows: Tensor, *, seed: int, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the 95 % percentile interval of a statistic of images, (n, ...) rows of numbers that repeat.

    statistic: (weights (r, k), distinct rows (k, ...)) -> values (r,). How often each distinct row is drawn with
    replacement has a multinomial distribution, which is drawn at once: the same resampling as image by image, whose
    cost grows with k and not with n. Resamples whose value is NaN are left out. Raises ValueError for no images.

    >>> hits = torch.tensor([1.0] * 40_000 + [0.0] * 10_000)
    >>> low, high = bootstrap_of_rows(lambda w, hit: w @ hit / w.sum(-1), hits, seed=0)
    >>> 0.796 < low < 0.797 and 0.803 < high < 0.804
    True
    """
    if not len(rows):
        raise ValueError("the bootstrap needs at least one image (got none)")
    distinct, counts = rows.double().unique(dim=0, return_counts=True)
    share = counts.double().numpy() / len(rows)
    drawn = np.random.default_rng(seed).multinomial(len(rows), share, size=resamples)
    values = statistic(torch.from_numpy(drawn).double(), distinct).double()
    values = values[~values.isnan()]
    low, high = values.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high


def mean_interval(values: Tensor, *, seed: int, resamples: int = RESAMPLES) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values (n,), such as hits or differences of hits."""
    return bootstrap_of_rows(
        lambda weights, distinct: weights @ distinct / weights.sum(-1), values, seed=seed, resamples=resamples
    )
