"""Eigenvalues of a symmetric matrix known by its products: Lanczos, and the power iteration the field uses instead.

V orthonormal basis · T = V'HV · R pending vectors: HV = VT + R C

Lanczos here keeps T whole and orthogonalises against all of V, twice, so that a converged value never comes back as a
ghost; it restarts thick (Wu and Simon 2000, doi:10.1137/S0895479898334605) when the basis is full. What symmetry
predicts of every new column of T is compared with what the product gives: the check u'Hv = v'Hu, at no cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ssmclip.analyze.curvature.product import Hessian

BASIS_BYTES = 2**30  # memory for the basis before it is restarted
MAX_BASIS = 300  # vectors of the basis, however small they are
BLOCK = 4096  # entries summed in the vectors' own precision before float64 takes over
CHEAP = 64  # vectors of the basis up to which convergence is looked at after every product
MISSED = 0.01  # probability of a missed copy of an eigenvalue that ends the search for copies


@dataclass(frozen=True)
class Ends:
    """One number for each eigenvalue of `Spectrum.largest`, `.smallest` and `.by_magnitude`, in their order."""

    largest: Tensor
    smallest: Tensor
    by_magnitude: Tensor


@dataclass(frozen=True)
class Spectrum:
    """The ends of a spectrum, float64 on the CPU, k values each.

    largest: most positive first; smallest: most negative first; by_magnitude: largest absolute value first.
    residuals: |Hv - lambda v| / |lambda|, v the unit eigenvector found; below the rounding of the products, where a
        relative error means nothing, the denominator stays at what rounding allows. It bounds the relative error.
    converged: residual <= tol. An eigenvalue that was not asked for (`which`) may well not be.
    found_after: products taken when it first was converged, -1 if it is not.
    products: Hessian-vector products taken in all; size: n, the number of parameters; loss: at these parameters;
    asymmetry: the largest difference seen between u'Hv and v'Hu, relative to |H|.
    vectors: the eigenvectors (k, n) of `largest` and `smallest` where they were asked for.
    """

    largest: Tensor
    smallest: Tensor
    by_magnitude: Tensor
    residuals: Ends
    converged: Ends
    found_after: Ends
    products: int
    size: int
    asymmetry: float
    loss: float
    vectors: Ends | None = None


def hessian_eigenvalues(
    loss: Callable[[], Tensor],
    parameters: Any,
    k: int = 5,
    tol: float = 1e-3,
    *,
    which: str = "both",
    copies: bool = True,
    max_products: int = 1000,
    seed: int = 0,
    vectors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Spectrum:
    """Return the k most positive, k most negative and k largest (by magnitude) eigenvalues of the loss's Hessian.

    loss() -> scalar tensor; parameters: a module, tensors, (name, tensor) pairs or a mapping.
    tol: relative residual that makes an eigenvalue converged; those that are not after max_products are marked.
    which: what has to converge: both ends, or only one of them, or the largest magnitudes, which takes fewer products.
    copies: look for further copies of equal eigenvalues, which Lanczos from one vector can't see, until missing one has
        a probability below 1 % (Kuczynski and Wozniakowski 1992, doi:10.1137/0613066, theorem 4.2). It takes about half
        as many products again; without it an eigenvalue of multiplicity m counts once, or m times by rounding.
    progress(products) is called after every product.

    Raises ValueError for k < 1, k larger than the number of parameters and tol <= 0, and what `Hessian` raises.

    >>> x = torch.zeros(4, requires_grad=True)
    >>> curvature = torch.tensor([3.0, -2.0, 0.5, 3.0])
    >>> r = hessian_eigenvalues(lambda: (0.5 * curvature * x**2).sum() + x[0], [x], k=2)
    >>> [[round(value, 4) for value in end.tolist()] for end in (r.largest, r.smallest, r.by_magnitude)], r.products
    ([[3.0, 3.0], [-2.0, 0.5], [3.0, 3.0]], 4)
    """
    hessian = Hessian(loss, parameters)
    return extreme_eigenvalues(hessian, k, tol, which, copies, max_products, seed, vectors, progress)


def extreme_eigenvalues(
    hessian: Hessian,
    k: int = 5,
    tol: float = 1e-3,
    which: str = "both",
    copies: bool = True,
    max_products: int = 1000,
    seed: int = 0,
    vectors: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Spectrum:
    """Return `hessian_eigenvalues` of an existing Hessian."""
    check_k(k, hessian.size)
    check_search(tol, which)
    before = hessian.products
    basis = Basis(hessian, seed, least=4 * k + 12)
    enough = min(hessian.size, 2 * k if which == "both" else k)  # with fewer, both ends would be the same values
    report = progress or (lambda taken: None)
    found: dict[tuple[str, int], int] = {}
    first_run = 0  # products until the first time that everything was converged
    at_start: np.ndarray | None = None  # what was wanted when the present search for copies began
    while True:
        basis.expand()
        taken = hessian.products - before
        report(taken)
        last = basis.size == hessian.size or taken >= max_products
        if basis.size > CHEAP and basis.size % 4 and not (last or basis.full):
            continue  # looking would take longer than the products do
        ritz = basis.ritz(tol)
        wanted = places(ritz.values, k, which)
        late = [i for i in wanted if ritz.residuals[i] > tol]
        _note(found, ritz, k, tol, taken)
        missing = late or basis.size < enough
        if last or (not missing and not copies):
            break
        if missing:
            basis.aim(ritz, late)
        else:
            values = ritz.values[wanted]
            first_run = first_run or taken
            if at_start is None or _differ(values, at_start, tol, basis.rounding):
                at_start = values
                basis.begin_chain()
            elif basis.chain_steps >= first_run or _chance_of_a_copy(basis, ritz.values, k, which) < MISSED:
                break
        if basis.full:
            basis.restart(ritz, which)
    return _spectrum(hessian, basis, ritz, k, tol, found, vectors, taken)


def check_search(tol: float, which: str) -> None:
    """Raise ValueError unless `hessian_eigenvalues` takes these."""
    if not tol > 0:
        raise ValueError(f"tol must be a relative residual above 0, such as 1e-3 (got {tol})")
    if which not in ("both", "largest", "smallest", "magnitude"):
        raise ValueError(f"which must be 'both', 'largest', 'smallest' or 'magnitude' (got {which!r})")


def check_k(k: int, size: int | None = None) -> None:
    """Raise ValueError unless 1 <= k, and k <= size where the size is known."""
    if k < 1:
        raise ValueError(f"k must be at least 1 (got {k})")
    if size is not None and k > size:
        raise ValueError(f"k must be at most {size}, the number of parameters (got {k})")


def places(values: np.ndarray, k: int, which: str) -> list[int]:
    """Return the places of the requested eigenvalues in the rising `values`."""
    ranked = range(len(values))
    chosen = {
        "largest": list(ranked)[-k:],
        "smallest": list(ranked)[:k],
        "magnitude": np.argsort(-np.abs(values), kind="stable")[:k].tolist(),
    }
    chosen["both"] = sorted({*chosen["largest"], *chosen["smallest"]})
    return chosen[which]


@dataclass(frozen=True)
class Ritz:
    """values: rising; vectors: in the basis, as columns; residuals: as in `Spectrum`; shares: what each pending vector
    contributes to each residual (pending, m)."""

    values: np.ndarray
    vectors: np.ndarray
    residuals: np.ndarray
    shares: np.ndarray


class Basis:
    """An orthonormal basis V of m vectors that grows by one product at a time, and T = V'HV.

    A pending vector is what a product left outside V; the next vector of V is one of them, or a random one, which
    begins a chain of its own; chain_steps: how long the present one is.
    """

    def __init__(self, hessian: Hessian, seed: int, least: int):
        self.hessian = hessian
        n, item = hessian.size, torch.finfo(hessian.dtype).bits // 8
        self.capacity = min(n, max(least, min(MAX_BASIS, BASIS_BYTES // (item * n))))
        self._block = min(n, BLOCK)
        blocks = math.ceil(n / self._block)
        self._V = torch.zeros(self.capacity, blocks, self._block, dtype=hessian.dtype, device=hessian.device)
        self._T = np.zeros((self.capacity, self.capacity))
        self._generator = torch.Generator().manual_seed(seed)
        self._pending: list[Tensor] = []
        self._C = np.zeros((0, 0))
        self._next: int | None = None
        self.size = 0
        self.scale = 0.0  # of H: the longest product seen
        self.asymmetry = 0.0
        self._chain = 0
        self.chain_steps, self._seen = 0, (math.inf, -math.inf)

    @property
    def rounding(self) -> float:
        """Return the size of a residual, or of a difference of eigenvalues, that may be nothing but rounding."""
        return 100 * torch.finfo(self.hessian.dtype).eps * self.scale

    @property
    def exhausted(self) -> bool:
        """Return whether the next vector would be nothing but rounding: the basis spans an invariant space."""
        return self._next is not None and _norm(self._pending[self._next]) <= self.rounding

    @property
    def full(self) -> bool:
        return self.size == self.capacity < self.hessian.size

    def expand(self) -> None:
        """Add a vector and take the product with it. Raises NotTwiceDifferentiable if the matrix is not symmetric."""
        v = self._new_vector()
        m = self.size
        along = np.array([_dot(v, r) for r in self._pending])
        for r, a in zip(self._pending, along, strict=True):
            r.sub_(v, alpha=a)
        expected = along @ self._C if len(along) else np.zeros(m)
        if self._next is not None:
            del self._pending[self._next]
            self._C = np.delete(self._C, self._next, axis=0)
        self._V[m].view(-1)[: len(v)] = v
        self.size += 1

        w = self.hessian(v)
        self.scale = max(self.scale, _norm(w))
        w, column = self._orthogonal(w)
        off = float(np.linalg.norm(column[:m] - expected))
        self.asymmetry = max(self.asymmetry, off / self.scale if self.scale else 0.0)
        if self.asymmetry > SYMMETRIC[self.hessian.dtype]:
            self.hessian.refuse(self.asymmetry)
        self._T[:m, m] = self._T[m, :m] = (column[:m] + expected) / 2
        self._T[m, m] = column[m]
        self._C = np.pad(self._C, ((0, 1), (0, 1)))
        self._C[-1, m] = 1
        self._pending.append(w)
        self._next = len(self._pending) - 1
        self.chain_steps += 1

    def _new_vector(self) -> Tensor:
        if self._next is not None:
            if not self.exhausted:
                v = self._pending[self._next]
                v, _ = self._orthogonal(v / _norm(v))
                if (length := _norm(v)) > 0.5:
                    return v / length
        # Nothing is left to follow, the space is invariant: what H does elsewhere is still to be seen.
        for _ in range(10):
            v = torch.randn(self.hessian.size, generator=self._generator, dtype=self.hessian.dtype)
            v, _ = self._orthogonal(v.to(self.hessian.device) / self.hessian.size**0.5)
            if (length := _norm(v)) > 1e-3 / self.hessian.size**0.5:
                v, _ = self._orthogonal(v / length)
                return v / _norm(v)
        raise RuntimeError(f"found no vector outside a basis of {self.size} in {self.hessian.size} dimensions")

    def _orthogonal(self, w: Tensor) -> tuple[Tensor, np.ndarray]:
        """Return w without its part in V, and the coefficients of that part, by Gram-Schmidt applied twice."""
        blocks, block = self._V.shape[1:]
        w = torch.nn.functional.pad(w, (0, blocks * block - len(w))).clone()
        total = np.zeros(self.size)
        if self.size:
            V = self._V[: self.size]
            for _ in range(2):
                # Sums of millions of float32 products drift: block by block, then in float64.
                parts = torch.bmm(V.transpose(0, 1), w.view(blocks, block, 1))
                coefficients = parts.double().sum(0).squeeze(1)
                w -= coefficients.to(w.dtype) @ V.flatten(1)
                total += coefficients.cpu().numpy()
        return w[: self.hessian.size], total

    def ritz(self, tol: float) -> Ritz:
        """Return the eigenvalues of T and their residuals as eigenvalues of H."""
        m = self.size
        values, vectors = np.linalg.eigh(self._T[:m, :m])
        shares = self._C @ vectors
        gram = np.array([[_dot(a, b) for b in self._pending] for a in self._pending])
        lengths = np.sqrt(np.maximum(np.einsum("pi,pq,qi->i", shares, gram, shares), 0))
        if m == self.hessian.size:
            lengths = np.zeros(m)
        size = np.maximum(np.abs(values), self.rounding / tol)
        residuals = np.divide(lengths, size, out=np.zeros(m), where=lengths > 0)
        return Ritz(values, vectors, residuals, np.sqrt(np.diag(gram))[:, None] * np.abs(shares))

    def aim(self, ritz: Ritz, late: list[int]) -> None:
        """Continue from the pending vector that contributes most to the residuals of the eigenvalues `late`."""
        if late:
            self._next = int(ritz.shares[:, late].max(axis=1).argmax())

    def chain_ends(self) -> tuple[float, float]:
        """Return the extreme eigenvalues of H as seen in the present chain."""
        inner = np.linalg.eigvalsh(self._T[self._chain : self.size, self._chain : self.size])
        return min(self._seen[0], *inner), max(self._seen[1], *inner)

    def begin_chain(self) -> None:
        """Continue from a random vector."""
        self._next = None
        self._chain = self.size
        self.chain_steps, self._seen = 0, (math.inf, -math.inf)

    def restart(self, ritz: Ritz, which: str) -> None:
        """Keep the Ritz vectors of the wanted end (or half of them from each) and the pending vectors."""
        self._seen = self.chain_ends()
        keep = self.capacity // 2
        low = {"largest": 0, "smallest": keep}.get(which, keep // 2)
        chosen = [*range(low), *range(self.size - (keep - low), self.size)]
        S = torch.from_numpy(ritz.vectors[:, chosen]).to(self._V.dtype).to(self._V.device)
        V = self._V.flatten(1)
        for start in range(0, V.shape[1], 2**20):
            piece = V[: self.size, start : start + 2**20]
            V[:keep, start : start + 2**20] = S.T @ piece
        self._T[:] = 0
        self._T[:keep, :keep] = np.diag(ritz.values[chosen])
        self._C = self._C @ ritz.vectors[:, chosen]
        self.size = self._chain = keep

    def combine(self, columns: np.ndarray) -> Tensor:
        """Return (j, n): the vectors whose coefficients in the basis are the j columns."""
        S = torch.from_numpy(columns).to(self._V.dtype).to(self._V.device)
        return (S.T @ self._V[: self.size].flatten(1))[:, : self.hessian.size]


# How far u'Hv and v'Hu of a true Hessian may be apart, relative to |H|, by rounding in models of some depth.
SYMMETRIC = {torch.float32: 2e-3, torch.float64: 1e-7}


def _chance_of_a_copy(basis: Basis, values: np.ndarray, k: int, which: str) -> float:
    """Return a bound on the probability that an eigenvalue beyond the requested ones has no part in the basis."""
    low, high = values[0], values[-1]
    level = np.sort(np.abs(values))[-k]
    levels = {
        "both": (values[k - 1], values[-k]),
        "largest": (-math.inf, values[-k]),
        "smallest": (values[k - 1], math.inf),
        "magnitude": (-level, level),
    }
    below, above = levels[which]
    chance = 0.0
    chain_low, chain_high = basis.chain_ends()
    for gap, width in ((above - chain_high, above - low), (chain_low - below, high - below)):
        if math.isfinite(gap):
            part = math.sqrt(max(gap, 0.0) / width) if width > 0 else 0.0
            chance += 1.648 * math.sqrt(basis.hessian.size) * math.exp(-part * (2 * basis.chain_steps - 1))
    return chance


def _differ(values: np.ndarray, others: np.ndarray, tol: float, rounding: float) -> bool:
    return len(values) != len(others) or not np.allclose(values, others, rtol=2 * tol, atol=rounding)


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum(dtype=torch.float64))


def _norm(a: Tensor) -> float:
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def _ends(values: np.ndarray, k: int) -> dict[str, list[int]]:
    return {
        "largest": places(values, k, "largest")[::-1],
        "smallest": places(values, k, "smallest"),
        "by_magnitude": places(values, k, "magnitude"),
    }


def _note(found: dict[tuple[str, int], int], ritz: Ritz, k: int, tol: float, taken: int) -> None:
    """Record since when the eigenvalue at each place has been converged."""
    for end, chosen in _ends(ritz.values, k).items():
        for place, i in enumerate(chosen):
            if ritz.residuals[i] > tol:
                found.pop((end, place), None)
            else:
                found.setdefault((end, place), taken)


def _spectrum(
    hessian: Hessian,
    basis: Basis,
    ritz: Ritz,
    k: int,
    tol: float,
    found: dict[tuple[str, int], int],
    vectors: bool,
    taken: int,
) -> Spectrum:
    chosen = _ends(ritz.values, k)
    values = {end: torch.from_numpy(ritz.values[i]) for end, i in chosen.items()}
    residuals = {end: torch.from_numpy(ritz.residuals[i]) for end, i in chosen.items()}
    after = {end: torch.tensor([found.get((end, j), -1) for j in range(len(i))]) for end, i in chosen.items()}
    return Spectrum(
        **values,
        residuals=Ends(**residuals),
        converged=Ends(**{end: r <= tol for end, r in residuals.items()}),
        found_after=Ends(**after),
        products=taken,
        size=hessian.size,
        asymmetry=basis.asymmetry,
        loss=hessian.value,
        vectors=Ends(**{end: basis.combine(ritz.vectors[:, i]) for end, i in chosen.items()}) if vectors else None,
    )
