"""CLIP's linear probe (Radford et al. 2021, A.3): logistic regression whose penalty is chosen on a validation split.

n images · d features · c classes
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmclip.evaluate.probes.draws import HELD_OUT, hold_out
from ssmclip.evaluate.probes.logistic import TOLERANCE, Regression
from ssmclip.evaluate.probes.probe import PROBES, Answer, Labelled, Probe, Splits, require_classes, spread

LOW, HIGH, PER_DECADE = -6, 6, 8  # C from 1e-6 to 1e6, of which 96 steps
PLACES = (HIGH - LOW) * PER_DECADE + 1
FIRST_STEP = 2 * PER_DECADE  # the search begins with every second decade
SWEEP_TOLERANCE = 1e-4  # scikit-learn's; a fit that only tells which C is best need not be closer


class Sweep(NamedTuple):
    """The best C, and the accuracy on the validation images for each C that was tried."""

    C: float
    tried: dict[float, float]


@PROBES.register("linear")
@dataclass(frozen=True)
class Linear(Probe):
    """Multinomial logistic regression with an L2 penalty, by L-BFGS to the optimum (`logistic`).

    The penalty is the best on the data set's validation split or, where there is none, on a fifth of the training
    split; then it is fitted to both together, and tested once.
    """

    @property
    def title(self) -> str:
        return "linear probe"

    def answers(self, splits: Splits, seed: int) -> list[Answer]:
        require_classes(splits.train, splits.names)
        train, validation = splits.train, splits.validation
        chosen_on = "the validation split"
        if validation is None:
            kept, held = hold_out(train.labels, seed)
            train, validation = train.at(kept), train.at(held)
            chosen_on = f"{100 * HELD_OUT:.0f} % of the training split"
        if not len(validation):
            raise ValueError(
                f"no image is left to choose the penalty on: {len(train)} training images, one of each class. Give "
                "more training images, or take knn"
            )
        found = sweep(train, validation)
        scores, converged = fit_and_score(train.joined(validation), found.C, splits.test, len(splits.names))
        about = about_sweep(found) | {"chosen_on": chosen_on, "n_train": len(train), "n_validation": len(validation)}
        return [Answer(scores, about | ({} if converged else {"converged": False}))]


def sweep(train: Labelled, validation: Labelled) -> Sweep:
    """Return the C whose fit has the highest accuracy on the validation images; of equals, the strongest penalty."""
    regression, present = begin(train)
    features, labels = validation.features.numpy(), validation.labels.numpy()

    def accuracy(C: float) -> float:
        scores = regression.fit(C, SWEEP_TOLERANCE).scores(features)
        return float((present[scores.argmax(axis=1)] == labels).mean())

    return search(accuracy)


def search(accuracy: Callable[[float], float]) -> Sweep:
    """Return the best C by CLIP's search: every second decade, then four times twice as finely around the best.

    15 values are tried of 97. Of equally good ones, the strongest penalty is the best.
    """
    tried = {place: accuracy(strength(place)) for place in range(0, PLACES, FIRST_STEP)}
    step = FIRST_STEP
    while step > 1:
        step //= 2
        best = _peak(tried)
        near = (place for place in (best - step, best + step) if 0 <= place < PLACES and place not in tried)
        tried |= {place: accuracy(strength(place)) for place in near}
    return Sweep(strength(_peak(tried)), {strength(place): tried[place] for place in sorted(tried)})


def _peak(tried: dict[int, float]) -> int:
    return max(sorted(tried), key=tried.__getitem__)


def strength(place: int) -> float:
    """Return the C at a place of the grid.

    >>> strength(0), strength(48), strength(96)
    (1e-06, 1.0, 1000000.0)
    """
    return float(10 ** (LOW + place / PER_DECADE))


def about_sweep(found: Sweep) -> dict:
    """Return what rows keep of a search."""
    edges = (strength(0), strength(PLACES - 1))
    at_edge = {"at_edge": True} if found.C in edges else {}
    return {"C": found.C, "sweep": [[C, accuracy] for C, accuracy in found.tried.items()]} | at_edge


def fit_and_score(
    train: Labelled, C: float, test: Float[Tensor, "n d"], classes: int
) -> tuple[Float[Tensor, "n c"], bool]:
    """Return the scores of test images by a regression on training images, and whether it converged."""
    regression, present = begin(train)
    fitted = regression.fit(C, TOLERANCE)
    scores = torch.from_numpy(fitted.scores(test.numpy()))
    return spread(scores, torch.from_numpy(present), classes), fitted.converged


def begin(train: Labelled) -> tuple[Regression, Int[np.ndarray, " k"]]:
    """Return regressions on training images, and the classes that occur among them."""
    present, places = np.unique(train.labels.numpy(), return_inverse=True)
    return Regression(train.features.numpy(), places, len(present)), present
