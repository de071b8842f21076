"""DINO's k-nearest-neighbour classifier (Caron et al. 2021, section 4.1, after Wu et al. 2018).

n test images · m training images · d features · c classes · k neighbours
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ssmclip.evaluate.probes.probe import PROBES, Answer, Probe, Splits, require_classes

BLOCK = 2**24  # similarities held at a time


@PROBES.register("knn")
@dataclass(frozen=True)
class Neighbours(Probe):
    """The k training images of highest cosine similarity vote for their classes, with weights exp(cosine/temperature).

    Nothing is chosen, so a validation split counts as training images. Raises ValueError for k or a temperature below
    their ranges.
    """

    k: int = 20
    temperature: float = 0.07

    number = "k"

    def __post_init__(self):
        if self.k < 1:
            raise ValueError(f"k must be at least 1 (got {self.k})")
        if not self.temperature > 0:
            raise ValueError(f"the temperature must be above 0 (got {self.temperature})")

    @property
    def title(self) -> str:
        return "nearest neighbour" if self.k == 1 else f"{self.k} nearest neighbours"

    def answers(self, splits: Splits, seed: int) -> list[Answer]:
        train = splits.train.joined(splits.validation) if splits.validation else splits.train
        require_classes(train, splits.names)
        if len(train) < self.k:
            raise ValueError(
                f"{self.k} neighbours need as many training images (got {len(train)}): take knn-{len(train)}, or a "
                "larger training split"
            )
        scores = votes(splits.test, train.features, train.labels, len(splits.names), self.k, self.temperature)
        return [Answer(scores, {"k": self.k, "temperature": self.temperature, "n_train": len(train)})]


def votes(
    test: Float[Tensor, "n d"],
    train: Float[Tensor, "m d"],
    labels: Int[Tensor, " m"],
    classes: int,
    k: int = 20,
    temperature: float = 0.07,
) -> Float[Tensor, "n c"]:
    """Return the classes' votes for each test image: the sum of exp(cosine/temperature) over its k nearest images."""
    test, train = normalize(test, dim=1), normalize(train, dim=1)
    of_class = one_hot(labels.long(), classes).double()
    counted = []
    for block in test.split(max(1, BLOCK // len(train))):
        nearest = (block @ train.T).topk(k, dim=1)
        weights = (nearest.values.double() / temperature).exp()
        counted.append(torch.einsum("nk,nkc->nc", weights, of_class[nearest.indices]))
    return torch.cat(counted)
