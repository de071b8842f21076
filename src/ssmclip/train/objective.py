"""A registry of training objectives, each a loss of the model's outputs for a batch.

To add one, define a class in the recipe, or in a module that the recipe imports; `loss.kind=distance` selects it:

    @objective("distance")
    class Distance(Objective):
        def forward(self, image_features, text_features, **_):
            return (image_features - text_features).square().sum(1).mean()

Across processes the loss is that of the whole batch: features are gathered with gradient, each process has the rows of
its pairs, and the mean over processes that data-parallel training takes gives the single-process gradient.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from itertools import combinations
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Protocol, runtime_checkable

import torch
from open_clip.loss import ClipLoss, SigLipLoss
from timm.data import Mixup
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from ssmclip.config import AugmentConfig, LossConfig, TrainConfig
from ssmclip.registry import Registry
from ssmclip.train.checkpoint import config_of_run


@runtime_checkable
class Network(Protocol):
    """What an objective may ask about the model that is trained: see `ssmclip.train.blueprint.Blueprint`."""

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]: ...
    def texts(self) -> Callable[[list[str]], Tensor]: ...


class Objective(nn.Module):
    """A loss, built for one process of a run. A subclass defines `forward`, and overrides anything else that differs.

    Learnt parameters belong to the model, where the objective names those it needs in `start`, such as SigLIP's logit
    bias; or to `heads`, which are trained with the model and kept for resuming, but are no part of the result. The
    objective itself has none.

    name: its name for `loss.kind`. start: entries of the model's configuration (open_clip's `model_cfg`) that training
    starts with unless `model.changes` has others. rows: the outputs that have a row for each image or each text, of
    which a micro-batch has fewer; all others, such as the logit scale, belong to the model. contrastive: whether pairs
    of a batch are each other's negatives, so that one pair twice is a wrong one. separable: whether the loss of a
    batch is the mean over its images, so that gradients of micro-batches add up to its gradient. labelled: whether
    the targets are the labels of classes, and the model an image classifier. analysed_as: the name of the objective
    whose loss a trained model is analysed with, where its own needs more than the model; "" for its own. window:
    whether the last view of each image is a window around those of its texts, whose places in it `inputs` gets as
    `boxes`.
    """

    name: ClassVar[str]
    start: ClassVar[Mapping[str, Any]] = MappingProxyType({})
    rows: ClassVar[tuple[str, ...]] = ("image_features", "text_features")
    contrastive: ClassVar[bool] = False
    separable: ClassVar[bool] = False
    labelled: ClassVar[bool] = False
    analysed_as: ClassVar[str] = ""
    window: ClassVar[bool] = False

    def __init__(
        self,
        settings: LossConfig | None = None,
        *,
        rank: int = 0,
        world_size: int = 1,
        views: int = 1,
        captions: int = 1,
        num_classes: int = 0,
    ):
        """Build the loss of process `rank` of `world_size`, for `views` and `captions` of every image in a row.

        num_classes: of a classifier, 0 where it is not known.
        """
        super().__init__()
        self.settings = settings or LossConfig()
        self.rank, self.world_size, self.views, self.captions = rank, world_size, views, captions
        self.num_classes = num_classes

    @property
    def shown(self) -> int:
        """Return how many views of each image a batch has, further ones included."""
        return self.views + len(self.further_views(self.settings)) + self.window

    @classmethod
    def further_views(cls, settings: LossConfig) -> tuple[AugmentConfig, ...]:
        """Return how each view of an image is augmented that comes after those of its texts. Here: there are none."""
        return ()

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        """Raise ValueError for settings of a run that this objective cannot do with, before any work. Here: none."""

    def prepare(self, network: Network, device: torch.device) -> None:
        """Load what the loss needs besides the model that is trained, such as a teacher. Here: nothing."""

    def heads(self, model: nn.Module) -> nn.Module | None:
        """Return new networks that are trained with the model, None for none: here, None.

        With them, `outputs` gets a `ssmclip.train.trainee.Trainee`. Raises ValueError for an unfit model.
        """
        return None

    def follow(self, average: nn.Module | None) -> None:
        """Take the moving average, if there is one, of what is trained, heads included. Here: do nothing."""

    def inputs(self, images: Tensor, targets: Tensor, **more: Tensor) -> tuple[Tensor, Any]:
        """Return what a (micro-)batch is trained on, such as a mixture of its images: here, unchanged.

        It is called once for each, and for all that takes no gradient; `outputs` gets what it returns. more: what else
        the batch has, by name, as `ssmclip.train.gradient.more_of` gives it.
        """
        return images, targets

    def outputs(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        """Return the arguments of the loss by name: here, a CLIP's outputs for images and texts.

        images (batch * shown, 3, height, width); targets: int64 token ids (batch * captions, context), or labels.
        """
        return model(images, targets)

    def forward(self, **outputs: Tensor) -> Tensor:
        """Return the loss, a scalar, of this process's outputs."""
        raise NotImplementedError  # each objective has its own

    def of_batch(self, model: nn.Module, images: Tensor, targets: Any) -> Tensor:
        """Return the loss of a batch, which training and the Hessian analysis differentiate."""
        return self(**self.outputs(model, images, targets))

    def constrain(self, model: nn.Module) -> None:
        """Restrict the model's parameters to the range the objective allows, after each step. Here: do nothing."""

    def numbers(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the model's scalars to log together with the loss, by name. Here: none."""
        return {}


OBJECTIVES: Registry[type[Objective]] = Registry(
    "objective", ["ssmclip.train.distill", "ssmclip.train.self_supervised.slip", "ssmclip.train.self_supervised.a_clip"]
)


def objective(name: str) -> Callable[[type[Objective]], type[Objective]]:
    """Return a decorator that registers an objective under `name`. Raises ValueError when the name is taken."""

    def add(cls: type[Objective]) -> type[Objective]:
        cls.name = name
        return OBJECTIVES.register(name)(cls)

    return add


class Contrastive(Objective):
    """The mean loss over every view of the images with every one of their captions, each embedded once.

    The model has a `logit_scale`, the logarithm of the factor that similarities are multiplied by. With `view_weight`,
    the mean loss between two views is added, as in SLIP (Mu et al. 2021, arXiv:2112.12750), here in the space the
    texts share and with their logit scale.
    """

    contrastive = True

    def __init__(self, settings: LossConfig | None = None, **place: int):
        super().__init__(settings, **place)
        self.loss = self.build_loss()

    def build_loss(self) -> nn.Module:
        """Return open_clip's loss of as many images as texts, for this process."""
        raise NotImplementedError  # each objective has its own

    def forward(self, image_features: Tensor, text_features: Tensor, *scale: Tensor, **named: Tensor) -> Tensor:
        # Contiguous: the sigmoid loss sends them to other processes.
        views = [image_features[i :: self.views].contiguous() for i in range(self.views)]
        captions = [text_features[i :: self.captions].contiguous() for i in range(self.captions)]
        value = torch.stack([self.loss(v, c, *scale, **named) for v in views for c in captions]).mean()
        if self.settings.view_weight:
            between = torch.stack([self.loss(v, w, *scale, **named) for v, w in combinations(views, 2)]).mean()
            value = value + self.settings.view_weight * between
        return value

    def constrain(self, model: nn.Module) -> None:
        clamp_logit_scale(model, self.settings.max_logit_scale)

    def numbers(self, model: nn.Module) -> dict[str, Tensor]:
        return {"logit_scale": model.logit_scale.detach().exp()}


@objective("clip")
class Clip(Contrastive):
    """Softmax over the batch: texts for an image, images for a text (Radford et al. 2021, arXiv:2103.00020)."""

    def build_loss(self) -> nn.Module:
        spread, whole = self.world_size > 1, self.settings.gather_with_grad
        kind = ClipLoss if spread or whole else _GatheredWithoutGradient
        return kind(local_loss=spread, gather_with_grad=spread and whole, rank=self.rank, world_size=self.world_size)


class _GatheredWithoutGradient(ClipLoss):
    """The loss in one process whose gradient is that of several which gather each other's features without gradient.

    Their own features are constants among those they gather, so that every process but one alone has the gradient of
    images that look for texts at the images, and of texts that look for images at the texts: the same for any number.
    """

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        bias = 0 if logit_bias is None else logit_bias
        per_image = logit_scale * image_features @ text_features.detach().T + bias
        return per_image, logit_scale * text_features @ image_features.detach().T + bias


@objective("siglip")
class SigLip(Contrastive):
    """A sigmoid for every pair of an image and a text (Zhai et al. 2023, arXiv:2303.15343)."""

    # The paper's section 4.2: every pair of the batch but one is a negative, so the loss starts with a low logit.
    start = MappingProxyType({"init_logit_scale": 2.302585092994046, "init_logit_bias": -10.0})

    def build_loss(self) -> nn.Module:
        if not self.settings.gather_with_grad:
            raise ValueError("loss.gather_with_grad must be true for loss.kind=siglip (got false)")
        return SigLipLoss(rank=self.rank, world_size=self.world_size)


def clamp_logit_scale(model: nn.Module, largest: float) -> None:
    """Keep exp(logit_scale) in [1, largest]."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(largest))


def mean_over_processes(numbers: Mapping[str, Tensor], world_size: int) -> dict[str, Tensor]:
    """Return the mean of each scalar over all processes, which have to call this together."""
    means = dict(numbers)
    for name in means if world_size > 1 else ():
        means[name] = means[name].clone()
        torch.distributed.all_reduce(means[name])
        means[name] /= world_size
    return means


def objective_of(model: nn.Module, folder: str | Path | None = None) -> Objective:
    """Return the objective a model was trained with, for one process and one view and caption of each image.

    folder: the model's folder. The config.json of a run, or of a checkpoint's run, names its objective; without
    one, the objective is SigLIP's for a model with a logit bias, and CLIP's for any other. Of an objective that needs
    more than the model, such as a teacher, it is the part that does not.
    Raises UnknownName for a run whose objective is not registered in this process: import its module first.
    """
    config = config_of_run(folder) if folder is not None else None
    usual = "clip" if getattr(model, "logit_bias", None) is None else "siglip"
    kind = OBJECTIVES[config.loss.kind if config else usual]
    return OBJECTIVES[kind.analysed_as or kind.name]()


def contrastive_loss(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """Return CLIP's loss of these pairs, or SigLIP's where the model has a logit bias (see `objective_of`)."""
    return objective_of(model).of_batch(model, images, texts)


@objective("classification")
class Classification(Objective):
    """The cross-entropy of an image classifier's logits: a softmax, or with `binary` a sigmoid for each class.

    Images and labels are mixed in pairs (mixup, Zhang et al. 2018, arXiv:1710.09412; CutMix, Yun et al. 2019,
    arXiv:1905.04899), and labels smoothed, as timm does.
    """

    rows = ("logits", "targets")
    separable = True
    labelled = True

    def __init__(self, settings: LossConfig | None = None, **place: int):
        super().__init__(settings, **place)
        mix = self.settings.mix
        self.mixup = (
            Mixup(
                mixup_alpha=mix.mixup,
                cutmix_alpha=mix.cutmix,
                prob=mix.prob,
                switch_prob=mix.switch_prob,
                mode=mix.mode,
                label_smoothing=self.settings.label_smoothing,
                num_classes=self.num_classes,
            )
            if mix.on
            else None
        )
        self.soft = SoftTargetCrossEntropy()
        self.hard = LabelSmoothingCrossEntropy(self.settings.label_smoothing)
        self.binary = BinaryCrossEntropy(smoothing=self.settings.label_smoothing)

    def inputs(self, images: Tensor, targets: Tensor, **more: Tensor) -> tuple[Tensor, Tensor]:
        """Return the images and the labels, or mixtures of both: (B, classes) shares."""
        return self.mixup(images.clone(), targets) if self.mixup else (images, targets)

    def outputs(self, model: nn.Module, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"logits": model(images), "targets": targets}

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        logits = logits.float()
        if self.settings.binary:
            return self.binary(logits, targets)
        return self.soft(logits, targets) if targets.is_floating_point() else self.hard(logits, targets)


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of an image classifier, such as `timm.create_model(..., num_classes=10)`."""
    return nn.functional.cross_entropy(model(images), labels)
