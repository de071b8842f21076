"""The protocol of "How do vision transformers work?" (Park and Kim 2022, arXiv:2202.06709), as far as it is known.

Its code was never published. The author's own words (github.com/xxxnell/how-do-vits-work, issue 12): PyHessian, the
five eigenvalues of largest magnitude of every mini-batch, collected. So this is PyHessian's power iteration with its
defaults, and its stopping test, which is no residual: what it returns is seldom converged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from ssmclip.analyze.curvature.product import Hessian
from ssmclip.analyze.curvature.spectrum import check_k

SAMPLES, BATCH_SIZE, TOP = 3000, 15, 5
WEIGHT_DECAY = 0.05  # of the authors' vision transformers


@dataclass(frozen=True)
class PowerIteration:
    """values: float64 (k,), in the order found; residuals: |Hv - lambda v| / |lambda| at the last vector, which the
    protocol itself does not look at; products: taken by the protocol (looking at the residuals takes none)."""

    values: Tensor
    residuals: Tensor
    products: int


def power_iteration(
    hessian: Hessian,
    k: int = TOP,
    tol: float = 1e-3,
    max_iterations: int = 100,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PowerIteration:
    """Return the k eigenvalues of largest magnitude in turn, each iterated until its quotient changes by less than tol.

    Returned is the quotient before the last, as PyHessian does. progress(products) is called after every product.
    Raises ValueError for k < 1 or above n.
    """
    check_k(k, hessian.size)
    generator = torch.Generator().manual_seed(seed)
    before = hessian.products
    found: list[Tensor] = []
    values, residuals = [], []
    for _ in range(k):
        v = torch.randn(hessian.size, generator=generator, dtype=hessian.dtype).to(hessian.device)
        v = _unit(v)
        value = None
        for _ in range(max_iterations):
            v = _unit(_without(v, found))
            product = hessian(v)
            if progress:
                progress(hessian.products - before)
            quotient = _dot(product, v)
            residual = _norm(product - quotient * v)
            v = _unit(product)
            if value is not None and abs(quotient - value) / (abs(value) + 1e-6) < tol:
                break
            value = quotient
        found.append(v)
        values.append(value)
        residuals.append(residual / abs(quotient) if quotient else 0.0)
    return PowerIteration(
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(residuals, dtype=torch.float64),
        hessian.products - before,
    )


def power_to_residual(
    hessian: Hessian,
    k: int = TOP,
    tol: float = 1e-3,
    max_products: int = 1000,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PowerIteration:
    """Continue the same iteration until the residual is tol, to count the products it takes to converge.

    That residual is of the matrix without the vectors found before: their own errors no later vector can mend, so that
    the residuals returned, of the matrix itself, may be larger. After max_products the rest is left as it is.
    Raises ValueError for k < 1 or above n.
    """
    check_k(k, hessian.size)
    generator = torch.Generator().manual_seed(seed)
    before = hessian.products
    found: list[Tensor] = []
    values, residuals = [], []
    for place in range(1, k + 1):
        v = torch.randn(hessian.size, generator=generator, dtype=hessian.dtype).to(hessian.device)
        late = True
        while late:
            v = _without(v, found)
            v = v / _norm(v)
            product = hessian(v)
            taken = hessian.products - before
            if progress:
                progress(taken)
            quotient = _dot(product, v)
            rest = product - quotient * v
            late = _norm(_without(rest, found)) > tol * abs(quotient) and taken < max_products - (k - place)
            if late:
                v = product
        found.append(v)
        values.append(quotient)
        residuals.append(_norm(rest) / abs(quotient) if quotient else 0.0)
    return PowerIteration(
        torch.tensor(values, dtype=torch.float64), torch.tensor(residuals, dtype=torch.float64), taken
    )


def penalty(parameters: Iterable[Tensor], weight_decay: float) -> Tensor:
    """Return weight_decay / 2 times the sum of squares: the L2 term of "NLL + L2". It shifts all eigenvalues by it.

    Which form the authors used is not known. The sum of the tensors' norms, as their notebook of loss surfaces has it,
    has no second derivative at a bias of zero, where every model starts.
    """
    return 0.5 * weight_decay * sum(p.square().sum() for p in parameters)


def _unit(v: Tensor) -> Tensor:
    return v / (torch.linalg.vector_norm(v, dtype=torch.float64).to(v.dtype) + 1e-6)


def _norm(v: Tensor) -> float:
    return float(torch.linalg.vector_norm(v, dtype=torch.float64))


def _without(v: Tensor, found: Iterable[Tensor]) -> Tensor:
    for u in found:
        v = v - _dot(v, u) * u
    return v


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))
