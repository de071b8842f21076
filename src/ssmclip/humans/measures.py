"""How models compare with people on one data set of stimuli, as arrays with their bootstrap resamples.

k subjects: models, or people as one · h people · n stimuli · r resamples, the first of them the data as they are

Per condition and single person, then the mean over conditions, over people:

    accuracy_difference   (p - q)^2                 p, q: accuracy of the model, of the person, in that condition
    observed_consistency  o = share of stimuli both get right or both get wrong
    error_consistency     (o - e) / (1 - e)         e = p q + (1 - p)(1 - q); 1 where o = 1   (Cohen's kappa)

Accuracy pools the trials of a data set. Conditions that do not count (`counted_conditions`) are left out of all four.
People among themselves: the same over their pairs. Shape bias (Geirhos et al. 2019, arXiv:1811.12231): of the cue
conflicts answered with the shape's or the texture's category, the share answered with the shape's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float64, Int, Num

from ssmclip.data.distortions.registry import DISTORTIONS, kept
from ssmclip.humans.stimuli import CATEGORIES, CUE_CONFLICT, PARAMETRIC_SETS, STIMULUS_SETS
from ssmclip.humans.trials import NOT_SHOWN, Answers
from ssmclip.rows.tasks import HUMANS

MEASURES = ("ood_accuracy", "accuracy_difference", "observed_consistency", "error_consistency")
CONSISTENCY = MEASURES[1:]  # those that are of a subject and a person
OVER = ("images", "humans", "both")  # what the bootstrap resamples: an axis of three in the arrays below

Samples = Float64[np.ndarray, "k 3 r"]
Table = Mapping[int, Mapping[str, Float64[np.ndarray, "..."]]]  # place of a condition -> measure -> cells


@dataclass(frozen=True)
class Design:
    """The stimuli shown to some subjects, and the bootstrap draws.

    conditions: of each stimulus, a place in the data set's conditions; weights: how often each stimulus counts in each
    resample; share: each person's share in each resample.
    """

    dataset: str
    conditions: Int[np.ndarray, " n"]
    weights: Float64[np.ndarray, "r n"]
    share: Float64[np.ndarray, "r h"]

    @property
    def counted(self) -> list[int]:
        """Return the conditions that count and have stimuli here."""
        present = set(np.unique(self.conditions).tolist())
        return [place for place in counted_conditions(self.dataset) if place in present]


@dataclass(frozen=True)
class Group:
    """Subjects that were shown the same stimuli: models, or people taken together as HUMANS.

    n: how many stimuli; values: measure -> samples; levels: measure -> place of a condition -> samples.
    with_people, with_models: of models, the error consistency of each with each person and with each other.
    """

    names: tuple[str, ...]
    n: int
    values: dict[str, Samples]
    levels: dict[str, dict[int, Samples]]
    with_people: Float64[np.ndarray, "k h"] | None = None
    with_models: Float64[np.ndarray, "k k"] | None = None


@dataclass(frozen=True)
class ShapeBias:
    """names: HUMANS, then the models. samples: over all cue conflicts, then over those of each category; NaN where
    nobody answered with shape or texture. per_human: each person's, over all."""

    names: tuple[str, ...]
    samples: Float64[np.ndarray, "k 17 3 r"]
    per_human: Float64[np.ndarray, " h"]


@dataclass(frozen=True)
class Scores:
    """The measures of one data set. humans: names of the people; total: how many stimuli they saw; groups: people, then
    models."""

    dataset: str
    humans: tuple[str, ...]
    total: int
    groups: tuple[Group, ...]
    shape_bias: ShapeBias | None = None

    @property
    def n(self) -> dict[str, int]:
        """Return subject -> number of stimuli it was shown."""
        return {name: group.n for group in self.groups for name in group.names}

    @property
    def whole(self) -> list[str]:
        """Return the subjects that were shown every stimulus."""
        return [name for name, n in self.n.items() if n == self.total]

    def samples(self, measure: str, subject: str) -> Float64[np.ndarray, "3 r"]:
        """Return the measure of one subject. Raises KeyError for a subject that has none here."""
        group, place = self._place(subject)
        return group.values[measure][place]

    def consistency_with(self, subject: str) -> dict[str, float]:
        """Return the error consistency of a model with each other model that was shown the same stimuli."""
        group, place = self._place(subject)
        return {other: group.with_models[place, j].item() for j, other in enumerate(group.names) if j != place}

    def _place(self, subject: str) -> tuple[Group, int]:
        for group in self.groups:
            if subject in group.names:
                return group, group.names.index(subject)
        raise KeyError(f"{subject} has no scores on {self.dataset}")


def counted_conditions(dataset: str) -> list[int]:
    """Return the conditions that count in the measures, as places in the data set's conditions.

    Raises ValueError when they are not the levels of the distortion of that name.

    >>> counted_conditions("rotation"), counted_conditions("edge")
    ([1, 2, 3], [0])
    """
    conditions = STIMULUS_SETS[dataset].conditions
    if dataset not in PARAMETRIC_SETS:
        return list(range(len(conditions)))
    if (labels := DISTORTIONS[dataset].labels) != conditions:
        raise ValueError(
            f"{dataset}: people's conditions are {', '.join(conditions)}, but the distortion has the levels "
            f"{', '.join(labels)}: both need the same labels in the same order"
        )
    return kept(dataset)


def score_dataset(answers: Answers, resamples: int = 0, rng: np.random.Generator | None = None) -> Scores:
    """Return the measures of one data set. Models that lack the same stimuli are scored together, on those they have.

    Raises ValueError when models answered to no stimulus of a condition that counts.
    """
    rng = rng or np.random.default_rng(0)
    share = _draw(np.zeros(len(answers.humans), int), resamples, rng) / len(answers.humans)
    design = Design(answers.dataset, answers.conditions, _draw(answers.conditions, resamples, rng), share)
    human = (answers.human == answers.categories).astype(float)
    groups = [_score_people(human, design)]
    shown = answers.model != NOT_SHOWN
    for has in np.unique(shown, axis=0):
        members = np.flatnonzero((shown == has).all(axis=1))
        conditions = answers.conditions[has]
        weights = design.weights if has.all() else _draw(conditions, resamples, rng)
        model = (answers.model[members] == answers.categories).astype(float)
        names = tuple(answers.models[i] for i in members)
        part = Design(answers.dataset, conditions, weights, share)
        groups.append(_score_models(names, model[:, has], human[:, has], part))
    shape_bias = _shape_bias(answers, design) if answers.dataset == CUE_CONFLICT else None
    return Scores(answers.dataset, answers.humans, len(answers.images), tuple(groups), shape_bias)


def agreement(
    a: Float64[np.ndarray, "a n"], b: Float64[np.ndarray, "b n"], weights: Float64[np.ndarray, "r n"]
) -> tuple[
    Float64[np.ndarray, "r a"], Float64[np.ndarray, "r b"], Float64[np.ndarray, "r a b"], Float64[np.ndarray, "r a b"]
]:
    """Return the accuracies of a and of b, observed consistency and error consistency.

    a, b: 1 where right, 0 where wrong; weights: how often each stimulus counts.

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


def _score_people(human: Float64[np.ndarray, "h n"], design: Design) -> Group:
    first, second = np.triu_indices(len(human), k=1)
    table = {
        place: {
            measure: cells[:, None, first, second] if cells.ndim == 3 else cells[:, None]
            for measure, cells in of_place.items()
        }
        for place, of_place in _by_condition(human, human, design.conditions, design.weights).items()
    }
    with np.errstate(invalid="ignore"):  # a resample of one person alone has no pair
        pairs = design.share[:, first] * design.share[:, second]
        pairs = pairs / pairs.sum(axis=1, keepdims=True)
    shares = {"ood_accuracy": design.share} | dict.fromkeys(CONSISTENCY, pairs)
    return Group((HUMANS,), human.shape[1], *_means([HUMANS], table, shares, design))


def _score_models(
    names: tuple[str, ...], model: Float64[np.ndarray, "k n"], human: Float64[np.ndarray, "h n"], design: Design
) -> Group:
    table = {
        place: {measure: cells if cells.ndim == 3 else cells[..., None] for measure, cells in of_place.items()}
        for place, of_place in _by_condition(model, human, design.conditions, design.weights).items()
    }
    of_nobody = np.ones((len(design.weights), 1))  # accuracy is the model's alone
    shares = {"ood_accuracy": of_nobody} | dict.fromkeys(CONSISTENCY, design.share)
    values, levels = _means(names, table, shares, design)
    among = _by_condition(model, model, design.conditions, design.weights[:1])
    with_people, with_models = (
        np.mean([cells[place]["error_consistency"][0] for place in design.counted], axis=0) for cells in (table, among)
    )
    return Group(names, model.shape[1], values, levels, with_people, with_models)


def _by_condition(
    a: Float64[np.ndarray, "a n"],
    b: Float64[np.ndarray, "b n"],
    conditions: Int[np.ndarray, " n"],
    weights: Float64[np.ndarray, "r n"],
) -> Table:
    """Return cells (r, a, b) of each condition; (r, a) for ood_accuracy, which depends on a alone."""
    table = {}
    for place in np.unique(conditions).tolist():
        here = conditions == place
        p, q, observed, kappa = agreement(a[:, here], b[:, here], weights[:, here])
        difference = (p[:, :, None] - q[:, None]) ** 2
        table[place] = dict(zip(MEASURES, (p, difference, observed, kappa), strict=True))
    return table


def _means(
    names: Sequence[str], table: Table, shares: Mapping[str, Float64[np.ndarray, "r _"]], design: Design
) -> tuple[dict[str, Samples], dict[str, dict[int, Samples]]]:
    """Return means of cells (r, k, h) over people, over all conditions that count and in each condition.

    shares: measure -> each person's share in each resample; where there are no people, of one who has it all.
    """
    counts, counted = np.bincount(design.conditions), design.counted
    if not counted:
        raise ValueError(f"{design.dataset}: {', '.join(names)} answered no stimulus of a condition that counts")
    values, levels = {}, {}
    for measure, share in shares.items():
        levels[measure] = {place: _over_people(cells[measure], share) for place, cells in table.items()}
        pooled = counts[counted] if measure == "ood_accuracy" else None
        values[measure] = np.average([levels[measure][place] for place in counted], axis=0, weights=pooled)
    return values, levels


def _over_people(cells: Float64[np.ndarray, "r k h"], share: Float64[np.ndarray, "r h"]) -> Samples:
    """Return the mean over people, for the measures in OVER."""
    images = cells.mean(axis=2)
    humans = share @ cells[0].T
    return np.stack([images, humans, np.einsum("rkh,rh->rk", cells, share)]).transpose(2, 0, 1)


def _shape_bias(answers: Answers, design: Design) -> ShapeBias:
    """Return S / (S + T) over the stimuli whose shape and texture differ in category; people are pooled."""
    textures = [re.match("[a-z]+", name.rpartition("-")[2]).group() for name in answers.images]
    truth = {"shape": answers.categories, "texture": np.array([CATEGORIES.index(name) for name in textures])}
    conflict = truth["shape"] != truth["texture"]
    of_category = [answers.categories == i for i in range(len(CATEGORIES))]
    member = np.stack([np.ones_like(conflict), *of_category]) & conflict
    human = {cue: _count(answers.human == category, member, design.weights) for cue, category in truth.items()}
    model = {cue: _count(answers.model == category, member, design.weights) for cue, category in truth.items()}
    pooled = {cue: _over_people(counts.transpose(0, 2, 1), design.share) for cue, counts in human.items()}
    samples = [_fraction(pooled["shape"], pooled["texture"])]
    biases = _fraction(model["shape"], model["texture"])
    samples += [_same_for_people(biases[:, i].T) for i in range(len(answers.models))]
    per_human = _fraction(human["shape"][0, :, 0], human["texture"][0, :, 0])
    return ShapeBias((HUMANS, *answers.models), np.stack(samples), per_human)


def _count(
    hits: Bool[np.ndarray, "s n"], member: Bool[np.ndarray, "c n"], weights: Float64[np.ndarray, "r n"]
) -> Float64[np.ndarray, "r s c"]:
    """Return how often each subject hits, over the members of each class."""
    counted = (hits[:, None] & member).reshape(-1, hits.shape[1]).astype(float)
    return (weights @ counted.T).reshape(len(weights), len(hits), len(member))


def _fraction(part: Float64[np.ndarray, "*s"], other: Float64[np.ndarray, "*s"]) -> Float64[np.ndarray, "*s"]:
    with np.errstate(invalid="ignore"):  # no answer of either kind: not a number
        return part / (part + other)


def _same_for_people(samples: Float64[np.ndarray, "c r"]) -> Float64[np.ndarray, "c 3 r"]:
    """Return samples over images for the measures in OVER, if resampling people makes no difference."""
    return np.stack([samples, np.repeat(samples[:, :1], samples.shape[1], axis=1), samples], axis=1)


def _draw(groups: Num[np.ndarray, " n"], resamples: int, rng: np.random.Generator) -> Float64[np.ndarray, "r n"]:
    """Return how often each is drawn with replacement within its group; once in the first of 1 + resamples."""
    weights = np.ones((1 + resamples, len(groups)))
    rows = np.arange(resamples)[:, None]
    for group in np.unique(groups) if resamples else ():
        here = np.flatnonzero(groups == group)
        drawn = rng.integers(len(here), size=(resamples, len(here))) + rows * len(here)
        weights[1:, here] = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
    return weights


def ranks(values: Float64[np.ndarray, "q k *s"]) -> Float64[np.ndarray, "q k *s"]:
    """Return places along the second axis, from 1 for the smallest; equals share the mean of theirs.

    >>> ranks(np.array([[0.3, 0.1, 0.3]])).tolist()
    [[2.5, 1.0, 2.5]]
    """
    own, others = values[:, :, None], values[:, None]
    return (others < own).sum(axis=2) + ((others == own).sum(axis=2) + 1) / 2
