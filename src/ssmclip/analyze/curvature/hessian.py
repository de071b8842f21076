"""A model's Hessian spectrum, batch by batch, as rows."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ssmclip.analyze.curvature import park_kim
from ssmclip.analyze.curvature.batches import to_model
from ssmclip.analyze.curvature.estimate import density, trace
from ssmclip.analyze.curvature.parameters import only_read_rows, tower_parameters
from ssmclip.analyze.curvature.product import Hessian, OutOfMemory
from ssmclip.analyze.curvature.spectrum import check_k, check_search, extreme_eigenvalues
from ssmclip.rows import Result
from ssmclip.rows.condition import Where
from ssmclip.rows.tasks import HESSIAN, LANCZOS, POWER, PROTOCOLS
from ssmclip.train.objective import contrastive_loss


@dataclass(frozen=True)
class SpectrumSettings:
    """How a batch's spectrum is measured.

    protocol: "lanczos" (to a relative residual of tol), "park-kim" or, gone on with to that residual, "power" (see
    `analyze/park_kim.py`);
    which: what Lanczos has to converge, "both" ends or, in fewer products, "magnitude"; copies: as in
    `hessian_eigenvalues`; weight_decay: of an L2 term in the loss; density_probes: of the spectral density and the
    trace, none of either for 0. Raises ValueError for values that no model could be measured with.
    """

    protocol: str = LANCZOS
    k: int = 5
    which: str = "both"
    tol: float = 1e-3
    max_products: int = 200
    copies: bool = False
    weight_decay: float = 0.0
    density_probes: int = 0
    density_steps: int = 40
    seed: int = 0

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)} (got {self.protocol!r})")
        check_k(self.k)
        check_search(self.tol, self.which)


def batch_rows(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    study: SpectrumSettings,
    *,
    model_name: str,
    where: Where,
    tower: str = "whole",
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = contrastive_loss,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """Return a row for every eigenvalue of one batch, with its residual and products, and rows of density and trace.

    model: in the mode it is to be measured in (evaluation); images (B, 3, H, W), texts (B, context) or whatever `loss`
    takes. Embeddings of words that the batch has not are left out: their rows and columns of H are zero.
    Raises what `Hessian` raises; OutOfMemory says what batch would fit.
    """
    images, texts = to_model(model, images, texts)
    parameters = tower_parameters(model, tower)

    def measured(size: int = len(images)) -> Tensor:
        return loss(model, images[:size], texts[:size])

    def objective(size: int = len(images)) -> Tensor:
        value = measured(size)
        return value + park_kim.penalty(parameters.values(), study.weight_decay) if study.weight_decay else value

    # An L2 term curves the rows of words that no caption has, too.
    reduced = nullcontext(parameters) if study.weight_decay else only_read_rows(model, parameters, measured)
    try:
        with reduced as varied:
            hessian = Hessian(objective, varied)
            rows = _eigenvalue_rows(hessian, study, model_name, where, progress)
            return rows + _estimate_rows(hessian, study, model_name, where)
    except OutOfMemory as error:
        fits = largest_fitting(lambda size: Hessian(lambda: objective(size), parameters), len(images))
        raise OutOfMemory(
            f"a Hessian-vector product of a batch of {len(images)} does not fit into memory ({error}). "
            + (
                f"A batch of {fits} fits: use --batch-size {fits}"
                if fits
                else "A batch of 2 does not fit either: use a smaller model or image"
            )
        ) from error


def _eigenvalue_rows(
    hessian: Hessian, study: SpectrumSettings, model_name: str, where: Where, progress: Callable[[int], None] | None
) -> list[Result]:
    rows = []

    def add(metric: str, value: float, residual: float, products: int, converged: bool, found_after: int) -> None:
        extra = {"residual": residual, "products": products, "converged": converged, "loss": hessian.value}
        if found_after > 0:
            extra["found_after"] = found_after
        rows.append(Result(model_name, HESSIAN, metric, value, where=where, extra=extra))

    if study.protocol != LANCZOS:
        if study.protocol == POWER:
            found = park_kim.power_to_residual(
                hessian, study.k, study.tol, study.max_products, study.seed, progress=progress
            )
        else:
            found = park_kim.power_iteration(hessian, study.k, seed=study.seed, progress=progress)
        for place, (value, residual) in enumerate(zip(found.values.tolist(), found.residuals.tolist(), strict=True), 1):
            add(f"by_magnitude_{place}", value, residual, found.products, residual <= study.tol, -1)
        return rows
    r = extreme_eigenvalues(
        hessian,
        study.k,
        study.tol,
        study.which,
        copies=study.copies,
        max_products=study.max_products,
        seed=study.seed,
        progress=progress,
    )
    for end in ("largest", "smallest", "by_magnitude"):
        columns = (getattr(part, end).tolist() for part in (r, r.residuals, r.converged, r.found_after))
        for place, (value, residual, converged, after) in enumerate(zip(*columns, strict=True), 1):
            add(f"{end}_{place}", value, residual, r.products, converged, after)
    return rows


def _estimate_rows(hessian: Hessian, study: SpectrumSettings, model_name: str, where: Where) -> list[Result]:
    if not study.density_probes:
        return []
    found = density(hessian, study.density_probes, study.density_steps, study.seed)
    total = trace(hessian, study.density_probes * 4, study.seed)
    half = 1.96 * total.standard_error
    extra = {"nodes": found.nodes.tolist(), "weights": found.weights.tolist(), "size": found.size}
    return [
        Result(
            model_name, HESSIAN, "negative_mass", found.negative_mass, where=where, n=study.density_probes, extra=extra
        ),
        Result(
            model_name, HESSIAN, "trace", total.value, total.value - half, total.value + half, total.probes, where=where
        ),
    ]


def largest_fitting(attempt: Callable[[int], Callable[[Tensor], Tensor]], size: int) -> int:
    """Return the largest of size / 2, size / 4, ... (at least 2) whose Hessian-vector product fits; 0 if none."""
    while (size := size // 2) >= 2:
        try:
            hessian = attempt(size)
            hessian(torch.zeros(hessian.size, dtype=hessian.dtype, device=hessian.device))
            return size
        except OutOfMemory:
            continue
    return 0
