"""Models beside people out of distribution, as Geirhos et al. 2021 (arXiv:2106.07411) compute it. Needs no torch.

m models · h people · n stimuli · c conditions · r resamples, the first of them the data as they are

Per condition and single person, then the mean over conditions, over people, over data sets:

    accuracy_difference   (p - q)^2                 p, q: accuracy of the model, of the person, in that condition
    observed_consistency  o = share of stimuli both get right or both get wrong
    error_consistency     (o - e) / (1 - e)         e = p q + (1 - p)(1 - q); 1 where o = 1   (Cohen's kappa)

Accuracy pools the trials of a data set. Conditions that do not count are left out of all four. People among themselves:
the same over their pairs. Shape bias (Geirhos et al. 2019, arXiv:1811.12231): of the cue conflicts answered with the
shape's or the texture's category, the share answered with the shape's.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ssmclip.data.distortions.registry import kept
from ssmclip.humans.stimuli import CATEGORIES, CUE_CONFLICT, GEIRHOS_2021, PARAMETRIC_SETS, STIMULUS_SETS
from ssmclip.humans.trials import NOT_SHOWN, Answers, Trials, match_trials
from ssmclip.rows import Result
from ssmclip.rows.condition import AVERAGE, LEVEL, Where

log = logging.getLogger(__name__)

AVERAGES = {
    "17 data sets": GEIRHOS_2021,
    "16 data sets, without cue conflict": tuple(name for name in GEIRHOS_2021 if name != CUE_CONFLICT),
    "12 parametric data sets": PARAMETRIC_SETS,
}
MEASURES = ("ood_accuracy", "accuracy_difference", "observed_consistency", "error_consistency")
RANKED = {"accuracy_difference": 1, "observed_consistency": -1, "error_consistency": -1}  # -1: the highest comes first
HUMANS = "humans"
TASK = "ood"
TITLE = "out of distribution"
QUANTILES = (0.025, 0.975)
OVER = ("images", "humans", "both")  # what the bootstrap draws anew: the first axis of an array of resamples


@dataclass
class Scores:
    """What one data set gives, each number as (3, r): the resamples of OVER, the first as the data are.

    values: (measure, subject); levels: (condition, measure, subject); shape_bias: subject -> (17, 3, r), of all stimuli
    and of each category; extra: (measure, subject) -> what a row says besides; n: subject -> stimuli it was shown.
    """

    dataset: str
    humans: tuple[str, ...]
    total: int
    values: dict[tuple[str, str], np.ndarray] = field(default_factory=dict)
    levels: dict[tuple[int, str, str], np.ndarray] = field(default_factory=dict)
    shape_bias: dict[str, np.ndarray] = field(default_factory=dict)
    extra: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    n: dict[str, int] = field(default_factory=dict)

    @property
    def whole(self) -> list[str]:
        """The subjects that were shown every stimulus."""
        return [name for name, n in self.n.items() if n == self.total]


def score_decisions(humans: Trials, models: Trials, *, resamples: int = 0, seed: int = 0) -> list[Result]:
    """Every measure of every model, and of people (the model "humans"), as rows; what could not be used is logged.

    Averages first (task "ood"), then the data sets ("ood/SET") and their conditions ("level=LABEL"). resamples: of the
    bootstrap, 0 for no intervals. Stimuli are drawn within their condition, people within their data set; an interval
    is over both at once, `extra` has it over each alone. A model that lacks stimuli of a data set is scored on the
    others, and its rows say so ("partial"); averages are given where nothing lacks. Raises ValueError as `match_trials`
    does, and when no decision is of a stimulus people saw.
    """
    found, notes = match_trials(humans, models)
    if not any(answers.models for answers in found):
        raise ValueError("; ".join(["no decision is of a stimulus that people saw", *notes]))
    scored = {
        answers.dataset: score_dataset(answers, resamples, np.random.default_rng([seed, i]))
        for i, answers in enumerate(found)
        if answers.models  # people alone are compared with nobody
    }
    for name in dict.fromkeys(name for answers in found for name in answers.models):
        if lacking := [
            dataset for dataset in GEIRHOS_2021 if dataset not in scored or name not in scored[dataset].whole
        ]:
            notes.append(f"{name}: no average over 17 data sets; missing or not whole: {', '.join(lacking)}")
    for note in notes:
        log.warning(note)
    averages = [row for label, names in AVERAGES.items() for row in average_rows(label, names, scored)]
    return averages + [row for scores in scored.values() for row in dataset_rows(scores)]


def score_dataset(answers: Answers, resamples: int = 0, rng: np.random.Generator | None = None) -> Scores:
    """The measures of one data set. Models that lack the same stimuli are scored together, on those they have."""
    rng = rng or np.random.default_rng(0)
    scores = Scores(answers.dataset, answers.humans, len(answers.images))
    share = _draw(np.zeros(len(answers.humans), int), resamples, rng) / len(answers.humans)
    weights = _draw(answers.conditions, resamples, rng)
    human = (answers.human == answers.categories).astype(float)
    _score_people(scores, human, answers.conditions, weights, share)
    shown = answers.model != NOT_SHOWN
    for has in np.unique(shown, axis=0):
        group = np.flatnonzero((shown == has).all(axis=1))
        model = (answers.model[group] == answers.categories).astype(float)
        drawn = weights if has.all() else _draw(answers.conditions[has], resamples, rng)
        names = [answers.models[i] for i in group]
        _score_models(scores, names, model[:, has], human[:, has], answers.conditions[has], drawn, share)
    if answers.dataset == CUE_CONFLICT:
        _score_shape(scores, answers, weights, share)
    return scores


def agreement(
    a: np.ndarray, b: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Accuracies (r, a) and (r, b), observed and error consistency (r, a, b).

    a: (a, n), b: (b, n): 1 where right, 0 where wrong; weights: (r, n), how often each stimulus counts.

    >>> right, other = np.array([[1., 1., 0., 0.]]), np.array([[1., 0., 1., 0.], [1., 1., 0., 0.]])
    >>> *_, observed, kappa = agreement(right, other, np.ones((1, 4)))
    >>> observed.tolist(), kappa.tolist()
    ([[[0.5, 1.0]]], [[[0.0, 1.0]]])
    """
    total = weights.sum(axis=1)[:, None, None]
    right_a, right_b = weights @ a.T, weights @ b.T
    both = (weights @ (a[:, None] * b).reshape(-1, a.shape[1]).T).reshape(-1, len(a), len(b))
    observed = (total - right_a[:, :, None] - right_b[:, None] + 2 * both) / total
    p, q = right_a / total[:, 0], right_b / total[:, 0]
    chance = p[:, :, None] * q[:, None] + (1 - p[:, :, None]) * (1 - q[:, None])
    kappa = np.divide(observed - chance, 1 - chance, out=np.ones_like(observed), where=observed != 1)
    return p, q, observed, kappa


def average_rows(label: str, names: Sequence[str], scored: dict[str, Scores]) -> list[Result]:
    """The unweighted mean over data sets of each subject that was shown all of them, and the models' mean ranks."""
    if not set(names) <= set(scored):
        return []
    subjects = [name for name in scored[names[0]].n if all(name in scored[dataset].whole for dataset in names)]
    means = {
        (measure, subject): np.mean([scored[dataset].values[measure, subject] for dataset in names], axis=0)
        for measure in MEASURES
        for subject in subjects
    }
    n = sum(scored[dataset].total for dataset in names)
    rows = []
    for (measure, subject), samples in means.items():
        extra = {"title": TITLE}
        if measure == "error_consistency" and subject != HUMANS:
            others = [other for other in subjects if other not in (subject, HUMANS)]
            matrix = [scored[dataset].extra[measure, subject]["with"] for dataset in names]
            extra["with"] = {other: float(np.mean([line[other] for line in matrix])) for other in others}
        rows.append(_row(subject, TASK, {AVERAGE: label}, measure, samples, n, extra))
    models = [subject for subject in subjects if subject != HUMANS]
    if models:
        # (measure, model, 3, r) -> the mean over the measures of the place among the models
        values = np.array([[sign * means[measure, model] for model in models] for measure, sign in RANKED.items()])
        for model, samples in zip(models, _ranks(values).mean(axis=0), strict=True):
            rows.append(
                _row(model, TASK, {AVERAGE: label}, "mean_rank", samples, n, {"title": TITLE, "among": len(models)})
            )
    return rows


def dataset_rows(scores: Scores) -> list[Result]:
    """The rows of one data set: its four measures, each of its conditions, and shape bias where there is one."""
    task, labels = f"{TASK}/{scores.dataset}", STIMULUS_SETS[scores.dataset].conditions
    title = {"title": f"{TITLE}, {scores.dataset}"}
    rows = []
    for (measure, subject), samples in scores.values.items():
        extra = title | scores.extra.get((measure, subject), {}) | _partial(scores, subject)
        rows.append(_row(subject, task, {}, measure, samples, scores.n[subject], extra))
    for subject, samples in scores.shape_bias.items():
        per_category = dict(zip(CATEGORIES, (_plain(bias[0, 0]) for bias in samples[1:]), strict=True))
        extra = title | {"per_category": per_category} | scores.extra.get(("shape_bias", subject), {})
        rows.append(
            _row(subject, task, {}, "shape_bias", samples[0], scores.n[subject], extra | _partial(scores, subject))
        )
    counted = _counted(scores.dataset)
    for (place, measure, subject), samples in scores.levels.items() if len(labels) > 1 else ():
        extra = title | {"counted": place in counted} | _partial(scores, subject)
        metric = "accuracy" if measure == "ood_accuracy" else measure
        rows.append(_row(subject, task, {LEVEL: labels[place]}, metric, samples, None, extra))
    return rows


def _counted(dataset: str) -> list[int]:
    return kept(dataset) if dataset in PARAMETRIC_SETS else list(range(len(STIMULUS_SETS[dataset].conditions)))


def _score_people(scores: Scores, human, conditions, weights, share) -> None:
    first, second = np.triu_indices(len(human), k=1)
    table = {
        place: {
            measure: cells[:, None, first, second] if cells.ndim == 3 else cells[:, None]
            for measure, cells in of.items()
        }
        for place, of in _by_condition(human, human, conditions, weights).items()
    }
    with np.errstate(invalid="ignore"):  # one person drawn every time has no pair
        pairs = share[:, first] * share[:, second]
        pairs = pairs / pairs.sum(axis=1, keepdims=True)
    _add(scores, [HUMANS], table, conditions, {"ood_accuracy": share} | dict.fromkeys(RANKED, pairs))
    scores.n[HUMANS] = scores.total
    for measure in MEASURES:
        scores.extra[measure, HUMANS] = {"humans": len(human)}


def _score_models(scores: Scores, names: Sequence[str], model, human, conditions, weights, share) -> None:
    table = _by_condition(model, human, conditions, weights)
    for cells in table.values():
        cells["ood_accuracy"] = cells["ood_accuracy"][..., None]  # of no person
    _add(scores, names, table, conditions, {"ood_accuracy": np.ones((len(weights), 1))} | dict.fromkeys(RANKED, share))
    places = [place for place in _counted(scores.dataset) if place in table]
    among = _by_condition(model, model, conditions, weights[:1])
    matrix = np.mean([among[place]["error_consistency"][0] for place in places], axis=0)
    with_people = np.mean([table[place]["error_consistency"][0] for place in places], axis=0)
    for i, name in enumerate(names):
        scores.n[name] = model.shape[1]
        scores.extra["error_consistency", name] = {
            "per_human": dict(zip(scores.humans, with_people[i].tolist(), strict=True)),
            "with": {other: matrix[i, j].item() for j, other in enumerate(names) if j != i},
        }


def _by_condition(a, b, conditions, weights) -> dict[int, dict[str, np.ndarray]]:
    """condition -> measure -> (r, a, b); for ood_accuracy the accuracy of a, (r, a)."""
    table = {}
    for place in np.unique(conditions).tolist():
        here = conditions == place
        p, q, observed, kappa = agreement(a[:, here], b[:, here], weights[:, here])
        difference = (p[:, :, None] - q[:, None]) ** 2
        table[place] = dict(zip(MEASURES, (p, difference, observed, kappa), strict=True))
    return table


def _add(scores: Scores, names: Sequence[str], table, conditions, shares) -> None:
    """Cells (r, subject, person) of each condition into the scores: means over people, then over kept conditions."""
    counts = np.bincount(conditions)
    places = [place for place in _counted(scores.dataset) if place in table]
    if not places:
        raise ValueError(f"{scores.dataset}: {', '.join(names)} answered to no stimulus of a condition that counts")
    for measure, share in shares.items():
        reduced = {place: _over_people(cells[measure], share) for place, cells in table.items()}
        for place, samples in reduced.items():
            scores.levels |= {(place, measure, name): samples[i] for i, name in enumerate(names)}
        pooled = counts[places] if measure == "ood_accuracy" else None
        mean = np.average([reduced[place] for place in places], axis=0, weights=pooled)
        scores.values |= {(measure, name): mean[i] for i, name in enumerate(names)}


def _over_people(cells: np.ndarray, share: np.ndarray) -> np.ndarray:
    """cells: (r, k, h), share: (r, h), each person's; -> (k, 3, r), the mean over people, as OVER names them."""
    images = cells.mean(axis=2)
    humans = share @ cells[0].T
    return np.stack([images, humans, np.einsum("rkh,rh->rk", cells, share)]).transpose(2, 0, 1)


def _score_shape(scores: Scores, answers: Answers, weights, share) -> None:
    """S / (S + T) over the stimuli whose shape and texture are of different categories; of people, pooled."""
    texture = np.array(
        [CATEGORIES.index(re.match("[a-z]+", name.rpartition("-")[2]).group()) for name in answers.images]
    )
    conflict = answers.categories != texture
    member = np.stack([np.ones_like(conflict), *(answers.categories == i for i in range(len(CATEGORIES)))]) & conflict
    counts = {}
    for kind, responses in ((HUMANS, answers.human), ("models", answers.model)):
        for said, truth in (("shape", answers.categories), ("texture", texture)):
            hits = ((responses == truth)[:, None] & member).reshape(-1, len(texture)).astype(float)
            counts[kind, said] = (weights @ hits.T).reshape(len(weights), len(responses), len(member))
    pooled = {said: _over_people(counts[HUMANS, said].transpose(0, 2, 1), share) for said in ("shape", "texture")}
    scores.shape_bias[HUMANS] = _share_of(pooled["shape"], pooled["texture"])
    single = _share_of(counts[HUMANS, "shape"][0, :, 0], counts[HUMANS, "texture"][0, :, 0])
    scores.extra["shape_bias", HUMANS] = {"per_human": dict(zip(answers.humans, map(_plain, single), strict=True))}
    biases = _share_of(counts["models", "shape"], counts["models", "texture"])  # (r, model, 17)
    for i, name in enumerate(answers.models):
        scores.shape_bias[name] = _without_people(biases[:, i].T)


def _share_of(part: np.ndarray, other: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # no answer of either kind: not a number
        return part / (part + other)


def _without_people(samples: np.ndarray) -> np.ndarray:
    """(k, r), drawn over images -> (k, 3, r), where people make no difference."""
    return np.stack([samples, np.repeat(samples[:, :1], samples.shape[1], axis=1), samples], axis=1)


def _draw(groups: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(1 + resamples, n): how often each is drawn, with replacement within its group; in the first, once."""
    weights = np.ones((1 + resamples, len(groups)))
    rows = np.arange(resamples)[:, None]
    for group in np.unique(groups) if resamples else ():
        here = np.flatnonzero(groups == group)
        drawn = rng.integers(len(here), size=(resamples, len(here))) + rows * len(here)
        weights[1:, here] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return weights


def _ranks(values: np.ndarray) -> np.ndarray:
    """Places along axis 1, from 1 for the smallest; equals share the mean of theirs."""
    own, others = values[:, :, None], values[:, None]
    return (others < own).sum(axis=2) + ((others == own).sum(axis=2) + 1) / 2


def _row(model: str, task: str, where: Where, metric: str, samples: np.ndarray, n: int | None, extra) -> Result:
    """samples: (3, r)."""
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
