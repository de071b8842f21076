"""A linear probe on a few images of each class, drawn several times.

The penalty is chosen on as many images of each class, but at most 4, as CoOp's repetition of CLIP's few-shot probe does
(Zhou et al. 2022): of the validation split or, where there is none, of the training images that were not drawn.
"""

from __future__ import annotations

from dataclasses import dataclass

from ssmclip.evaluate.probes.draws import draw_shots, draw_up_to
from ssmclip.evaluate.probes.linear import about_sweep, fit_and_score, sweep
from ssmclip.evaluate.probes.probe import PROBES, Answer, Labelled, Probe, Splits, require_classes

MOST = 4  # validation images of a class
USUAL_C = 1.0  # scikit-learn's, where no image is left to choose by


@PROBES.register("fewshot")
@dataclass(frozen=True)
class FewShot(Probe):
    """Logistic regression on `shots` images of each class, for each of `draws` random draws.

    Raises ValueError for numbers below 1.
    """

    shots: int
    draws: int = 3

    number = "shots"

    def __post_init__(self):
        for name in ("shots", "draws"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1 (got {getattr(self, name)})")

    @property
    def title(self) -> str:
        return f"linear probe on {self.shots} image{'s' if self.shots > 1 else ''} a class"

    def answers(self, splits: Splits, seed: int) -> list[Answer]:
        require_classes(splits.train, splits.names)
        return [self._answer(splits, seed + draw) for draw in range(self.draws)]

    def _answer(self, splits: Splits, seed: int) -> Answer:
        drawn, rest = draw_shots(splits.train.labels, self.shots, splits.tested, splits.names, seed)
        train = splits.train.at(drawn)
        pool = splits.train.at(rest) if splits.validation is None else splits.validation
        validation = pool.at(draw_up_to(pool.labels, min(self.shots, MOST), seed))
        C, about = _chosen(train, validation)
        scores, _ = fit_and_score(train, C, splits.test, len(splits.names))
        return Answer(scores, about | {"n_train": len(train), "n_validation": len(validation)}, seed)


def _chosen(train: Labelled, validation: Labelled) -> tuple[float, dict]:
    if not len(validation):
        return USUAL_C, {"C": USUAL_C, "chosen_on": "nothing: all images are trained on"}
    found = sweep(train, validation)
    return found.C, about_sweep(found)
