"""Probes: seconds of ours and of scikit-learn on the same embeddings, and whether they say the same. Writes rows.

    python benchmarks/probes.py --out results/probes.jsonl    some minutes on two idle cores; --quick: one

10,000 embeddings of width 512 to train on and 2,000 to test on, of 10 classes and of 100, drawn so that their variance
falls as one over the axis, as that of trained encoders about does. One process, all cores, turns taken, medians.

    linear    CLIP's whole protocol: 15 penalties on a fifth of the images, then one fit to all; scikit-learn's
              LogisticRegression fits the same penalties, one after another, with its own tolerance
    fit       one fit with C = 1
    knn       20 neighbours; scikit-learn's KNeighborsClassifier, brute force, with the same weights

`seconds` of each; `time_ratio`: ours over scikit-learn's. `extra` has the share of test images that both put into the
same class, and of fits the objective's value: lower is nearer to the optimum.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from tqdm import tqdm

from ssmclip.evaluate.probes.draws import hold_out
from ssmclip.evaluate.probes.knn import Neighbours
from ssmclip.evaluate.probes.linear import Linear, fit_and_score
from ssmclip.evaluate.probes.logistic import MAX_ITERATIONS, Regression
from ssmclip.evaluate.probes.probe import Labelled, Splits
from ssmclip.rows import Result, append_rows, describe_run, write_rows

TASK = "probes"
OURS, THEIRS = "ssmclip", "scikit-learn"
WIDTH, TESTED, CLASSES = 512, 2000, (10, 100)
SEPARATION = 0.15  # of the classes' means, in standard deviations within a class, on every axis


def embeddings(n: int, classes: int, seed: int = 0) -> Splits:
    """Features of n images to train on and TESTED to test on."""
    draws = np.random.default_rng(seed)
    labels = draws.permutation(np.arange(n + TESTED) % classes)
    means = SEPARATION * draws.standard_normal((classes, WIDTH))
    on_axes = (means[labels] + draws.standard_normal((n + TESTED, WIDTH))) / np.sqrt(1 + np.arange(WIDTH))
    rotation = np.linalg.qr(draws.standard_normal((WIDTH, WIDTH)))[0]
    features = torch.from_numpy((on_axes @ rotation + 0.5).astype(np.float32))
    train = Labelled(features[:n], torch.from_numpy(labels[:n]))
    names = [str(label) for label in range(classes)]
    return Splits(train, None, features[n:], torch.from_numpy(labels[n:]).unique(), names)


def timed(run: Callable[[], Any], repetitions: int) -> tuple[float, Any]:
    """Median seconds, and what came out last."""
    times = []
    for _ in range(repetitions):
        start = time.perf_counter()
        made = run()
        times.append(time.perf_counter() - start)
    return statistics.median(times), made


def their_fit(train: Labelled, C: float) -> LogisticRegression:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it did not converge
        model = LogisticRegression(C=C, max_iter=MAX_ITERATIONS)
        return model.fit(train.features.double().numpy(), train.labels.numpy())


def their_protocol(splits: Splits, strengths: list[float], best: float) -> np.ndarray:
    kept, held = hold_out(splits.train.labels, 0)
    train, validation = splits.train.at(kept), splits.train.at(held)
    for C in strengths:
        their_fit(train, C).score(validation.features.double().numpy(), validation.labels.numpy())
    return their_fit(splits.train, best).predict(splits.test.double().numpy())


def objective(weight: np.ndarray, intercept: np.ndarray, train: Labelled, C: float) -> float:
    logits = train.features.double().numpy() @ weight.T + intercept
    right = logits[np.arange(len(train)), train.labels.numpy()]
    return float(C * (logsumexp(logits, axis=1) - right).sum() + (weight**2).sum() / 2)


def their_votes(splits: Splits) -> np.ndarray:
    probe = Neighbours()
    model = KNeighborsClassifier(
        probe.k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / probe.temperature)
    )
    return model.fit(splits.train.features.numpy(), splits.train.labels.numpy()).predict(splits.test.numpy())


def of_linear(splits: Splits, repetitions: int) -> Iterator[Result]:
    ours, (answer,) = timed(lambda: Linear().answers(splits, 0), repetitions)
    strengths = [C for C, _ in answer.about["sweep"]]
    theirs, guessed = timed(lambda: their_protocol(splits, strengths, answer.about["C"]), 1)
    yield from both("linear", splits, ours, theirs, answer.scores.argmax(1).numpy(), guessed, fits=len(strengths) + 1)


def of_fit(splits: Splits, repetitions: int) -> Iterator[Result]:
    train, classes = splits.train, len(splits.names)
    ours, (scores, _) = timed(lambda: fit_and_score(train, 1.0, splits.test, classes), repetitions)
    theirs, model = timed(lambda: their_fit(train, 1.0), 1)
    fitted = Regression(train.features.numpy(), train.labels.numpy(), classes).fit(1.0)
    values = {
        "objective": objective(fitted.weight, fitted.intercept, train, 1.0),
        "their_objective": objective(model.coef_, model.intercept_, train, 1.0),
    }
    guessed = model.predict(splits.test.double().numpy())
    yield from both("fit", splits, ours, theirs, scores.argmax(1).numpy(), guessed, **values)


def of_neighbours(splits: Splits, repetitions: int) -> Iterator[Result]:
    ours, (answer,) = timed(lambda: Neighbours().answers(splits, 0), repetitions)
    theirs, guessed = timed(partial(their_votes, splits), repetitions)
    yield from both("knn", splits, ours, theirs, answer.scores.argmax(1).numpy(), guessed)


def both(
    kind: str, splits: Splits, ours: float, theirs: float, guess: np.ndarray, their_guess: np.ndarray, **more: Any
) -> Iterator[Result]:
    where = {"kind": f"{kind}, {len(splits.names)} classes", "size": len(splits.train), "width": WIDTH}
    extra = {"same_class": float((guess == their_guess).mean()), "threads": torch.get_num_threads(), **more}
    yield Result(OURS, TASK, "seconds", ours, where=where, extra=extra)
    yield Result(THEIRS, TASK, "seconds", theirs, where=where)
    yield Result(OURS, TASK, "time_ratio", ours / theirs, where=where, extra={"over": THEIRS})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/probes.jsonl"))
    parser.add_argument("--quick", action="store_true", help="2,000 embeddings, 10 classes, one repetition")
    args = parser.parse_args()
    size, repetitions = (2000, 1) if args.quick else (10_000, 3)
    write_rows(args.out, [], describe_run(0, threads=torch.get_num_threads(), cores=os.cpu_count()))
    for classes in tqdm(CLASSES[:1] if args.quick else CLASSES, desc="classes"):
        splits = embeddings(size, classes)
        for measure in (of_neighbours, of_fit, of_linear):
            for row in measure(splits, repetitions):
                append_rows(args.out, [row])
                tqdm.write(f"{row.model:14} {row.condition:44} {row.metric:12} {row.value:.4g} {row.extra}")


if __name__ == "__main__":
    main()
