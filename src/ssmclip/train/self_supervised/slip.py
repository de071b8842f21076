"""SLIP: CLIP's loss of a view and its text, and SimCLR's of two other views (Mu et al. 2021, arXiv:2112.12750)."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from ssmclip.config import AugmentConfig, LossConfig, changed
from ssmclip.models.features import feature_width, image_features
from ssmclip.train.objective import Clip, mean_over_processes, objective
from ssmclip.train.self_supervised.heads import mlp
from ssmclip.train.self_supervised.losses import nt_xent
from ssmclip.train.trainee import Trainee

# As in the published code: SimCLR's, with weaker colours.
SSL_AUGMENT = AugmentConfig(
    scale=(0.08, 1.0),
    flip=True,
    color_jitter=(0.4, 0.4, 0.4, 0.1),
    color_jitter_prob=0.8,
    gray_scale_prob=0.2,
    gaussian_blur_prob=0.5,
    interpolation="bilinear",
    color_order="random",
)


@objective("slip")
class Slip(Clip):
    """CLIP's loss + `ssl.weight` * NT-Xent of a head's outputs for two further views, with SLIP's augmentation.

    The head takes the image features before CLIP's projection. The views of the text have `data.augment`. The published
    code gathers CLIP's features without gradient (`loss.gather_with_grad=false`), and those of NT-Xent with it.
    """

    rows = ("image_features", "text_features", "one", "other")
    analysed_as = "clip"

    def __init__(self, settings: LossConfig | None = None, **place: int):
        super().__init__(settings, **place)
        self.parts: dict[str, Tensor] = {}

    @classmethod
    def further_views(cls, settings: LossConfig) -> tuple[AugmentConfig, ...]:
        augment = changed(SSL_AUGMENT, settings.ssl.augment, "loss.ssl.augment")
        if augment.library != "own":
            raise ValueError(f"loss.ssl.augment.library must be own (got {augment.library})")
        return augment, augment

    def heads(self, model: nn.Module) -> nn.Module:
        """Return SimCLR's head: D - width - width - features, with batch norm."""
        ssl = self.settings.ssl
        widths = [feature_width(model), ssl.head_width, ssl.head_width, ssl.head_features]
        return mlp(widths, world_size=self.world_size)

    def inputs(self, images: Tensor, targets: Tensor, **more: Tensor) -> tuple[Tensor, Any]:
        """Return the views of the texts, and the texts with the two further views of each image."""
        views = images.unflatten(0, (-1, self.shown))
        further = {"one": views[:, -2], "other": views[:, -1]}
        return views[:, : self.views].flatten(0, 1), {"texts": targets, **further}

    def outputs(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        return model(_embed, images, targets)

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, one: Tensor, other: Tensor
    ) -> Tensor:
        clip = super().forward(image_features, text_features, logit_scale)
        ssl = nt_xent(one, other, self.settings.ssl.temperature, self.rank, self.world_size)
        self.parts = {"loss_clip": clip.detach(), "loss_ssl": ssl.detach()}
        return clip + self.settings.ssl.weight * ssl

    def numbers(self, model: nn.Module) -> dict[str, Tensor]:
        return {**super().numbers(model), **mean_over_processes(self.parts, self.world_size)}


def _embed(trainee: Trainee, images: Tensor, targets: Any) -> dict[str, Tensor]:
    model = trainee.model
    _, embedded = image_features(model, images)
    one, other = (trainee.heads(image_features(model, targets[name])[0]) for name in ("one", "other"))
    return {
        "image_features": F.normalize(embedded, dim=-1),
        "text_features": model.encode_text(targets["texts"], normalize=True),
        "logit_scale": model.logit_scale.exp(),
        "one": one,
        "other": other,
    }
