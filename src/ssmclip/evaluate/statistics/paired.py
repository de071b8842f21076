"""Two models on the same images: the difference, its interval, and whether it could be chance.

n images · r bootstrap resamples
"""

from __future__ import annotations

import base64
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import combinations
from math import comb

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ssmclip.evaluate.embeddings.cache import texts_hash
from ssmclip.evaluate.statistics.comparison import equivalence, holm, kappa, weighted_kappa
from ssmclip.evaluate.statistics.metrics import bootstrap_interval
from ssmclip.evaluate.statistics.resampling import bootstrap_of_rows, mean_interval
from ssmclip.rows import Result
from ssmclip.rows.payloads import RightImages


def marked(right: Bool[Tensor, " n"], keys: Sequence[str]) -> RightImages:
    """Return what a row keeps of which images were right: a bit each, and a hash of the images' keys."""
    bits = np.packbits(right.cpu().numpy()).tobytes()
    return RightImages(right=base64.b64encode(bits).decode("ascii"), images=texts_hash(keys))


def unmarked(row: Result) -> Bool[Tensor, " n"]:
    """Return the inverse of `marked`, from a row whose n is the number of images."""
    bits = np.frombuffer(base64.b64decode(row.extra["right"]), np.uint8)
    return torch.from_numpy(np.unpackbits(bits, count=row.n).astype(bool))


def mcnemar(first: Bool[Tensor, " n"], second: Bool[Tensor, " n"]) -> float:
    """Return the two-sided exact p value of McNemar's test, from the images that only one model has right.

    >>> mcnemar(torch.tensor([True] * 9 + [False]), torch.tensor([False] * 9 + [True]))
    0.021484375
    """
    only_first, only_second = int((first & ~second).sum()), int((second & ~first).sum())
    n, fewer = only_first + only_second, min(only_first, only_second)
    return min(1.0, 2 * sum(comb(n, i) for i in range(fewer + 1)) / 2**n)


def _pairs(rows: Sequence[Result]) -> Iterator[tuple[Result, Result]]:
    """Yield each two rows of different models with the same metric on the same images."""
    having = [row for row in rows if "right" in row.extra and row.n]
    for first, second in combinations(having, 2):
        same = all(getattr(first, name) == getattr(second, name) for name in ("task", "place", "metric", "n"))
        if same and first.model != second.model and first.extra["images"] == second.extra["images"]:
            yield first, second


def compared(
    rows: Sequence[Result],
    *,
    seed: int = 0,
    margin: float | None = None,
    agreement: bool = False,
    resamples: int | None = None,
) -> list[Result]:
    """Return `paired_rows`, with more tests of each two models.

    Of several comparisons `extra` has the p values adjusted for their number (`holm_p`). margin: the largest difference
    that counts as none; `extra` then has the p value of the test of equivalence. resamples: of the intervals, in place
    of those of `paired_rows`. agreement: also a row of Cohen's kappa for each two models, of which images they have
    right. Raises ValueError for a margin that is not between 0 and 1 and for fewer than one resample.
    """
    if resamples is not None and resamples < 1:
        raise ValueError(f"resamples must be at least 1 (got {resamples})")
    pairs = [(unmarked(first), unmarked(second)) for first, second in _pairs(rows)]
    made = paired_rows(rows, seed=seed)
    adjusted = holm([row.extra["mcnemar_p"] for row in made])
    more = []
    for row, (a, b), p in zip(made, pairs, adjusted, strict=True):
        tests = {"holm_p": p, "comparisons": len(made)} if len(made) > 1 else {}
        if margin is not None:
            tests |= {"margin": margin, "equivalence_p": equivalence(a, b, margin)}
        new = replace(row, extra=row.extra | tests)
        if resamples is not None:
            low, high = mean_interval(a.double() - b.double(), seed=seed, resamples=resamples)
            new = replace(new, ci_low=low, ci_high=high, extra=new.extra | {"resamples": resamples})
        more.append(new)
    return more + ([_kappa(row, *pair, seed) for row, pair in zip(made, pairs, strict=True)] if agreement else [])


def _kappa(row: Result, a: Bool[Tensor, " n"], b: Bool[Tensor, " n"], seed: int) -> Result:
    both = torch.stack([a, b], dim=1).double()
    low, high = bootstrap_of_rows(weighted_kappa, both, seed=seed)
    metric = f"{row.metric.removesuffix('_difference')}_agreement"
    return replace(row, metric=metric, value=kappa(a, b), ci_low=low, ci_high=high, extra={})


def paired_rows(rows: Sequence[Result], *, seed: int = 0) -> list[Result]:
    """Return a row for each two models with the same metric on the same images (`model`, and `against` the second).

    The value is the difference of the fractions right, its interval resamples the images both saw; `extra` has the
    exact p value of McNemar's test and how many images only one of the two had right. Rows that don't say which images
    were right are left out, and two models that saw different images are not compared.
    """
    made = []
    for first, second in _pairs(rows):
        a, b = unmarked(first), unmarked(second)
        gain = a.double() - b.double()
        low, high = bootstrap_interval(lambda w, gain=gain: w @ gain / w.sum(-1), len(gain), seed=seed)
        extra = {
            "mcnemar_p": mcnemar(a, b),
            "only_first": int((a & ~b).sum()),
            "only_second": int((b & ~a).sum()),
        }
        metric = f"{first.metric}_difference"
        value = gain.mean().item()
        made.append(
            Result(
                first.model,
                first.task,
                metric,
                value,
                low,
                high,
                first.n,
                where=first.where,
                against=second.model,
                extra=extra,
            )
        )
    return made
