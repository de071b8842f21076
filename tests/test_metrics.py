"""Metrics against scikit-learn, matrices worked by hand and the numbers of the original evaluation code."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar
from scipy.special import softmax
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
    top_k_accuracy_score,
)

from ssmclip.evaluate.statistics.calibration import halves
from ssmclip.evaluate.statistics.metrics import (
    METRICS,
    average_precision,
    bootstrap_interval,
    first_relevant_ranks,
    mean_average_precision,
    metric,
    recall_at_k,
)


def top_k(target, scores, w, k: int) -> float:
    return top_k_accuracy_score(target, scores, k=k, labels=range(scores.shape[1]), sample_weight=w)


def calibration_error(target, probability, w) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    w = np.ones(len(target)) if w is None else w
    confidence, right = probability.max(1), probability.argmax(1) == target
    total = 0.0
    for m in range(15):
        inside = (confidence > m / 15) & (confidence <= (m + 1) / 15) & (w > 0)
        if inside.any():
            accuracy, sure = (np.average(x[inside], weights=w[inside]) for x in (right, confidence))
            total += w[inside].sum() / w.sum() * abs(accuracy - sure)
    return total


def f1(target, guess, w) -> float:
    """As WILDS counts it: over the classes that occur."""
    there = np.unique(target if w is None else target[w > 0])
    return f1_score(target, guess, labels=there, average="macro", sample_weight=w)


def calibrated(target, scores, w) -> tuple[float, float, float]:
    """The temperature of one half by scikit-learn's log loss, and what it gives on the other half."""
    fitted, judged = halves(len(target))
    t = minimize_scalar(
        lambda x: log_loss(target[fitted], softmax(scores[fitted] / x, axis=1)),
        bounds=(0.1, 10),
        method="bounded",
        options={"xatol": 1e-12},
    ).x
    probability, w = softmax(scores[judged] / t, axis=1), None if w is None else w[judged]
    loss = log_loss(target[judged], probability, sample_weight=w)
    return t, loss, calibration_error(target[judged], probability, w)


SKLEARN = {
    "top1": lambda target, scores, w: top_k(target, scores, w, 1),
    "top5": lambda target, scores, w: top_k(target, scores, w, 5),
    "mean_top1_top5": lambda target, scores, w: (top_k(target, scores, w, 1) + top_k(target, scores, w, 5)) / 2,
    "mean_per_class": lambda target, scores, w: balanced_accuracy_score(target, scores.argmax(1), sample_weight=w),
    "macro_f1": lambda target, scores, w: f1(target, scores.argmax(1), w),
    "temperature": lambda target, scores, w: calibrated(target, scores, w)[0],
    "calibrated_nll": lambda target, scores, w: calibrated(target, scores, w)[1],
    "calibrated_ece": lambda target, scores, w: calibrated(target, scores, w)[2],
    "nll": lambda target, scores, w: log_loss(target, softmax(scores, axis=1), sample_weight=w),
    "ece": lambda target, scores, w: calibration_error(target, softmax(scores, axis=1), w),
    "roc_auc": lambda target, scores, w: roc_auc_score(target, scores[:, 1] - scores[:, 0], sample_weight=w),
}


def problem(classes: int, n: int = 300, seed: int = 0):
    """Scores rounded to 0.1, so that ties occur, and weights as a bootstrap makes them."""
    rng = np.random.default_rng(seed)
    target = rng.integers(classes, size=n)
    scores = rng.normal(size=(n, classes)) + np.eye(classes)[target]
    weights = rng.multinomial(n, np.full(n, 1 / n), size=4).astype(float)
    return scores, target, weights


def test_every_metric_has_a_reference():
    assert set(METRICS) == set(SKLEARN)


FITTED = ("temperature", "calibrated_nll", "calibrated_ece")


@pytest.mark.parametrize("name", SKLEARN)
def test_metric_equals_scikit_learn_also_when_weighted(name):
    scores, target, weights = problem(2 if name == "roc_auc" else 7)
    if name == "roc_auc":
        scores = scores.round(1)  # ties
    # What two minimisers find of a smooth function agrees to half of the digits.
    close = {"rel": 1e-6} if name in FITTED else {"abs": 1e-12}
    function = METRICS[name].function
    tensors = torch.from_numpy(scores), torch.from_numpy(target)
    assert function(*tensors).item() == pytest.approx(SKLEARN[name](target, scores, None), **close)
    expected = [SKLEARN[name](target, scores, w) for w in weights]
    assert function(*tensors, torch.from_numpy(weights)).tolist() == pytest.approx(expected, **close)


def test_average_precision_equals_scikit_learns_also_when_weighted():
    scores, target, weights = problem(2)
    score, positive = scores[:, 0].round(1), target == 0  # ties
    tensors = torch.from_numpy(score), torch.from_numpy(positive)
    assert average_precision(*tensors).item() == pytest.approx(average_precision_score(positive, score), abs=1e-12)
    expected = [average_precision_score(positive, score, sample_weight=w) for w in weights]
    torch.testing.assert_close(average_precision(*tensors, torch.from_numpy(weights)).tolist(), expected)


def test_mean_average_precision_equals_scikit_learns_and_clip_benchmarks():
    rng = np.random.default_rng(1)
    scores, on = rng.normal(size=(60, 4)), rng.random((60, 5))[:, :4] < 0.3
    weights = rng.multinomial(60, np.full(60, 1 / 60), size=3).astype(float)
    tensors = torch.from_numpy(scores), torch.from_numpy(on)
    assert mean_average_precision(*tensors).item() == pytest.approx(average_precision_score(on, scores), abs=1e-12)
    expected = [average_precision_score(on, scores, sample_weight=w) for w in weights]
    torch.testing.assert_close(mean_average_precision(*tensors, torch.from_numpy(weights)).tolist(), expected)
    benchmark = pytest.importorskip("clip_benchmark.metrics.zeroshot_classification")
    each = benchmark.average_precision_per_class(tensors[0], tensors[1].float())
    assert mean_average_precision(*tensors).item() == pytest.approx(each.mean().item(), abs=1e-6)
    on[:, 1] = False  # a class that is on no picture
    there = [average_precision_score(on[:, c], scores[:, c]) for c in (0, 2, 3)]
    assert mean_average_precision(tensors[0], torch.from_numpy(on)).item() == pytest.approx(np.mean(there))


def test_of_equal_scores_the_first_class_is_the_answer():
    scores = torch.tensor([[1.0, 1.0, 0.0, 0.0, 0.0, 0.0]] * 6)
    assert METRICS["top1"].function(scores, torch.arange(6)).item() == pytest.approx(1 / 6)
    assert METRICS["top5"].function(scores, torch.arange(6)).item() == pytest.approx(5 / 6)


def test_mean_per_class_leaves_out_classes_that_do_not_occur():
    scores = torch.eye(4)[[0, 0, 1, 1]].double()
    target = torch.tensor([0, 1, 1, 1])  # class 0: 1/1, class 1: 2/3, classes 2 and 3 never
    assert METRICS["mean_per_class"].function(scores, target).item() == pytest.approx((1 + 2 / 3) / 2)


def test_metrics_refuse_scores_they_are_not_for():
    scores, target = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    with pytest.raises(ValueError, match="at least 5 classes"):
        METRICS["top5"].function(scores, target)
    with pytest.raises(ValueError, match="two classes"):
        METRICS["roc_auc"].function(scores, target)
    with pytest.raises(ValueError, match="already registered"):
        metric("top1")(lambda: None)


# Two images; captions 0, 1 of image 0 and 2, 3 of image 1, in the coordinates of the images.
#              c0   c1   c2   c3
#     image 0  0.9  0.1  0.5  0.0     best own 0.9: first
#     image 1  0.8  0.7  0.6  0.2     best own 0.6: behind c0 and c1
IMAGES = torch.eye(2)
TEXTS = torch.tensor([[0.9, 0.8], [0.1, 0.7], [0.5, 0.6], [0.0, 0.2]])
OWNER = torch.tensor([0, 0, 1, 1])


@pytest.mark.parametrize("block", [1, 3, 1024])
def test_ranks_equal_those_worked_by_hand(block):
    image_to_text = first_relevant_ranks(IMAGES, TEXTS, torch.arange(2), OWNER, block=block)
    text_to_image = first_relevant_ranks(TEXTS, IMAGES, OWNER, torch.arange(2), block=block)
    assert image_to_text.tolist() == [0, 2]
    assert text_to_image.tolist() == [0, 1, 0, 0]
    assert [recall_at_k(image_to_text, k).item() for k in (1, 2, 3)] == [0.5, 0.5, 1.0]
    assert recall_at_k(text_to_image, 1).item() == 0.75


def test_recall_resamples_an_image_with_all_its_captions():
    ranks = torch.tensor([0, 1, 0, 0])
    weights = torch.tensor([[2.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    assert recall_at_k(ranks, 1, OWNER, weights).tolist() == [0.5, 1.0, 0.75]


def test_a_model_that_maps_everything_to_one_point_finds_nothing():
    images, texts = torch.ones(5, 3), torch.ones(5, 3)
    ranks = first_relevant_ranks(images, texts, torch.arange(5), torch.arange(5))
    assert recall_at_k(ranks, 1).item() == 0


def test_a_query_without_relevant_items_is_named():
    with pytest.raises(ValueError, match=r"groups \[1\]"):
        first_relevant_ranks(torch.eye(2), torch.eye(2), torch.arange(2), torch.tensor([0, 0]))


def test_interval_equals_the_normal_approximation_and_depends_on_the_seed_only():
    generator = torch.Generator().manual_seed(1)
    hits = (torch.rand(2000, generator=generator) < 0.3).double()

    def statistic(weights):
        return weights @ hits / weights.sum(-1)

    low, high = bootstrap_interval(statistic, 2000, seed=0)
    mean, error = hits.mean().item(), (hits.var(correction=0) / 2000).sqrt().item()
    assert (low, high) == pytest.approx((mean - 1.96 * error, mean + 1.96 * error), abs=0.25 * error)
    assert bootstrap_interval(statistic, 2000, seed=0) == (low, high)
    assert bootstrap_interval(statistic, 2000, seed=0, chunk=5000) == pytest.approx((low, high), abs=0.3 * error)
    assert bootstrap_interval(statistic, 2000, seed=1) != (low, high)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    generator = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        hits = (torch.rand(100, generator=generator) < 0.6).double()
        low, high = bootstrap_interval(lambda w, hits=hits: w @ hits / 100, 100, seed=trial, resamples=300)
        covered += low <= 0.6 <= high
    assert 180 <= covered <= 199  # 95 % of 200, give or take three standard errors


def test_metrics_equal_those_of_the_original_code(shared):
    truth = torch.load(shared / "parity" / "train_eval_misc.pt")["metrics"]
    for name in ("top1", "top5", "mean_per_class"):
        assert 100 * METRICS[name].function(truth["logits"], truth["targets"]).item() == pytest.approx(truth[name])
    auc = METRICS["roc_auc"].function(truth["bin_logits"], truth["bin_targets"])
    assert 100 * auc.item() == pytest.approx(truth["roc_auc"])
    scores = truth["retrieval_scores"]
    owner = torch.arange(100) // truth["captions_per_image"]
    identity = torch.eye(100, dtype=scores.dtype)
    image_to_text = first_relevant_ranks(scores, identity, torch.arange(20), owner)
    text_to_image = first_relevant_ranks(identity, scores, owner, torch.arange(20))
    recalls = []
    for side, ranks in (("image2text", image_to_text), ("text2image", text_to_image)):
        for k in (1, 5, 10):
            recalls.append(100 * recall_at_k(ranks, k).item())
            assert recalls[-1] == pytest.approx(truth["retrieval"][f"{side}-R@{k}"])
    assert np.mean(recalls) == pytest.approx(truth["retrieval"]["mean-recall"])
