"""Calibration by one temperature, fitted on half of the images, judged on the other (Guo et al. 2017, section 4.2).

n images · c classes
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import minimize_scalar
from torch import Tensor

from ssmclip.evaluate.statistics.metrics import ece, metric, nll

RANGE = (1e-3, 1e3)  # of temperatures
SEED = 0  # of the halves: the same images for every model


class Halves(NamedTuple):
    """Places of the images that a temperature is fitted on, and of those that it is judged on."""

    fitted: Int[Tensor, " f"]
    judged: Int[Tensor, " j"]


def halves(n: int) -> Halves:
    """Return n images' places in two halves, drawn once for all models. Raises ValueError for fewer than 2."""
    if n < 2:
        raise ValueError(f"a temperature needs at least 2 images, to be fitted and to be judged on (got {n})")
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(SEED))
    return Halves(drawn[: n // 2], drawn[n // 2 :])


def fit_temperature(logits: Float[Tensor, "n c"], target: Int[Tensor, " n"]) -> float:
    """Return the temperature, between 0.001 and 1,000, whose softmax of logits / temperature is the most likely."""
    logits = logits.double()
    found = minimize_scalar(
        lambda log_t: nll(logits / math.exp(log_t), target).item(),
        bounds=tuple(map(math.log, RANGE)),
        method="bounded",
        options={"xatol": 1e-8},
    )
    return math.exp(found.x)


@metric("temperature", "temperature that calibrates", fraction=False, chance=lambda classes: None)
def temperature(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the temperature fitted on half of the images; scores are logits. It is not fitted again for resamples."""
    fitted, _ = halves(len(target))
    value = torch.tensor(fit_temperature(scores[fitted], target[fitted]), dtype=torch.float64)
    return value if weights is None or weights.ndim == 1 else value.expand(len(weights))


@metric("calibrated_nll", "negative log-likelihood, calibrated", fraction=False, chance=math.log)
def calibrated_nll(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the negative log-likelihood on the other half of the images, at that temperature. Lower is better."""
    return nll(*_calibrated(scores, target, weights))


@metric("calibrated_ece", "expected calibration error, calibrated", chance=lambda classes: None)
def calibrated_ece(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the expected calibration error on the other half of the images, at that temperature. Lower is better."""
    return ece(*_calibrated(scores, target, weights))


def _calibrated(scores: Tensor, target: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    _, judged = halves(len(target))
    logits = scores[judged].double() / temperature(scores, target)
    return logits, target[judged], None if weights is None else weights[..., judged]
