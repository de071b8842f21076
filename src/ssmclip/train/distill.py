"""Distillation from a teacher CLIP: its similarities of images and texts are the student's targets, as in open_clip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.loss import DistillClipLoss
from torch import Tensor, nn

from ssmclip.config import LossConfig, TrainConfig
from ssmclip.models.clip import build_tokenizer
from ssmclip.models.names import RANDOM, source
from ssmclip.train.objective import Clip, Network, mean_over_processes, objective

# What tokenizers split differently, and a text long enough to be cut.
_PROBES = ["", "a photo of 3 dogs' noses, café", "Hello-World!", "Mamba! " * 400]


@objective("distill")
class Distill(Clip):
    """CLIP's loss + `distill.weight` * cross-entropy of the student's similarities with the teacher's.

    The teacher is frozen, sees the images and texts that the student sees, and is not saved. Or the data store its
    features, in the order of the batch's images and texts. Both softmaxes are over the texts for an image and over the
    images for a text, each at the logit scale of its model.
    """

    rows = ("image_features", "text_features", "dist_image_features", "dist_text_features")
    analysed_as = "clip"

    def __init__(self, settings: LossConfig | None = None, **place: int):
        super().__init__(settings, **place)
        self.parts: dict[str, Tensor] = {}
        self._teacher: tuple[Teacher, ...] = ()  # within a tuple, so that its parameters are not the objective's

    @classmethod
    def check(cls, config: TrainConfig) -> None:
        stored = getattr(config.data, "stored_teacher", "none") != "none"
        if not (config.loss.distill.teacher or stored):
            raise ValueError(
                "loss.distill.teacher must name a CLIP for loss.kind=distill, as the data store no features of one "
                "(got '')"
            )
        if config.loss.view_weight:
            raise ValueError(f"loss.view_weight must be 0 for loss.kind=distill (got {config.loss.view_weight})")

    def build_loss(self) -> nn.Module:
        if not self.settings.gather_with_grad:
            raise ValueError("loss.gather_with_grad must be true for loss.kind=distill (got false)")
        spread = self.world_size > 1
        return DistillClipLoss(spread, spread, rank=self.rank, world_size=self.world_size)

    def prepare(self, network: Network, device: torch.device) -> None:
        """Load the teacher, if one is named. Raises what `load_teacher` raises."""
        if name := self.settings.distill.teacher:
            self._teacher = (load_teacher(name, network, device),)

    @torch.no_grad()
    def inputs(
        self,
        images: Tensor,
        targets: Tensor,
        teacher_images: Tensor | None = None,
        teacher_texts: Tensor | None = None,
        **more: Tensor,
    ) -> tuple[Tensor, Any]:
        """Return the images, and the texts with the teacher's features of both: the named teacher's, else the stored.

        Raises ValueError where there are neither.
        """
        if self._teacher:
            features = self._teacher[0](images, targets)
        elif teacher_images is None:
            raise ValueError("loss.distill.teacher must name a CLIP, as the data store no features of one (got '')")
        else:
            features = {
                "dist_image_features": F.normalize(teacher_images, dim=-1),
                "dist_text_features": F.normalize(teacher_texts, dim=-1),
                "dist_logit_scale": images.new_tensor(self.settings.distill.teacher_scale),
            }
        return images, {"texts": targets, **features}

    def outputs(self, model: nn.Module, images: Tensor, targets: Any) -> dict[str, Tensor]:
        made, features = model(images, targets["texts"]), {k: v for k, v in targets.items() if k != "texts"}
        # A logit bias is left out: it changes no softmax.
        return {name: made[name] for name in ("image_features", "text_features", "logit_scale")} | features

    def forward(self, **outputs: Tensor) -> Tensor:
        pairs = [(view, caption) for view in range(self.views) for caption in range(self.captions)]
        losses = torch.stack([torch.stack(self.loss(**self._of_pair(outputs, *pair))) for pair in pairs])
        contrastive, distilled = losses.mean(0)
        self.parts = {"loss_clip": contrastive.detach(), "loss_distill": distilled.detach()}
        settings = self.settings.distill
        return settings.contrastive_weight * contrastive + settings.weight * distilled

    def _of_pair(self, outputs: dict[str, Tensor], view: int, caption: int) -> dict[str, Tensor]:
        """Return the arguments of the loss for one view of each image with one of its captions."""
        rows = {"image_features": (view, self.views), "text_features": (caption, self.captions)}
        taken = {}
        for name, value in outputs.items():
            taught = name.startswith("dist_")
            first, step = rows.get(name.removeprefix("dist_"), (0, 1))
            chosen = value[first::step].contiguous() if value.ndim else value
            taken[name] = chosen.detach() if taught else chosen
        return taken

    def numbers(self, model: nn.Module) -> dict[str, Tensor]:
        return {**super().numbers(model), **mean_over_processes(self.parts, self.world_size)}


class Teacher:
    """A frozen CLIP that takes images and tokens made for another: it resizes and normalises the images for itself.

    size: its image size; shift, scale (3, 1, 1): from the student's normalised pixels to its own.
    """

    def __init__(self, network: nn.Module, size: tuple[int, int], shift: Tensor, scale: Tensor):
        self.network, self.size, self.shift, self.scale = network, size, shift, scale

    def __call__(self, images: Tensor, texts: Tensor) -> dict[str, Tensor]:
        """Return the features of images (n, 3, H, W) and tokens (m, L), of unit length, and its logit scale."""
        if tuple(images.shape[-2:]) != self.size:
            images = F.interpolate(images, size=self.size, mode="bicubic", antialias=True)
        return {
            "dist_image_features": self.network.encode_image(images * self.scale + self.shift, normalize=True),
            "dist_text_features": self.network.encode_text(texts, normalize=True),
            "dist_logit_scale": self.network.logit_scale.exp(),
        }


def load_teacher(name: str, network: Network, device: torch.device) -> Teacher:
    """Return a named CLIP as the teacher of a network that is to be trained.

    Raises ValueError for an image encoder, random weights and another tokenizer; what `ssmclip.find` raises.
    """
    known = source(name)
    if known.config is None:
        raise ValueError(f"loss.distill.teacher must be a CLIP (got {name}, an image encoder)")
    if known.origin == RANDOM:
        raise ValueError(f"loss.distill.teacher must have trained weights (got {name}): pass {known.trained}")
    check_tokens(name, network.texts(), build_tokenizer(known.config, known.folder))
    teacher = known.load(None).to(device).eval().requires_grad_(False)
    normalise = known.preprocess(teacher, None).transforms[-1]
    mean, std, own_mean, own_std = (
        torch.tensor(values, device=device).view(3, 1, 1)
        for values in (*network.statistics(), normalise.mean, normalise.std)
    )
    return Teacher(teacher, known.own_size(), (mean - own_mean) / own_std, std / own_std)


def check_tokens(name: str, students: Callable[[list[str]], Tensor], teachers: Callable[[list[str]], Tensor]) -> None:
    """Raise ValueError unless a teacher's tokenizer makes the same tokens of texts as the student's, and as many."""
    tokens, others = students(_PROBES), teachers(_PROBES)
    if tokens.shape != others.shape:
        differs = f"reads {others.shape[1]} tokens of each text, the model {tokens.shape[1]}"
    elif not torch.equal(tokens, others):
        differs = "has another tokenizer"
    else:
        return
    raise ValueError(
        f"loss.distill.teacher must read the same tokens as the model that is trained (got {name}, which {differs}): "
        "choose a teacher with the model's tokenizer and context_length, or train on data that store its features"
    )
