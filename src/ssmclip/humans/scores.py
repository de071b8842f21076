"""Rows of models compared with people out of distribution, as Geirhos et al. 2021 (arXiv:2106.07411) compute them.

The measures of one data set are in `measures.py`; averages are unweighted means over data sets.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from ssmclip.humans.measures import MEASURES, OVER, Group, Scores, counted_conditions, ranks, score_dataset
from ssmclip.humans.stimuli import CATEGORIES, CUE_CONFLICT, GEIRHOS_2021, PARAMETRIC_SETS, STIMULUS_SETS
from ssmclip.humans.trials import Answers, Trials, match_trials
from ssmclip.rows import Result
from ssmclip.rows.condition import AVERAGE, LEVEL, Where
from ssmclip.rows.tasks import HUMANS, OOD, of_ood

log = logging.getLogger(__name__)

AVERAGES = {
    "17 data sets": GEIRHOS_2021,
    "16 data sets, without cue conflict": tuple(name for name in GEIRHOS_2021 if name != CUE_CONFLICT),
    "12 parametric data sets": PARAMETRIC_SETS,
}
RANKED = {"accuracy_difference": 1, "observed_consistency": -1, "error_consistency": -1}  # -1: the highest comes first
TITLE = "out of distribution"
QUANTILES = (0.025, 0.975)


def score_decisions(humans: Trials, models: Trials, *, resamples: int = 0, seed: int = 0) -> list[Result]:
    """Return all rows of `score_sets` in one list."""
    return [row for rows in score_sets(humans, models, resamples=resamples, seed=seed) for row in rows]


def score_sets(humans: Trials, models: Trials, *, resamples: int = 0, seed: int = 0) -> Iterator[list[Result]]:
    """Yield every measure of every model, and of people (the model "humans"): averages, then one data set's after
    another. Unused data are logged.

    Averages are rows of the task "ood"; a data set's are of "ood/SET", and have its conditions too. resamples: of the
    bootstrap, 0 for no intervals. Stimuli are drawn within their condition, people within their data set; an interval
    is over both at once, `extra` has it over each alone. A model without some stimuli of a data set is scored on
    the others, and its rows say so ("partial"); averages are given if nothing is missing. Raises ValueError as
    `match_trials` does, and if no decision is on a stimulus people saw.
    """
    matched, notes = match_trials(humans, models)
    if not any(answers.models for answers in matched):
        raise ValueError("; ".join(["none of the decisions is on a stimulus that people saw", *notes]))
    scored = {
        answers.dataset: score_dataset(answers, resamples, np.random.default_rng([seed, i]))
        for i, answers in enumerate(matched)
        if answers.models  # people alone are compared with nobody
    }
    for note in [*notes, *_without_average(matched, scored)]:
        log.warning(note)
    yield [row for label, names in AVERAGES.items() for row in average_rows(label, names, scored)]
    for scores in scored.values():
        yield dataset_rows(scores)


def _without_average(matched: Sequence[Answers], scored: Mapping[str, Scores]) -> Iterator[str]:
    """Yield a note for each model that was not asked all of the 17 data sets."""
    for name in dict.fromkeys(name for answers in matched for name in answers.models):
        incomplete = [dataset for dataset in GEIRHOS_2021 if dataset not in scored or name not in scored[dataset].whole]
        if incomplete:
            yield f"{name}: no average over 17 data sets; missing or incomplete: {', '.join(incomplete)}"


def average_rows(label: str, names: Sequence[str], scored: dict[str, Scores]) -> list[Result]:
    """Return unweighted means over data sets, of the subjects that were shown all of them, and models' mean ranks."""
    if not set(names) <= set(scored):
        return []
    subjects = [name for name in scored[names[0]].n if all(name in scored[dataset].whole for dataset in names)]
    means = {
        (measure, subject): np.mean([scored[dataset].samples(measure, subject) for dataset in names], axis=0)
        for measure in MEASURES
        for subject in subjects
    }
    n = sum(scored[dataset].total for dataset in names)
    rows = []
    for (measure, subject), samples in means.items():
        extra = {"title": TITLE}
        if measure == "error_consistency" and subject != HUMANS:
            others = [other for other in subjects if other not in (subject, HUMANS)]
            matrix = [scored[dataset].consistency_with(subject) for dataset in names]
            extra["with"] = {other: float(np.mean([line[other] for line in matrix])) for other in others}
        rows.append(_row(subject, OOD, {AVERAGE: label}, measure, samples, n, extra))
    models = [subject for subject in subjects if subject != HUMANS]
    if models:
        # (measure, model, 3, r) -> the mean over the measures of the place among the models
        values = np.array([[sign * means[measure, model] for model in models] for measure, sign in RANKED.items()])
        for model, samples in zip(models, ranks(values).mean(axis=0), strict=True):
            extra = {"title": TITLE, "among": len(models)}
            rows.append(_row(model, OOD, {AVERAGE: label}, "mean_rank", samples, n, extra))
    return rows


def dataset_rows(scores: Scores) -> list[Result]:
    """Return the rows of one data set: its measures, shape bias where there is one, and each of its conditions."""
    task, title = of_ood(scores.dataset), {"title": f"{TITLE}, {scores.dataset}"}
    rows = []
    for group in scores.groups:
        for measure, samples in group.values.items():
            for place, subject in enumerate(group.names):
                extra = title | _about(scores, group, place, measure) | _partial(scores, subject)
                rows.append(_row(subject, task, {}, measure, samples[place], group.n, extra))
    return rows + _shape_bias_rows(scores, task, title) + _level_rows(scores, task, title)


def _about(scores: Scores, group: Group, place: int, measure: str) -> dict[str, Any]:
    """Return further fields of the row for a measure of the subject at that place of the group."""
    if group.names == (HUMANS,):
        return {"humans": len(scores.humans)}
    if measure != "error_consistency":
        return {}
    per_human = dict(zip(scores.humans, group.with_people[place].tolist(), strict=True))
    return {"per_human": per_human, "with": scores.consistency_with(group.names[place])}


def _shape_bias_rows(scores: Scores, task: str, title: dict[str, str]) -> list[Result]:
    rows = []
    bias = scores.shape_bias
    for subject, samples in zip(bias.names, bias.samples, strict=True) if bias else ():
        per_category = dict(zip(CATEGORIES, (_plain(of_category[0, 0]) for of_category in samples[1:]), strict=True))
        extra = title | {"per_category": per_category} | _partial(scores, subject)
        if subject == HUMANS:
            extra["per_human"] = dict(zip(scores.humans, map(_plain, bias.per_human), strict=True))
        rows.append(_row(subject, task, {}, "shape_bias", samples[0], scores.n[subject], extra))
    return rows


def _level_rows(scores: Scores, task: str, title: dict[str, str]) -> list[Result]:
    labels, counted = STIMULUS_SETS[scores.dataset].conditions, counted_conditions(scores.dataset)
    rows = []
    for group in scores.groups if len(labels) > 1 else ():
        for measure, levels in group.levels.items():
            metric = "accuracy" if measure == "ood_accuracy" else measure
            for condition, samples in levels.items():
                for place, subject in enumerate(group.names):
                    extra = title | {"counted": condition in counted} | _partial(scores, subject)
                    where = {LEVEL: labels[condition]}
                    rows.append(_row(subject, task, where, metric, samples[place], None, extra))
    return rows


def _row(
    model: str,
    task: str,
    where: Where,
    metric: str,
    samples: Float64[np.ndarray, "3 r"],
    n: int | None,
    extra: dict[str, Any],
) -> Result:
    value = float(samples[0, 0])
    if samples.shape[1] == 1:
        return Result(model, task, metric, value, where=where, n=n, extra=extra)
    # A resample of one person alone has no pair; nanquantile costs ten times as much.
    quantile = np.nanquantile if np.isnan(samples).any() else np.quantile
    limits = quantile(samples[:, 1:], QUANTILES, axis=1).T.tolist()
    alone = {f"over_{what}": limit for what, limit in zip(OVER[:2], limits, strict=False)}
    return Result(model, task, metric, value, *limits[2], n, where=where, extra=extra | alone)


def _partial(scores: Scores, subject: str) -> dict[str, Any]:
    used = scores.n[subject]
    return {} if used == scores.total else {"partial": {"used": used, "of": scores.total}}


def _plain(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
