"""Two models on the same images: the difference, its interval, and whether it could be chance.

n images · r bootstrap resamples
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from ssmclip.evaluate.embeddings.cache import texts_hash
from ssmclip.evaluate.statistics.metrics import bootstrap_interval
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


def paired_rows(rows: Sequence[Result], *, seed: int = 0) -> list[Result]:
    """Return a row for each two models with the same metric on the same images (`model`, and `against` the second).

    The value is the difference of the fractions right, its interval resamples the images both saw; `extra` has the
    exact p value of McNemar's test and how many images only one of the two had right. Rows that don't say which images
    were right are left out, and two models that saw different images are not compared.
    """
    having = [row for row in rows if "right" in row.extra and row.n]
    made = []
    for first, second in combinations(having, 2):
        same = all(getattr(first, name) == getattr(second, name) for name in ("task", "place", "metric", "n"))
        if not same or first.model == second.model or first.extra["images"] != second.extra["images"]:
            continue
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
