"""The contrastive loss of a batch and its gradient, whole or through cached features.

Across processes the loss is that of the whole batch: features are gathered with gradient, each process has the rows of
its own pairs, and the mean over processes that data-parallel training takes gives the single-process gradient.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from accelerate import Accelerator
from open_clip.loss import ClipLoss, SigLipLoss
from torch import Tensor, nn

from ssmclip.train.state import device_rng, set_device_rng

FEATURES = ("image_features", "text_features")


def build_loss(kind: str, rank: int = 0, world_size: int = 1) -> nn.Module:
    """open_clip's loss, called with what the model's forward returns (features of this process); gives a scalar.

    With k texts for every image, one after the other, it is the mean of k losses: of each image with its first text,
    with its second, and so on. An image is embedded once for all of them.
    """
    if kind == "siglip":
        return _MeanOverCaptions(SigLipLoss(rank=rank, world_size=world_size))
    spread = world_size > 1
    return _MeanOverCaptions(ClipLoss(local_loss=spread, gather_with_grad=spread, rank=rank, world_size=world_size))


class _MeanOverCaptions(nn.Module):
    def __init__(self, loss: nn.Module):
        super().__init__()
        self.loss = loss

    def forward(self, image_features: Tensor, text_features: Tensor, **scale: Tensor) -> Tensor:
        count = len(text_features) // len(image_features)
        losses = [self.loss(image_features, text_features[i::count], **scale) for i in range(count)]
        return torch.stack(losses).mean()


def backward(
    accelerator: Accelerator, model: nn.Module, loss: nn.Module, images: Tensor, texts: Tensor, micro_batch: int | None
) -> Tensor:
    """Add the gradient of the loss to every parameter's `.grad`; return the loss, detached, on the device.

    images (batch, 3, height, width); texts int64 (batch * captions of an image, context). With a micro_batch smaller
    than the batch, features are cached (see `_backward_cached`) and memory is that of a micro-batch.
    """
    if micro_batch is None or micro_batch >= len(images):
        value = loss(**model(images, texts))
        accelerator.backward(value)
        return value.detach()
    return _backward_cached(accelerator, model, loss, images, texts, micro_batch)


def _backward_cached(
    accelerator: Accelerator, model: nn.Module, loss: nn.Module, images: Tensor, texts: Tensor, micro_batch: int
) -> Tensor:
    """GradCache (Gao et al. 2021, arXiv:2101.06983): the large batch's gradient from micro-batches, to rounding.

    Embed every micro-batch without a graph; take the loss of the whole batch and its gradient at the features; embed
    again with a graph, random state put back so that drop-path repeats, and send the features' gradient through.
    One more forward pass is the price. Batch norm, if a model has it, sees micro-batches (twice).
    """
    captions = len(texts) // len(images)
    sizes = {"image_features": micro_batch, "text_features": micro_batch * captions}
    chunks = list(zip(images.split(micro_batch), texts.split(micro_batch * captions), strict=True))
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
