"""The contrastive loss of a batch and its gradient, whole or through cached features.

Across processes the loss is that of the whole batch: features are gathered with gradient, each process has the rows of
its own pairs, and the mean over processes that data-parallel training takes gives the single-process gradient.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from itertools import combinations

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from ssmclip.train.state import device_rng, set_device_rng

FEATURES = ("image_features", "text_features")


def build_loss(
    kind: str, rank: int = 0, world_size: int = 1, *, views: int = 1, captions: int = 1, view_weight: float = 0.0
) -> Objective:
    """open_clip's loss, called with what the model's forward returns (features of this process); gives a scalar.

    views, captions: of every image, one after the other in the features; see `Objective`.
    """
    if kind == "siglip":
        loss = SigLipLoss(rank=rank, world_size=world_size)
    else:
        spread = world_size > 1
        loss = ClipLoss(local_loss=spread, gather_with_grad=spread, rank=rank, world_size=world_size)
    return Objective(loss, views, captions, view_weight)


class Objective(nn.Module):
    """The mean loss over every view of the images with every one of their captions, each embedded once.

    With view_weight, the mean loss between two views is added, as SLIP does (Mu et al. 2021, arXiv:2112.12750), here in
    the space the texts share and at their logit scale.
    """

    def __init__(self, loss: nn.Module, views: int, captions: int, view_weight: float):
        super().__init__()
        self.loss, self.views, self.captions, self.view_weight = loss, views, captions, view_weight

    def forward(self, image_features: Tensor, text_features: Tensor, *scale: Tensor, **named: Tensor) -> Tensor:
        # Contiguous: the sigmoid loss sends them to other processes.
        views = [image_features[i :: self.views].contiguous() for i in range(self.views)]
        captions = [text_features[i :: self.captions].contiguous() for i in range(self.captions)]
        value = torch.stack([self.loss(v, c, *scale, **named) for v in views for c in captions]).mean()
        if self.view_weight:
            between = torch.stack([self.loss(v, w, *scale, **named) for v, w in combinations(views, 2)]).mean()
            value = value + self.view_weight * between
        return value


def backward(
    accelerator: Accelerator, model: nn.Module, loss: Objective, images: Tensor, texts: Tensor, micro_batch: int | None
) -> Tensor:
    """Add the gradient of the loss to every parameter's `.grad`; return the loss, detached, on the device.

    images (batch * views, 3, height, width); texts int64 (batch * captions, context). With a micro_batch smaller than
    the batch, features are cached (see `_backward_cached`) and memory is that of a micro-batch.
    """
    if micro_batch is None or micro_batch * loss.views >= len(images):
        value = loss(**model(images, texts))
        accelerator.backward(value)
        return value.detach()
    return _backward_cached(accelerator, model, loss, images, texts, micro_batch)


def _backward_cached(
    accelerator: Accelerator, model: nn.Module, loss: Objective, images: Tensor, texts: Tensor, micro_batch: int
) -> Tensor:
    """GradCache (Gao et al. 2021, arXiv:2101.06983): the large batch's gradient from micro-batches, to rounding.

    Embed every micro-batch without a graph; take the loss of the whole batch and its gradient at the features; embed
    again with a graph, random state put back so that drop-path repeats, and send the features' gradient through.
    One more forward pass is the price. Batch norm, if a model has it, sees micro-batches (twice).
    """
    sizes = {"image_features": micro_batch * loss.views, "text_features": micro_batch * loss.captions}
    chunks = list(zip(images.split(sizes["image_features"]), texts.split(sizes["text_features"]), strict=True))
    random, embedded = [], []
    with torch.no_grad():
        for image, text in chunks:
            random.append(device_rng(images.device))
            embedded.append(model(image, text))

    leaves = {name: torch.cat([e[name] for e in embedded]) for name in FEATURES}
    leaves |= {name: value for name, value in embedded[0].items() if name not in FEATURES}  # logit scale and bias
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    value = loss(**leaves)
    (value if accelerator.scaler is None else accelerator.scaler.scale(value)).backward()

    gradients = zip(*(leaves[name].grad.split(sizes[name]) for name in FEATURES), strict=True)
    for i, ((image, text), gradient) in enumerate(zip(chunks, gradients, strict=True)):
        last = i == len(chunks) - 1
        set_device_rng(images.device, random[i])
        # Processes exchange gradients once, in the last backward pass; the scalars' gradient belongs to that one too.
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = model(image, text)
            pairs = list(zip([outputs[name] for name in FEATURES], gradient, strict=True))
            if last:
                pairs += [(outputs[name], leaf.grad) for name, leaf in leaves.items() if name not in FEATURES]
            torch.autograd.backward(*zip(*pairs, strict=True))
    return value.detach()


def clamp_logit_scale(model: nn.Module, largest: float) -> None:
    """Keep exp(logit_scale) in [1, largest]."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, math.log(largest))


def contrastive_loss(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """The loss the model was trained with, of these pairs: softmax over the batch, or SigLIP's where it has a bias."""
    outputs = model(images, texts)
    return build_loss("siglip" if outputs.get("logit_bias") is not None else "clip")(**outputs)


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of an image classifier, such as `timm.create_model(..., num_classes=10)`."""
    return nn.functional.cross_entropy(model(images), labels)
