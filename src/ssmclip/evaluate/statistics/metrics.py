"""Metrics as pure functions of scores.

n images · c classes · q queries · m items · d embedding dimensions · r bootstrap resamples

Every metric takes `weights`: how often each image counts, all once when left out. With weights (n,) the value is a
scalar, with (r, n) there are r values, one per resample: the bootstrap needs nothing else to be vectorised.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssmclip.registry import Registry
from ssmclip.rows.metrics import SHOWN, Shown

LEVEL = 0.95
BINS = 15  # of confidence


@dataclass(frozen=True)
class Metric:
    """A function of scores (n, c), the true classes (n) and weights; what guessing among c classes gives; and the least
    and the most classes that it is for (None: any number)."""

    function: Callable[..., Tensor]
    chance: Callable[[int], float | None]
    classes: tuple[int, int | None] = (1, None)


METRICS: Registry[Metric] = Registry("metric", ["ssmclip.evaluate.statistics.calibration"])


def metric(
    name: str,
    title: str = "",
    *,
    fraction: bool = True,
    chance: Callable[[int], float | None] = lambda classes: 1 / classes,
    classes: tuple[int, int | None] = (1, None),
):
    """Return a decorator that registers a function of scores as a metric.

    title: what reports call it; fraction: whether they write it as a percentage; chance: number of classes -> the value
    that guessing gives, None where that is not known; classes: the least and the most that it is for.
    """

    def add(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        METRICS.register(name)(Metric(function, chance, classes))
        if name not in SHOWN:
            SHOWN.register(name)(Shown(title or name.replace("_", " "), fraction))
        return function

    return add


@metric("top1")
def top1(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the fraction of images whose class scores highest (the first of equals counts as highest)."""
    return _weighted_mean(in_first(scores, target, 1), weights)


@metric("top5", chance=lambda classes: 5 / classes, classes=(5, None))
def top5(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the fraction of images whose class is among the five best. Raises ValueError below five classes."""
    if scores.shape[1] < 5:
        raise ValueError(f"top5 needs at least 5 classes (got {scores.shape[1]})")
    return _weighted_mean(in_first(scores, target, 5), weights)


@metric("mean_top1_top5", classes=(5, None))
def mean_top1_top5(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the mean of the two, the main metric of Kinetics-700. Raises ValueError below five classes."""
    return (top1(scores, target, weights) + top5(scores, target, weights)) / 2


@metric("mean_per_class")
def mean_per_class(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the mean of the classes' accuracies, over the classes that occur (scikit-learn's balanced accuracy)."""
    hits = in_first(scores, target, 1)
    weights = torch.ones_like(hits) if weights is None else weights.to(hits)
    member = torch.nn.functional.one_hot(target.long(), scores.shape[1]).to(hits)
    accuracy = (weights @ (hits[:, None] * member)) / (weights @ member)  # 0 / 0 where a class does not occur
    return accuracy.nanmean(dim=-1)


@metric("macro_f1", "mean F1 score over classes", chance=lambda classes: None)
def macro_f1(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the mean of the classes' F1 scores, over the classes that occur, as WILDS counts it."""
    member, guessed = (
        torch.nn.functional.one_hot(classes.long(), scores.shape[1]).double()
        for classes in (target, scores.argmax(dim=1))
    )
    weights = torch.ones(len(target), dtype=torch.float64) if weights is None else weights.to(member)
    true, taken = weights @ member, weights @ guessed
    f1 = 2 * (weights @ (member * guessed)) / (true + taken)
    return f1.masked_fill(true == 0, torch.nan).nanmean(dim=-1)


@metric("nll", chance=math.log)
def nll(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the mean negative log-likelihood of the true classes, in nats; scores are logits. Lower is better."""
    log_probability = scores.double().log_softmax(dim=1).gather(1, target[:, None].long())[:, 0]
    return _weighted_mean(-log_probability, weights)


@metric("ece", chance=lambda classes: None)
def ece(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the expected calibration error over 15 equal bins of confidence (Guo et al. 2017, equation 3); scores are
    logits. Lower is better."""
    confidence = scores.double().softmax(dim=1).amax(dim=1)
    weights = torch.ones_like(confidence) if weights is None else weights.to(confidence)
    place = (confidence * BINS).ceil().long().clamp(1, BINS) - 1  # bin m is ((m - 1) / 15, m / 15]
    gap = torch.nn.functional.one_hot(place, BINS) * (in_first(scores, target, 1) - confidence)[:, None]
    return (weights @ gap).abs().sum(-1) / weights.sum(-1)


def average_precision(
    score: Float[Tensor, " n"], positive: Bool[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the area under the precision-recall curve as scikit-learn sums it: precision at each score times the gain
    in recall; equal scores count together. NaN without positives."""
    score = score.double()
    weights = torch.ones_like(score) if weights is None else weights.to(score)
    _, level = (-score).unique(return_inverse=True)
    levels = int(level.max()) + 1
    hits, drawn = (
        weights.new_zeros(*weights.shape[:-1], levels).index_add_(-1, level, part)
        for part in (weights * positive.to(weights), weights)
    )
    precision = hits.cumsum(-1) / drawn.cumsum(-1)
    return (precision * hits).nansum(-1) / hits.sum(-1)  # 0 / 0 above the first that was drawn


def mean_average_precision(
    scores: Float[Tensor, "n c"], answers: Bool[Tensor, "n c"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the mean of the classes' average precisions, over the classes that are on some picture."""
    each = [average_precision(scores[:, c], answers[:, c], weights) for c in range(scores.shape[1])]
    return torch.stack(each, dim=-1).nanmean(dim=-1)


@metric("roc_auc", chance=lambda classes: 0.5, classes=(2, 2))
def roc_auc(
    scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], weights: Float[Tensor, "*r n"] | None = None
) -> Float[Tensor, "*r"]:
    """Return the area under the ROC curve of (score of class 1 - score of class 0).

    Ties count half. NaN when there are no positives or no negatives. Raises ValueError unless there are two classes.
    """
    if scores.shape[1] != 2:
        raise ValueError(f"roc_auc needs exactly two classes (got {scores.shape[1]})")
    score = (scores[:, 1] - scores[:, 0]).double()
    weights = torch.ones_like(score) if weights is None else weights.to(score)
    _, level = score.unique(return_inverse=True)  # equal scores share a level
    levels = int(level.max()) + 1
    positive, negative = (
        weights.new_zeros(*weights.shape[:-1], levels).index_add_(-1, level, weights * (target == label).to(weights))
        for label in (1, 0)
    )
    below = negative.cumsum(-1) - negative
    return (positive * (below + negative / 2)).sum(-1) / (positive.sum(-1) * negative.sum(-1))


def recall_at_k(
    ranks: Int[Tensor, " q"],
    k: int,
    image: Int[Tensor, " q"] | None = None,
    weights: Float[Tensor, "*r n"] | None = None,
) -> Float[Tensor, "*r"]:
    """Return the fraction of queries with a relevant item among their first k, from `first_relevant_ranks`.

    image: the image a query belongs to, so that resampling images takes all captions of an image along; left out,
    query i is image i.
    """
    hits = (ranks < k).double()
    if weights is None or image is None:
        return _weighted_mean(hits, weights)
    hits_of_image, queries_of_image = (
        hits.new_zeros(weights.shape[-1]).index_add_(0, image, values) for values in (hits, torch.ones_like(hits))
    )
    weights = weights.to(hits)
    return (weights @ hits_of_image) / (weights @ queries_of_image)


def first_relevant_ranks(
    queries: Float[Tensor, "q d"],
    items: Float[Tensor, "m d"],
    query_group: Int[Tensor, " q"],
    item_group: Int[Tensor, " m"],
    *,
    block: int = 1024,
) -> Int[Tensor, " q"]:
    """Return, for each query, how many irrelevant items score at least as high as its best relevant one.

    An item is relevant to a query of the same group: image to text, an image's captions have the image's number; text
    to image, a caption's group is its image. Equal scores count against the query, so a model that maps everything to
    one point finds nothing. Scores are dot products, made `block` queries at a time. Raises ValueError naming the
    queries that have no relevant item.
    """
    if missing := sorted(set(query_group.tolist()) - set(item_group.tolist())):
        raise ValueError(f"no item is relevant to the queries of groups {missing[:10]} ({len(missing)} in all)")
    ranks = []
    for start in range(0, len(queries), block):
        scores = queries[start : start + block] @ items.T
        relevant = query_group[start : start + block, None] == item_group
        best = scores.masked_fill(~relevant, -torch.inf).amax(dim=1, keepdim=True)
        ranks.append(((scores >= best) & ~relevant).sum(dim=1))
    return torch.cat(ranks)


def bootstrap_interval(
    statistic: Callable[[Tensor], Tensor], n: int, *, seed: int, resamples: int = 1000, chunk: int = 2**23
) -> tuple[float, float]:
    """Return the 95 % percentile interval of `statistic` over n images drawn with replacement.

    statistic: weights (r, n) -> values (r,), such as `lambda w: top1(scores, target, w)`. Resamples whose value is NaN
    (no positives drawn) are left out. At most about `chunk` weights are held at a time. Where every image agrees (all
    right, all wrong) the interval has no width: the bootstrap can't see what was never drawn.

    >>> hits = torch.tensor([1.0] * 80 + [0.0] * 20).double()
    >>> low, high = bootstrap_interval(lambda w: w @ hits / w.sum(-1), 100, seed=0)
    >>> 0.70 < low < 0.74 and 0.86 < high < 0.90
    True
    """
    generator = torch.Generator().manual_seed(seed)
    values = []
    rows = max(1, min(resamples, chunk // n))
    for start in range(0, resamples, rows):
        r = min(rows, resamples - start)
        drawn = torch.randint(n, (r, n), generator=generator) + torch.arange(r)[:, None] * n
        weights = torch.bincount(drawn.flatten(), minlength=r * n).reshape(r, n).double()
        values.append(statistic(weights))
    values = torch.cat(values).double()
    values = values[~values.isnan()]
    low, high = values.quantile(torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)).tolist()
    return low, high


def in_first(scores: Float[Tensor, "n c"], target: Int[Tensor, " n"], k: int) -> Float[Tensor, " n"]:
    """Return 1 where the true class is among the k that score highest, 0 elsewhere; the first of equals is higher."""
    own = scores.gather(1, target[:, None].long())
    earlier = torch.arange(scores.shape[1], device=scores.device) < target[:, None]
    return (((scores > own) | ((scores == own) & earlier)).sum(dim=1) < k).double()


def _weighted_mean(values: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return values.mean()
    weights = weights.to(values)
    return (weights @ values) / weights.sum(-1)
