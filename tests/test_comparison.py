"""Many tests at once, equivalence, agreement, calibration and a fast bootstrap, against scipy, scikit-learn and R."""

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from scipy.optimize import minimize
from scipy.special import softmax
from sklearn.metrics import cohen_kappa_score, log_loss

from ssmclip.__main__ import main
from ssmclip.evaluate import Settings, embed_images, evaluate
from ssmclip.evaluate.statistics.calibration import fit_temperature, halves
from ssmclip.evaluate.statistics.comparison import equivalence, holm, kappa
from ssmclip.evaluate.statistics.metrics import METRICS, bootstrap_interval, mean_per_class
from ssmclip.evaluate.statistics.paired import compared, marked, paired_rows
from ssmclip.evaluate.statistics.resampling import bootstrap_of_rows, mean_interval
from ssmclip.evaluate.tasks import open_tasks
from ssmclip.rows import Result, read_rows, write_rows


def hits(p: float, n: int, seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).random(n) < p)


def test_holm_is_rs_p_adjust():
    """R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm"); and by its definition, with every subset of hypotheses."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.8]) == [1.0, 1.0]
    assert (holm([0.3]), holm([])) == ([0.3], [])
    p = np.random.default_rng(0).random(6) ** 3
    subsets = [[i for i in range(6) if mask >> i & 1] for mask in range(1, 64)]
    closed = [max(min(1, len(s) * min(p[s])) for s in subsets if i in s) for i in range(6)]  # Bonferroni of each
    assert holm(p.tolist()) == pytest.approx(closed)
    with pytest.raises(ValueError, match=r"between 0 and 1 \(got 1\.2\)"):
        holm([0.1, 1.2])


def test_equivalence_is_two_of_scipys_one_sided_tests():
    a, b = hits(0.7, 400, 0), hits(0.71, 400, 1)
    gain = (a.double() - b.double()).numpy()
    for margin in (0.02, 0.05, 0.2):
        above = stats.ttest_1samp(gain, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(gain, margin, alternative="less").pvalue
        assert equivalence(a, b, margin) == pytest.approx(max(above, below), rel=1e-9)
        assert equivalence(b, a, margin) == pytest.approx(equivalence(a, b, margin))
    assert (equivalence(a, a, 0.01), equivalence(a | ~a, a & ~a, 0.5)) == (0.0, 1.0)
    for margin in (0.0, 1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match="the margin must be between 0 and 1"):
            equivalence(a, b, margin)
    with pytest.raises(ValueError, match="at least 2 images"):
        equivalence(a[:1], b[:1], 0.1)


def test_kappa_is_scikit_learns():
    a, b = hits(0.7, 300, 0), hits(0.5, 300, 1)
    for first, second in ((a, b), (a, a), (a, ~a), (a, a & b)):
        assert kappa(first, second) == pytest.approx(cohen_kappa_score(first, second))
    assert np.isnan(kappa(a | ~a, a | ~a))


def test_the_fast_bootstrap_draws_what_the_slow_one_draws():
    """Means of hits against the binomial distribution; a mean over classes against resampling image by image."""
    right = hits(0.3, 500, 2)
    low, high = mean_interval(right, seed=0, resamples=100_000)
    expected = stats.binom.ppf([0.025, 0.975], 500, right.double().mean().item()) / 500
    assert (low, high) == pytest.approx(tuple(expected), abs=0.0021)  # a hit more or less
    target = torch.from_numpy(np.random.default_rng(3).integers(4, size=500))
    scores = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) + torch.eye(4)[target]
    slow = bootstrap_interval(lambda w: mean_per_class(scores, target, w), 500, seed=0, resamples=10_000)
    cells = torch.stack([target, scores.argmax(1) == target], dim=1)

    def over_classes(weights, distinct):
        member = torch.nn.functional.one_hot(distinct[:, 0].long(), 4).double()
        return ((weights * distinct[:, 1]) @ member / (weights @ member)).nanmean(-1)

    assert bootstrap_of_rows(over_classes, cells, seed=0) == pytest.approx(slow, abs=0.004)
    assert mean_interval(right, seed=1) == mean_interval(right, seed=1) != mean_interval(right, seed=2)
    with pytest.raises(ValueError, match="at least one image"):
        mean_interval(right[:0], seed=0)


def test_ten_thousand_resamples_of_fifty_thousand_images_take_a_moment():
    gain = hits(0.7, 50_000, 0).double() - hits(0.69, 50_000, 1).double()
    start = time.process_time()
    low, high = mean_interval(gain, seed=0, resamples=10_000)
    assert time.process_time() - start < 2
    spread = 1.96 * gain.std().item() / 50_000**0.5
    assert (low, high) == pytest.approx((gain.mean().item() - spread, gain.mean().item() + spread), rel=0.05)


# ---- compare ---------------------------------------------------------------------------------------------------------


def row(model: str, right: torch.Tensor, task: str) -> Result:
    keys = [f"{task}/{i}" for i in range(len(right))]
    return Result(model, task, "top1", right.double().mean().item(), n=len(right), extra=marked(right, keys))


def test_compare_adjusts_for_the_number_of_tasks_and_tests_equivalence(tmp_path, capsys):
    tasks = {"a": (0.9, 0.6), "b": (0.7, 0.69), "c": (0.65, 0.5)}
    pairs = {name: (hits(p, 300, i), hits(q, 300, 9 + i)) for i, (name, (p, q)) in enumerate(tasks.items())}
    rows = [row(model, pair[place], name) for name, pair in pairs.items() for place, model in enumerate("AB")]
    write_rows(tmp_path / "rows.jsonl", rows)
    out = tmp_path / "out.jsonl"
    given = ["--margin", "0.1", "--agreement", "--resamples", "10000"]
    assert main(["compare", str(tmp_path / "rows.jsonl"), "--out", str(out), *given]) == 0
    made = {(r.task, r.metric): r for r in read_rows(out)[1]}
    plain = {r.task: r for r in paired_rows(rows)}
    adjusted = holm([plain[name].extra["mcnemar_p"] for name in tasks])
    for (name, (a, b)), p in zip(pairs.items(), adjusted, strict=True):
        difference = made[name, "top1_difference"]
        assert (difference.value, difference.extra["mcnemar_p"]) == (plain[name].value, plain[name].extra["mcnemar_p"])
        assert difference.extra["holm_p"] == pytest.approx(p)
        assert difference.extra["equivalence_p"] == pytest.approx(equivalence(a, b, 0.1))
        assert difference.ci_low == pytest.approx(plain[name].ci_low, abs=0.02)
        agreement = made[name, "top1_agreement"]
        assert agreement.value == pytest.approx(cohen_kappa_score(a, b))
        assert agreement.ci_low < agreement.value < agreement.ci_high
    printed = capsys.readouterr().out
    assert printed.count("Holm p=") == printed.count("equivalence p=") == 3
    # Without options: the rows of ever, with the adjusted values beside them.
    assert main(["compare", str(tmp_path / "rows.jsonl"), "--out", str(out)]) == 0
    again = read_rows(out)[1]
    assert [(r.key, r.value, r.ci_low, r.ci_high) for r in again] == [
        (r.key, r.value, r.ci_low, r.ci_high) for r in paired_rows(rows)
    ]
    (alone,) = compared(rows[:2])
    assert "holm_p" not in alone.extra
    json.dumps([r.extra for r in again])
    for options in (["--margin", "2"], ["--resamples", "0"]):
        assert main(["compare", str(tmp_path / "rows.jsonl"), *options]) != 0


# ---- calibration -----------------------------------------------------------------------------------------------------


def overconfident(n: int = 4000):
    rng = np.random.default_rng(5)
    target = rng.integers(6, size=n)
    logits = rng.normal(size=(n, 6)) + 1.5 * np.eye(6)[target]
    return torch.from_numpy(5 * logits), torch.from_numpy(target)


def test_the_temperature_is_the_most_likely_one():
    """Against scipy's general minimiser of scikit-learn's log loss, on the same half."""
    logits, target = overconfident()
    found = minimize(lambda t: log_loss(target, softmax(logits / np.exp(t[0]), axis=1)), [0.0], method="Nelder-Mead")
    assert fit_temperature(logits, target) == pytest.approx(np.exp(found.x[0]), rel=1e-3)
    fitted, judged = halves(len(target))
    assert sorted([*fitted.tolist(), *judged.tolist()]) == list(range(4000))
    t = fit_temperature(logits[fitted], target[fitted])
    assert METRICS["temperature"].function(logits, target).item() == pytest.approx(t)
    assert t == pytest.approx(5 / 1.5, rel=0.1)  # the likelihood's own slope is the shift, 1.5
    left = METRICS["nll"].function(logits[judged] / t, target[judged]).item()
    assert METRICS["calibrated_nll"].function(logits, target).item() == pytest.approx(left)
    assert left < METRICS["nll"].function(logits, target).item()
    assert (
        METRICS["calibrated_ece"].function(logits, target).item() < METRICS["ece"].function(logits, target).item() / 4
    )
    weights = torch.stack([torch.ones(4000), torch.zeros(4000)]).double()
    weights[1, judged[:100]] = 1
    both = METRICS["calibrated_nll"].function(logits, target, weights)
    first = METRICS["nll"].function(logits[judged[:100]] / t, target[judged[:100]]).item()
    assert both.tolist() == pytest.approx([left, first])
    with pytest.raises(ValueError, match="at least 2 images"):
        halves(1)


def test_a_clip_is_calibrated_by_its_own_scale(vit, tmp_path):
    """The logits are similarities times the model's scale; metrics besides the usual ones come after them."""
    draws = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / "data/test" / ("cat", "dog")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    tasks = open_tasks([f"folder:{tmp_path / 'data'}"], "", also=("nll", "temperature"))
    rows = evaluate(vit.model, vit.preprocess, vit.tokenizer, tasks, "", model_name="m", examples=0)
    assert [row.metric for row in rows] == ["top1", "mean_per_class", "nll", "temperature"]
    seen = embed_images(vit, tasks[0].test_set, Settings(examples=0))
    with torch.no_grad():
        texts = vit.model.encode_text(vit.tokenizer(["a photo of a cat.", "a photo of a dog."]), normalize=True)
        logits = vit.model.logit_scale.exp() * seen.features @ texts.T
    assert rows[2].value == pytest.approx(log_loss(seen.labels, softmax(logits.numpy(), axis=1)), rel=1e-5)
