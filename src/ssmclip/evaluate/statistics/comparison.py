"""Tests of two models on the same images beside McNemar's: many at once, equivalence, agreement.

n images
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from scipy import stats
from torch import Tensor


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values adjusted for their number (Holm 1979): at most alpha for all that may be called significant while
    the probability of any mistake among them stays below alpha. Raises ValueError for values that are no probabilities.

    >>> holm([0.01, 0.04, 0.03, 0.005])
    [0.03, 0.06, 0.06, 0.02]
    """
    if wrong := [p for p in p_values if not 0 <= p <= 1]:
        raise ValueError(f"p values must be between 0 and 1 (got {wrong[0]})")
    m = len(p_values)
    order = sorted(range(m), key=lambda place: p_values[place])
    adjusted, largest = [0.0] * m, 0.0
    for rank, place in enumerate(order):
        largest = max(largest, min(1.0, (m - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def equivalence(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"], margin: float) -> float:
    """Return the p value of the hypothesis that accuracies differ by `margin` or more, by two one-sided paired t tests
    (Schuirmann 1987): a small one says that the models are on par within the margin.

    A large one says nothing, as it does in any test. margin: as a fraction of the images. Raises ValueError unless it
    is between 0 and 1, and for fewer than 2 images.
    """
    if not 0 < margin < 1:
        raise ValueError(f"the margin must be between 0 and 1 (got {margin})")
    n = len(first)
    if n < 2:
        raise ValueError(f"a test of equivalence needs at least 2 images (got {n})")
    gain = first.double() - second.double()
    mean, error = gain.mean().item(), gain.std().item() / np.sqrt(n)
    if error == 0:  # the same images right
        return 0.0 if abs(mean) < margin else 1.0
    above, below = (mean + margin) / error, (mean - margin) / error
    return float(max(stats.t.sf(above, n - 1), stats.t.cdf(below, n - 1)))


def kappa(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"]) -> float:
    """Return Cohen's kappa of which images two models have right: 1 for the same images, 0 for as many in common as
    their accuracies give by chance. NaN where both have all right, or all wrong."""
    both = torch.stack([first, second], dim=1).double()
    return weighted_kappa(torch.ones(1, len(both), dtype=torch.float64), both)[0].item()


def weighted_kappa(weights: Float[Tensor, "r k"], both: Float[Tensor, "k 2"]) -> Float[Tensor, " r"]:
    """Return kappa of rows (right by the first, right by the second) that count as often as the weights say."""
    n = weights.sum(-1)
    a, b = (weights @ both / n[:, None]).T
    expected = a * b + (1 - a) * (1 - b)
    observed = weights @ (both[:, 0] == both[:, 1]).double() / n
    return (observed - expected) / (1 - expected)  # 0 / 0 where both have all right, or all wrong
