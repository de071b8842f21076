"""Summaries over batches: of each model, and of two models or two protocols on the same batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations

import numpy as np

from ssmclip.rows import Result
from ssmclip.rows.condition import BATCH, PROTOCOL, Where
from ssmclip.rows.tasks import HESSIAN, PARK_KIM, POWER

Batches = dict[int, dict[str, Result]]  # batch -> metric -> row


def summary_rows(rows: Sequence[Result], k: int, seed: int = 0) -> list[Result]:
    """Return means over the batches with 95 % bootstrap intervals, for each model, tower, step and protocol.

    negative_share: of the k eigenvalues of largest magnitude, the paper's measure; top_magnitude: the mean of |lambda|
    over them; min_over_max: |most negative| / most positive, if Lanczos converged both on every batch; converged_share;
    products.
    X_difference, against the second model: the same of two models, batch by batch.
    power_iteration_*, long_power_iteration_*: see `beside`, where two protocols were run on the same batches.
    """
    groups = _grouped(rows)
    found = []
    for place, models in groups.items():
        where = dict(place)
        measured = {model: measures(batches, k) for model, batches in models.items()}
        for model, each in measured.items():
            found += [_mean(model, where, metric, values, k, seed) for metric, values in each.items()]
        for (first, mine), (second, other) in combinations(measured.items(), 2):
            for metric in ("negative_share", "top_magnitude", "min_over_max"):
                if gains := _minus(mine.get(metric, {}), other.get(metric, {})):
                    found.append(_mean(first, where, f"{metric}_difference", gains, k, seed, against=second))
        for model, batches in models.items():
            for protocol, name in ((PARK_KIM, "power_iteration"), (POWER, "long_power_iteration")):
                given = groups.get(_without_batch(where | {PROTOCOL: protocol}), {}).get(model, {})
                for metric, values in beside(batches, given, k).items():
                    found.append(_mean(model, where, f"{name}_{metric}", values, k, seed))
    return found


def _grouped(rows: Iterable[Result]) -> dict[tuple, dict[str, Batches]]:
    """Return `where` without the batch -> model -> its batches."""
    groups: dict[tuple, dict[str, Batches]] = {}
    for row in rows:
        if row.task == HESSIAN and BATCH in row.where:
            group = groups.setdefault(_without_batch(row.where), {})
            group.setdefault(row.model, {}).setdefault(row.where[BATCH], {})[row.metric] = row
    return groups


def _without_batch(where: Where) -> tuple:
    return tuple((key, value) for key, value in where.items() if key != BATCH)


def measures(batches: Batches, k: int) -> dict[str, dict[int, float]]:
    """Return metric -> batch -> value, for metrics that some batch has."""
    found: dict[str, dict[int, float]] = {}

    def add(metric: str, batch: int, value: float) -> None:
        found.setdefault(metric, {})[batch] = value

    for batch, b in batches.items():
        if top := top_of(b, k):
            add("negative_share", batch, float(np.mean([row.value < 0 for row in top])))
            add("top_magnitude", batch, float(np.mean([abs(row.value) for row in top])))
            add("converged_share", batch, float(np.mean([row.extra["converged"] for row in top])))
            add("products", batch, float(top[0].extra["products"]))
        ends = [b[f"{end}_1"] for end in ("smallest", "largest") if f"{end}_1" in b]
        if len(ends) == 2 and ends[1].value > 0 and all(row.extra["converged"] for row in ends):
            add("min_over_max", batch, -b["smallest_1"].value / b["largest_1"].value)
        for metric in ("negative_mass", "trace"):
            if metric in b:
                add(metric, batch, b[metric].value)
    # A most negative eigenvalue that is small converges last: a mean over those that did would be too large.
    if len(found.get("min_over_max", {})) < len(batches):
        found.pop("min_over_max", None)
    return found


def top_of(batch: Mapping[str, Result], k: int) -> list[Result]:
    """Return the rows of a batch's k eigenvalues of largest magnitude; none if it has fewer."""
    return [batch[f"by_magnitude_{i}"] for i in range(1, k + 1)] if f"by_magnitude_{k}" in batch else []


def beside(batches: Batches, usual: Batches, k: int) -> dict[str, dict[int, float]]:
    """Compare a power iteration with converged eigenvalues, on the batches that have both.

    products, residual (the largest of the k), error (the largest, relative to the eigenvalue at the same place), missed
    (the share of the k eigenvalues that none of its values is within 1 % of), and products_over_lanczos: how many times
    what Lanczos takes until the k of largest magnitude are converged.
    """
    found: dict[str, dict[int, float]] = {}
    for batch in batches:
        true, given = top_of(batches[batch], k), top_of(usual.get(batch, {}), k)
        if not (true and given and all(row.extra.get("found_after") for row in true)):
            continue
        values, wanted = (np.array([row.value for row in rows]) for rows in (given, true))
        apart = np.abs(values[:, None] - wanted) / np.abs(wanted)
        products = given[0].extra["products"]
        each = {
            "products": products,
            "products_over_lanczos": products / max(row.extra["found_after"] for row in true),
            "residual": max(row.extra["residual"] for row in given),
            "error": apart.diagonal().max(),
            "missed": (apart.min(axis=0) > 0.01).mean(),
        }
        for metric, value in each.items():
            found.setdefault(metric, {})[batch] = float(value)
    return found


def _minus(mine: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {batch: mine[batch] - other[batch] for batch in mine if batch in other}


def _mean(
    model: str, where: Where, metric: str, values: Mapping[int, float], k: int, seed: int, against: str = ""
) -> Result:
    low, high = bootstrap(values.values(), seed)
    extra = {"title": "Hessian"} | ({"top": k} if metric == "negative_share" else {})
    mean = float(np.mean([*values.values()]))
    return Result(model, HESSIAN, metric, mean, low, high, len(values), where=where, against=against, extra=extra)


def bootstrap(values: Iterable[float], seed: int, draws: int = 2000) -> tuple[float, float]:
    """Return the 2.5 and 97.5 % quantiles of the mean over resampled batches."""
    values = np.asarray(list(values))
    picked = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(values[picked].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)
