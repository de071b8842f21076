"""CLIP-Mamba's linear evaluation, which is SLIP's (Mu et al. 2022): a linear layer trained by gradient descent.

    SGD with momentum 0.9, no weight decay, 90 epochs in batches of 128, weights from N(0, 0.01), bias 0
    learning rate 0.1 * batch / 256, falling from epoch to epoch along a half cosine, to be reached at the end

What differs: features are embedded once, without the random crops and flips that the original draws anew in each epoch,
and the layer of the last epoch is tested, where the original keeps the epoch that is best on the test set.

n images · d features · c classes
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import linear, one_hot

from ssmclip.evaluate.probes.probe import PROBES, Answer, Probe, Splits, require_classes, spread

BASE_RATE, PER_IMAGES = 0.1, 256
INITIAL_STD = 0.01


@PROBES.register("linear-sgd")
@dataclass(frozen=True)
class LinearSGD(Probe):
    """A linear layer by SGD on all training images, a validation split among them: nothing is chosen."""

    epochs: int = 90
    batch: int = 128
    momentum: float = 0.9

    @property
    def title(self) -> str:
        return "linear probe"

    def answers(self, splits: Splits, seed: int) -> list[Answer]:
        train = splits.train.joined(splits.validation) if splits.validation else splits.train
        require_classes(train, splits.names)
        present, labels = train.labels.unique(return_inverse=True)
        weight, bias = self.train(train.features, labels, len(present), seed)
        scores = spread(linear(splits.test, weight, bias).double(), present, len(splits.names))
        about = {"epochs": self.epochs, "batch_size": self.batch, "lr": self.rate(0), "augmentation": "none"}
        return [Answer(scores, about | {"n_train": len(train)})]

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, from 0.

        >>> LinearSGD().rate(0), LinearSGD().rate(45), LinearSGD(batch=1024).rate(0)
        (0.05, 0.025, 0.4)
        """
        return BASE_RATE * self.batch / PER_IMAGES * 0.5 * (1 + math.cos(math.pi * epoch / self.epochs))

    def train(
        self, features: Float[Tensor, "n d"], labels: Int[Tensor, " n"], classes: int, seed: int
    ) -> tuple[Float[Tensor, "c d"], Float[Tensor, " c"]]:
        """Return the weight and bias after all epochs. Raises ValueError where they are not finite."""
        generator = torch.Generator().manual_seed(seed)
        weight = INITIAL_STD * torch.randn(classes, features.shape[1], generator=generator)
        bias = torch.zeros(classes)
        moving = torch.zeros_like(weight), torch.zeros_like(bias)
        targets = one_hot(labels.long(), classes).to(features)
        for epoch in range(self.epochs):
            rate = self.rate(epoch)
            for batch in torch.randperm(len(labels), generator=generator).split(self.batch):
                images = features[batch]
                error = (linear(images, weight, bias).softmax(dim=1) - targets[batch]) / len(batch)
                for value, moved, slope in zip((weight, bias), moving, (error.T @ images, error.sum(0)), strict=True):
                    moved.mul_(self.momentum).add_(slope)
                    value.sub_(moved, alpha=rate)
        if not (weight.isfinite().all() and bias.isfinite().all()):
            raise ValueError(
                f"the linear layer diverged at a learning rate of {self.rate(0):g}: the features, of mean length "
                f"{features.norm(dim=1).mean():.3g}, are too large for it; take the protocol own"
            )
        return weight, bias
