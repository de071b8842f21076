"""A-CLIP: views that lose what matters least to the averaged model (Yang et al. 2023, arXiv:2212.08653).

One step, as the paper has it: a teacher, the moving average of the model, looks at a window around the views of an
image. Of each view half of the blocks are kept, those that the teacher attends to most. The model sees the views
without the rest, and learns from CLIP's loss of each with the text, NT-Xent between them, and the distance between
what it predicts from each and the teacher's projection of the whole window (BYOL).

What differs from the published code: the window contains the views (there, 71 % of them do not), views are masked
without being asked, NT-Xent compares two views (`ssl.as_published` for one with itself), the average is of all weights
and moves after each step, once, and the patch embedding is not frozen.
"""

from __future__ import annotations

import math
from itertools import combinations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import roi_align

from ssmclip.config import LossConfig, TrainConfig
from ssmclip.models.features import drops_tokens, feature_width, features_and_saliency, image_features, masked_features
from ssmclip.models.towers import image_tower, patch_size
from ssmclip.train.objective import Clip, mean_over_processes, objective
from ssmclip.train.self_supervised.heads import mlp
from ssmclip.train.self_supervised.losses import nt_xent, prediction_distance
from ssmclip.train.trainee import Trainee


@objective("a-clip")
class AClip(Clip):
    """CLIP's loss + `ssl.weight` * NT-Xent between views + `ssl.ema_weight` * distance to the averaged model.

    The views are `data.views_per_image` of `data.augment`, masked as `loss.mask` says: 2 as published. The average is
    that of `ema.decay`, 0.996 with `ema.schedule=cosine` as published. A vision transformer computes only the tokens
    that are kept, and importance is the average's attention. Encoders of maps see the rest in grey, and importance is a
    position's share of the pooled features (`ssmclip.models.features.features_and_saliency`).
    """

    analysed_as = "clip"
    window = True

    def __init__(self, settings: LossConfig | None = None, **place: int):
        super().__init__(settings, **place)
        ssl = self.settings.ssl
        self.rows = ("image_features", "text_features")
        self.rows += ("ssl",) if ssl.weight else ()
        self.rows += ("predictions", "projections") if ssl.ema_weight else ()
        self.parts: dict[str, Tensor] = {}
        self._average: tuple[Trainee, ...] = ()  # within a tuple, so that its parameters are not the objective's

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        ssl, mask, views = config.loss.ssl, config.loss.mask, config.data.views_per_image
        masked = mask.choice != "all"
        refused = {
            "ema.decay must be set for loss.kind=a-clip, whose teacher is the moving average (got none): such as 0.996 "
            "with ema.schedule=cosine": config.ema.decay is None,
            f"data.views_per_image must be at least 2 for loss.kind=a-clip (got {views}), or loss.ssl.weight 0": (
                ssl.weight and views < 2 and not ssl.as_published
            ),
            f"loss.ssl.augment must be {{}} for loss.kind=a-clip (got {ssl.augment}): set data.augment": ssl.augment,
            "model.patch_drop_rate must be none for loss.kind=a-clip "
            f"(got {config.model.patch_drop_rate}): set loss.mask.keep_rate": masked and config.model.patch_drop_rate,
            "model.compile must be false for loss.kind=a-clip (got true)": config.model.compile,
        }
        for reason, applies in refused.items():
            if applies:
                raise ValueError(reason)
        sides = {side for size in config.data.sizes() for side in (size if isinstance(size, tuple) else (size,))}
        if masked and (cut := sorted(side for side in sides if side % mask.block)):
            raise ValueError(f"loss.mask.block must divide images of {cut[0]} pixels (got {mask.block})")

    def heads(self, model: nn.Module) -> nn.Module:
        """Return SimCLR's head, and BYOL's projector and predictor, those whose losses have a weight."""
        ssl, mask, made = self.settings.ssl, self.settings.mask, nn.ModuleDict()
        width, features, shared = ssl.head_width, ssl.head_features, {"world_size": self.world_size}
        if mask.choice != "all" and drops_tokens(tower := image_tower(model)):
            patch = patch_size(tower)
            if any(mask.block % side for side in patch):
                raise ValueError(f"loss.mask.block must be a multiple of patches of {patch[0]} (got {mask.block})")
        if ssl.weight:
            made["ssl"] = mlp([feature_width(model), width, width, features], **shared)
        if ssl.ema_weight:
            made["projector"] = mlp([feature_width(model), width, features], bias=False, **shared)
            made["predictor"] = mlp([features, width, features], bias=False, **shared)
        return made

    def follow(self, average: nn.Module | None) -> None:
        self._average = (average,)

    @torch.no_grad()
    def inputs(self, images: Tensor, targets: Tensor, *, boxes: Tensor, **more: Tensor) -> tuple[Tensor, Any]:
        """Return the views, and the texts with the blocks to keep of each and what the average makes of the windows.

        boxes (B * views, 5): where the views are in their windows, see `ssmclip.data.pairs.stream.Batch`.
        """
        by_image, (average,) = images.unflatten(0, (-1, self.shown)), self._average
        views, windows = by_image[:, :-1].flatten(0, 1), by_image[:, -1]
        if self.settings.mask.choice in ("attentive", "inverse"):
            features, saliency = features_and_saliency(average.model, windows)
        else:
            (features, _), saliency = image_features(average.model, windows), None
        projections = average.heads["projector"](features) if self.settings.ssl.ema_weight else None
        keep = self._kept(views.shape[-2:], boxes, saliency)
        return views, {"texts": targets, "keep": keep, "projections": projections}

    def _kept(self, size: tuple[int, int], boxes: Tensor, saliency: Tensor | None) -> Tensor | None:
        """Return the blocks to keep of each view, bool (B * views, rows, columns); None: all."""
        mask = self.settings.mask
        if mask.choice == "all":
            return None
        rows, columns = size[0] // mask.block, size[1] // mask.block
        if saliency is None:
            scores = torch.rand(len(boxes), rows, columns, device=boxes.device)
        else:
            scores = block_scores(saliency, boxes, rows, columns)
        return best(-scores if mask.choice == "inverse" else scores, mask.keep_rate)

    def outputs(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        return model(_embed, images, targets)

    def forward(
        self,
        image_features: Tensor,
        text_features: Tensor,
        logit_scale: Tensor,
        ssl: Tensor | None = None,
        predictions: Tensor | None = None,
        projections: Tensor | None = None,
    ) -> Tensor:
        settings, clip = self.settings.ssl, super().forward(image_features, text_features, logit_scale)
        weighted = {"loss_clip": (1.0, clip)}
        if ssl is not None:
            weighted["loss_ssl"] = settings.weight, self._between([ssl[i :: self.views] for i in range(self.views)])
        if predictions is not None:
            aims = projections.repeat_interleave(self.views, 0)
            weighted["loss_ema"] = settings.ema_weight, prediction_distance(predictions, aims)
        self.parts = {name: value.detach() for name, (_, value) in weighted.items()}
        return torch.stack([weight * value for weight, value in weighted.values()]).sum()

    def _between(self, views: list[Tensor]) -> Tensor:
        """Return the mean NT-Xent over all pairs of views, each (B, features)."""
        pairs = [(views[0], views[0])] if self.settings.ssl.as_published else list(combinations(views, 2))
        where = self.settings.ssl.temperature, self.rank, self.world_size
        return torch.stack([nt_xent(one, other, *where) for one, other in pairs]).mean()

    def numbers(self, model: nn.Module) -> dict[str, Tensor]:
        return {**super().numbers(model), **mean_over_processes(self.parts, self.world_size)}


def _embed(trainee: Trainee, images: Tensor, targets: Any) -> dict[str, Tensor]:
    model, heads = trainee.model, trainee.heads
    features, embedded = masked_features(model, images, targets["keep"])
    made = {
        "image_features": F.normalize(embedded, dim=-1),
        "text_features": model.encode_text(targets["texts"], normalize=True),
        "logit_scale": model.logit_scale.exp(),
    }
    if "ssl" in heads:
        made["ssl"] = heads["ssl"](features)
    if "predictor" in heads:
        made["predictions"] = heads["predictor"](heads["projector"](features))
        made["projections"] = targets["projections"]
    return made


def block_scores(saliency: Tensor, boxes: Tensor, rows: int, columns: int) -> Tensor:
    """Return the mean saliency within each block of each view, (B * views, rows, columns).

    saliency (B, h, w): of the windows; boxes (B * views, 5): left, top, right, bottom of the views in their windows, as
    shares of the windows' sides, and 1 for a mirrored view. Each block's is the mean of four points within it,
    interpolated.
    """
    count, (height, width) = len(boxes) // len(saliency), saliency.shape[1:]
    image = torch.arange(len(saliency), device=boxes.device).repeat_interleave(count)
    corners = boxes[:, :4] * boxes.new_tensor([width, height, width, height])
    regions = torch.cat([image[:, None].to(corners.dtype), corners], 1).to(saliency.dtype)
    fine = roi_align(saliency[:, None], regions, (2 * rows, 2 * columns), sampling_ratio=1, aligned=True)
    scores = F.avg_pool2d(fine, 2)[:, 0]
    return torch.where(boxes[:, 4, None, None] > 0, scores.flip(-1), scores)


def best(scores: Tensor, share: float) -> Tensor:
    """Return which of (B, rows, columns) are among the highest `share` of their image, rounded up."""
    flat = scores.flatten(1)
    count = math.ceil(round(share * flat.shape[1], 6))
    kept = torch.zeros_like(flat, dtype=torch.bool)
    return kept.scatter_(1, flat.topk(count, dim=1).indices, True).reshape(scores.shape)
