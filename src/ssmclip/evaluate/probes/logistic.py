"""Multinomial logistic regression by L-BFGS: scikit-learn's optimum in a fraction of its time.

n images · d features · r independent directions among them · c classes

    C sum_i -log softmax(W x_i + b)[y_i]  +  1/2 |W|^2        the intercept b is not penalised

It is minimised in other coordinates, which leaves the optimum where it is: features are centred and rotated to their
principal axes, and each axis is scaled so that the curvature is about 1 in every direction. L-BFGS then needs tens of
steps where it needs hundreds, or does not converge, along the directions in which features hardly vary.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int
from scipy import linalg, optimize, special
from threadpoolctl import threadpool_limits

MAX_ITERATIONS = 1000  # Radford et al. 2021, A.3
TOLERANCE = 1e-6  # largest slope left, per image, in coordinates whose curvature is about 1
BLOCK = 2**22  # logits held at a time
FEW = 64  # classes: below, products wait for memory, and threads that wait for each other only cost time


@dataclass(frozen=True)
class Logistic:
    """A classifier. C: the inverse strength of the penalty it was fitted with; converged: whether the optimum was
    reached, in MAX_ITERATIONS steps."""

    weight: Float[np.ndarray, "c d"]
    intercept: Float[np.ndarray, " c"]
    C: float
    converged: bool

    def scores(self, features: Float[np.ndarray, "n d"]) -> Float[np.ndarray, "n c"]:
        """Return the logits of images, float64."""
        return features.astype(np.float64) @ self.weight.T + self.intercept


class Regression:
    """Logistic regressions on the same images for several C, each begun where the last one ended.

    features: (n, d), finite; labels: 0 ... classes - 1, each of which occurs. Raises ValueError for one class.
    """

    def __init__(self, features: Float[np.ndarray, "n d"], labels: Int[np.ndarray, " n"], classes: int):
        if classes < 2:
            raise ValueError(f"logistic regression needs images of at least 2 classes (got {classes})")
        exact = features.astype(np.float64)
        self.labels, self.classes = labels, classes
        self.mean = exact.mean(axis=0)
        self.axes, self.variances, self.rotated = _principal(exact - self.mean)
        # What begins a fit: no weights, and the classes' frequencies.
        self._last = np.zeros((len(self.variances), classes)), _log_frequencies(labels, classes)

    def fit(self, C: float, tolerance: float = TOLERANCE) -> Logistic:
        """Return the optimum for one C, the inverse of the penalty's strength, as in scikit-learn."""
        # Two classes share one weight vector in scikit-learn; as two opposite ones they are penalised half as much.
        strength = C * len(self.labels) / (2 if self.classes == 2 else 1)
        curvature = self._curvature()
        scale = 1 / np.sqrt(1 / strength + curvature * self.variances)[:, None]
        of_intercept = 1 / np.sqrt(curvature)

        def objective(point: np.ndarray) -> tuple[float, np.ndarray]:
            scaled, shift = point[: self._last[0].size].reshape(self._last[0].shape), point[self._last[0].size :]
            weight = scale * scaled
            loss, of_weight, of_shift = self._loss(weight, of_intercept * shift)
            loss += (weight * weight).sum() / (2 * strength)
            slope = scale * (of_weight + weight / strength)
            return loss, np.concatenate([slope.ravel(), of_intercept * of_shift])

        weight, shift = self._last
        start = np.concatenate([(weight / scale).ravel(), shift / of_intercept])
        options = {"maxiter": MAX_ITERATIONS, "maxfun": 2 * MAX_ITERATIONS, "gtol": tolerance, "ftol": 0, "maxls": 50}
        with threadpool_limits(1 if self.classes < FEW else None, "blas"):
            result = optimize.minimize(objective, start, jac=True, method="L-BFGS-B", options=options)
        weight = scale * result.x[: weight.size].reshape(weight.shape)
        shift = of_intercept * result.x[weight.size :]
        self._last = weight, shift
        self.steps = result.nit
        whole = self.axes @ weight
        return Logistic(whole.T, shift - self.mean @ whole, C, bool(np.abs(result.jac).max() <= tolerance))

    def _curvature(self) -> float:
        """Return the mean curvature of the loss of an image in a logit, where the next fit begins."""
        weight, shift = self._last
        total = 0.0
        for part in self._blocks():
            chances = special.softmax(self.rotated[part] @ weight + shift, axis=1)
            total += (chances * (1 - chances)).sum()
        return max(total / (len(self.labels) * self.classes), 1e-4)

    def _loss(self, weight: np.ndarray, shift: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        """Return the mean loss and its slopes, block by block."""
        loss, of_weight, of_shift = 0.0, np.zeros_like(weight), np.zeros_like(shift)
        for part in self._blocks():
            rows, labels = self.rotated[part], self.labels[part]
            logits = rows @ weight
            logits += shift
            logits -= logits.max(axis=1, keepdims=True)
            right = np.arange(len(labels)), labels
            loss -= logits[right].sum()
            np.exp(logits, out=logits)
            total = logits.sum(axis=1, keepdims=True)
            loss += np.log(total).sum()
            logits /= total
            logits[right] -= 1
            of_weight += rows.T @ logits
            of_shift += logits.sum(axis=0)
        n = len(self.labels)
        return loss / n, of_weight / n, of_shift / n

    def _blocks(self) -> list[slice]:
        size = max(1, BLOCK // self.classes)
        return [slice(start, start + size) for start in range(0, len(self.labels), size)]


def _principal(
    centred: Float[np.ndarray, "n d"],
) -> tuple[Float[np.ndarray, "d r"], Float[np.ndarray, " r"], Float[np.ndarray, "n r"]]:
    """Return principal axes, the variance along each, and the images' coordinates on them.

    Directions without variance are left out: there the penalty alone decides, for a weight of 0.
    """
    n, d = centred.shape
    if n < d:
        values, vectors = linalg.eigh(centred @ centred.T)
        kept = _positive(values, d)
        lengths = np.sqrt(values[kept])
        rotated = vectors[:, kept] * lengths
        return (centred.T @ vectors[:, kept]) / lengths, values[kept] / n, rotated
    values, vectors = linalg.eigh(centred.T @ centred)
    kept = _positive(values, n)
    axes = np.ascontiguousarray(vectors[:, kept])
    return axes, values[kept] / n, centred @ axes


def _positive(values: np.ndarray, size: int) -> np.ndarray:
    return values > max(values.max(initial=0.0), 0.0) * size * np.finfo(np.float64).eps


def _log_frequencies(labels: np.ndarray, classes: int) -> np.ndarray:
    shares = np.log(np.bincount(labels, minlength=classes) / len(labels))
    return shares - shares.mean()
