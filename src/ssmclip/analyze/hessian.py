"""A model's Hessian spectrum, batch by batch, as rows; and what all batches say together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ssmclip.analyze import park_kim
from ssmclip.analyze.batches import contrastive_loss, read_batches, to_model, tower_parameters
from ssmclip.analyze.estimate import density, trace
from ssmclip.analyze.landscape import surface
from ssmclip.analyze.product import Hessian, OutOfMemory
from ssmclip.analyze.spectrum import extreme_eigenvalues
from ssmclip.results import Result

PROTOCOLS = ("lanczos", "park-kim")
TASK = "hessian"


@dataclass(frozen=True)
class HessianStudy:
    """How a batch's spectrum is measured.

    protocol: "lanczos" (both ends, to a relative residual of tol) or "park-kim" (see `analyze/park_kim.py`);
    weight_decay: of an L2 term in the loss; copies: as in `hessian_eigenvalues`; density_probes: of the spectral
    density and the trace, none of either for 0.
    """

    protocol: str = "lanczos"
    k: int = 5
    tol: float = 1e-3
    max_products: int = 200
    copies: bool = False
    weight_decay: float = 0.0
    density_probes: int = 0
    density_steps: int = 40
    seed: int = 0

    def __post_init__(self):
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"protocol {self.protocol!r}: wanted one of {', '.join(PROTOCOLS)}")


def batch_rows(
    model: nn.Module,
    images: Tensor,
    texts: Tensor,
    study: HessianStudy,
    *,
    model_name: str,
    condition: str,
    tower: str = "whole",
    loss: Callable[[nn.Module, Tensor, Tensor], Tensor] = contrastive_loss,
    progress: Callable[[int], None] | None = None,
) -> list[Result]:
    """A row for every eigenvalue found on one batch, with its residual and products, and rows of density and trace.

    model: in the mode it is to be measured in (evaluation); images (B, 3, H, W), texts (B, context) or whatever `loss`
    takes. Raises what `Hessian` raises; OutOfMemory says what batch would fit.
    """
    images, texts = to_model(model, images, texts)
    parameters = tower_parameters(model, tower)

    def objective(size: int = len(images)) -> Tensor:
        value = loss(model, images[:size], texts[:size])
        return value + park_kim.penalty(parameters.values(), study.weight_decay) if study.weight_decay else value

    try:
        hessian = Hessian(objective, parameters)
        rows = _eigenvalue_rows(hessian, study, model_name, condition, progress)
        return rows + _estimate_rows(hessian, study, model_name, condition)
    except OutOfMemory as error:
        fits = largest_fitting(lambda size: Hessian(lambda: objective(size), parameters), len(images))
        raise OutOfMemory(
            f"a Hessian-vector product of a batch of {len(images)} does not fit into memory ({error}). "
            + (f"A batch of {fits} fits: --batch-size {fits}" if fits else "Nor does one of 2")
        ) from error


def _eigenvalue_rows(
    hessian: Hessian, study: HessianStudy, model_name: str, condition: str, progress: Callable[[int], None] | None
) -> list[Result]:
    rows = []

    def add(metric: str, value: float, residual: float, products: int, converged: bool, found_after: int) -> None:
        extra = {"residual": residual, "products": products, "converged": converged, "loss": hessian.value}
        if found_after > 0:
            extra["found_after"] = found_after
        rows.append(Result(model_name, TASK, condition, metric, value, extra=extra))

    if study.protocol == "park-kim":
        found = park_kim.power_iteration(hessian, study.k, seed=study.seed)
        for place, (value, residual) in enumerate(zip(found.values.tolist(), found.residuals.tolist(), strict=True), 1):
            add(f"by_magnitude_{place}", value, residual, found.products, residual <= study.tol, -1)
        return rows
    r = extreme_eigenvalues(
        hessian,
        study.k,
        study.tol,
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


def _estimate_rows(hessian: Hessian, study: HessianStudy, model_name: str, condition: str) -> list[Result]:
    if not study.density_probes:
        return []
    found = density(hessian, study.density_probes, study.density_steps, study.seed)
    total = trace(hessian, study.density_probes * 4, study.seed)
    half = 1.96 * total.standard_error
    extra = {"nodes": found.nodes.tolist(), "weights": found.weights.tolist(), "size": found.size}
    return [
        Result(model_name, TASK, condition, "negative_mass", found.negative_mass, n=study.density_probes, extra=extra),
        Result(model_name, TASK, condition, "trace", total.value, total.value - half, total.value + half, total.probes),
    ]


def largest_fitting(attempt: Callable[[int], Callable[[Tensor], Tensor]], size: int) -> int:
    """The largest of size / 2, size / 4, ... (at least 2) whose Hessian-vector product fits into memory; 0 for none."""
    while (size := size // 2) >= 2:
        try:
            hessian = attempt(size)
            hessian(torch.zeros(hessian.size, dtype=hessian.dtype, device=hessian.device))
            return size
        except OutOfMemory:
            continue
    return 0


def summary_rows(rows: Sequence[Result], k: int, seed: int = 0) -> list[Result]:
    """What the batches say together, for each model and condition ("tower=whole"), with 95 % bootstrap intervals.

    negative_share: of the k eigenvalues of largest magnitude, the paper's measure; top_magnitude: the mean of |lambda|
    over them; min_over_max: |most negative| / most positive, from Lanczos only; converged_share.
    """
    found = []
    groups: dict[tuple[str, str], dict[str, dict[str, Result]]] = {}
    for row in rows:
        if row.task == TASK and "batch=" in row.condition:
            step, batch, rest = split_condition(row.condition)
            where = ",".join(filter(None, (step, rest)))
            groups.setdefault((row.model, where), {}).setdefault(batch, {})[row.metric] = row
    for (model, where), batches in groups.items():
        top = [[b[f"by_magnitude_{i}"] for i in range(1, k + 1)] for b in batches.values() if f"by_magnitude_{k}" in b]
        measures = {
            "negative_share": [float(np.mean([row.value < 0 for row in rows])) for rows in top],
            "top_magnitude": [float(np.mean([abs(row.value) for row in rows])) for rows in top],
            "converged_share": [float(np.mean([row.extra["converged"] for row in rows])) for rows in top],
            "products": [float(rows[0].extra["products"]) for rows in top],
            "min_over_max": [
                -b["smallest_1"].value / b["largest_1"].value
                for b in batches.values()
                if "smallest_1" in b and b["largest_1"].value > 0
            ],
            "negative_mass": [b["negative_mass"].value for b in batches.values() if "negative_mass" in b],
            "trace": [b["trace"].value for b in batches.values() if "trace" in b],
        }
        for metric, values in measures.items():
            if values:
                low, high = bootstrap(values, seed)
                extra = {"title": "Hessian"} | ({"top": k} if metric == "negative_share" else {})
                found.append(Result(model, TASK, where, metric, float(np.mean(values)), low, high, len(values), extra))
    return found


def quick_look(
    model: nn.Module,
    preprocess: Callable,
    tokenizer: Callable,
    source: str,
    *,
    model_name: str,
    tower: str = "image",
    batches: int = 1,
    batch_size: int = 15,
    k: int = 3,
    points: int = 11,
    seed: int = 0,
) -> list[Result]:
    """Rows of a first look at a landscape: both ends of a tower's spectrum on a batch, and the loss along a line.

    source: what `open_pairs` takes. About 30 Hessian-vector products a batch.
    """
    study = HessianStudy(k=k, seed=seed)
    pairs = list(read_batches(source, preprocess, tokenizer, batches=batches, batch_size=batch_size, seed=seed))
    rows = []
    for number, (images, texts) in enumerate(tqdm(pairs, desc=f"Hessian of {model_name}", leave=False, disable=None)):
        condition = f"batch={number},tower={tower}"
        rows += batch_rows(model, images, texts, study, model_name=model_name, condition=condition, tower=tower)
    rows += summary_rows(rows, study.k, seed)
    line = surface(model, pairs, model_name=model_name, dimensions=1, points=points, seed=seed)
    return rows + [row for _, measure in line for row in measure()]


def split_condition(condition: str) -> tuple[str, str, str]:
    """("step=10", "batch=3", "tower=image") of "step=10,batch=3,tower=image"; "" for what isn't there."""
    parts = condition.split(",")
    step = next((p for p in parts if p.startswith("step=")), "")
    batch = next((p for p in parts if p.startswith("batch=")), "")
    return step, batch, ",".join(p for p in parts if p not in (step, batch))


def bootstrap(values: Iterable[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """The 2.5 and 97.5 % quantiles of the mean over resampled batches."""
    values = np.asarray(list(values))
    picked = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picked].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def settings(study: HessianStudy) -> dict:
    """The study as JSON-able values, for a rows file's first line."""
    return asdict(study)
