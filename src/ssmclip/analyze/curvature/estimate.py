"""Estimates of a whole spectrum from random vectors: the trace (Hutchinson 1989) and the density (stochastic Lanczos
quadrature, Golub and Welsch 1969; Ubaru, Chen and Saad 2017, doi:10.1137/16M1104974).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from ssmclip.analyze.curvature.product import Hessian
from ssmclip.analyze.curvature.spectrum import Basis


class Estimate(NamedTuple):
    """A mean over n random probes and its standard error (NaN for one probe)."""

    value: float
    standard_error: float
    probes: int


@dataclass(frozen=True)
class Density:
    """The share of eigenvalues at each node, as (probes, steps) arrays: weights sum to 1 in every line.

    A Gauss quadrature: sums of weight x f(node) are exact means of f for polynomials f of degree 2 steps - 1, up to
    the noise of the probes. size: n, the number of eigenvalues.
    """

    nodes: np.ndarray
    weights: np.ndarray
    size: int

    def mean(self, f) -> Estimate:
        """Return the mean of f over the eigenvalues, with the error of having so few probes."""
        return _estimate((self.weights * f(self.nodes)).sum(axis=1))

    def share_below(self, threshold: float) -> Estimate:
        """Return the share of eigenvalues under `threshold`. It is noisy near zero, where most of them are."""
        return self.mean(lambda x: x < threshold)

    @property
    def negative_mass(self) -> float:
        """Return the sum of the negative eigenvalues' magnitudes as a share of the sum of all magnitudes."""
        absolute = (self.weights * np.abs(self.nodes)).sum()
        return float(-(self.weights * np.minimum(self.nodes, 0)).sum() / absolute) if absolute else 0.0


def trace(hessian: Hessian, probes: int = 30, seed: int = 0) -> Estimate:
    """Return Hutchinson's estimate of the sum of all eigenvalues: the mean of z'Hz over random sign vectors z.

    One product per probe. Raises ValueError for no probes.
    """
    _check("probes", probes)
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(probes):
        z = _signs(hessian, generator)
        samples.append(float((z * hessian(z)).sum(dtype=torch.float64)))
    return _estimate(np.array(samples))


def density(hessian: Hessian, probes: int = 4, steps: int = 40, seed: int = 0) -> Density:
    """Return the density by stochastic Lanczos quadrature with probes x steps products.

    Raises ValueError for no probes or steps.
    """
    _check("probes", probes)
    _check("steps", steps)
    steps = min(steps, hessian.size)
    nodes, weights = np.zeros((2, probes, steps))
    for i in range(probes):
        # A basis begins with a normal vector: its direction is uniform, which makes the weights unbiased.
        basis = Basis(hessian, seed=seed + i, least=steps)
        while basis.size < steps and not (basis.size and basis.exhausted):
            basis.expand()
        ritz = basis.ritz(tol=1.0)
        nodes[i, : basis.size] = ritz.values
        weights[i, : basis.size] = ritz.vectors[0] ** 2
    return Density(nodes, weights, hessian.size)


def _signs(hessian: Hessian, generator: torch.Generator) -> torch.Tensor:
    bits = torch.randint(0, 2, (hessian.size,), generator=generator)
    return (2 * bits - 1).to(hessian.device, hessian.dtype)


def _estimate(samples: np.ndarray) -> Estimate:
    spread = samples.std(ddof=1) / math.sqrt(len(samples)) if len(samples) > 1 else math.nan
    return Estimate(float(samples.mean()), float(spread), len(samples))


def _check(name: str, given: int) -> None:
    if given < 1:
        raise ValueError(f"{name} must be at least 1 (got {given})")
