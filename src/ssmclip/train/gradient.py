"""Compute the gradient of a batch's loss, at once or in micro-batches through cached features."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssmclip.train.objective import Objective
from ssmclip.train.state import device_rng, set_device_rng


def backward(
    accelerator: Accelerator,
    model: nn.Module,
    objective: Objective,
    images: Tensor,
    targets: Tensor,
    micro_batch: int | None,
    more: Mapping[str, Tensor] = MappingProxyType({}),
) -> Tensor:
    """Add the gradient of the loss to every parameter's `.grad`; return the loss, detached, on the device.

    images (batch * shown, 3, height, width); targets (batch * captions, ...), such as int64 token ids.
    micro_batch: pairs to embed at a time; memory is then that of a micro-batch. Features are cached (see
    `_backward_cached`), or gradients accumulated where the loss is a mean over images. None embeds all at once.
    more: what else the objective takes, by name, each with the same number of rows for every pair.
    """
    pairs = len(images) // objective.shown
    whole = {"images": images, "targets": targets, **more}
    at_once = micro_batch is None or micro_batch >= pairs
    with accelerator.autocast():
        chunks = [objective.inputs(**part) for part in ([whole] if at_once else _split(whole, pairs, micro_batch))]
    if at_once:
        value = objective.of_batch(model, *chunks[0])
        accelerator.backward(value)
        return value.detach()
    if objective.separable:
        return _backward_accumulated(accelerator, model, objective, chunks)
    return _backward_cached(accelerator, model, objective, chunks)


def more_of(batch: Any) -> dict[str, Tensor]:
    """Return what a batch has besides images and texts, by the names that objectives take it by.

    teacher_images, teacher_texts: the features that a teacher has of them, where the data store those. boxes: see
    `ssmclip.data.pairs.stream.Batch`.
    """
    teacher, boxes = getattr(batch, "teacher", None), getattr(batch, "boxes", None)
    more = {} if boxes is None else {"boxes": boxes}
    return more if teacher is None else more | {"teacher_images": teacher.images, "teacher_texts": teacher.texts}


def _split(whole: Mapping[str, Tensor], pairs: int, micro_batch: int) -> list[dict[str, Tensor]]:
    """Return the rows of each micro-batch, by name."""
    split = {name: value.split(len(value) // pairs * micro_batch) for name, value in whole.items()}
    return [dict(zip(split, parts, strict=True)) for parts in zip(*split.values(), strict=True)]


def _backward_accumulated(
    accelerator: Accelerator, model: nn.Module, objective: Objective, chunks: list[tuple[Tensor, Any]]
) -> Tensor:
    """Compute the gradient of a mean over images as the sum of the micro-batches' gradients, each once."""
    images, total = sum(len(image) for image, _ in chunks), torch.zeros((), device=chunks[0][0].device)
    for i, (image, target) in enumerate(chunks):
        # Processes exchange gradients once, in the last backward pass.
        with nullcontext() if i == len(chunks) - 1 else accelerator.no_sync(model):
            value = objective.of_batch(model, image, target) * (len(image) / images)
            accelerator.backward(value)
        total += value.detach()
    return total


def _backward_cached(
    accelerator: Accelerator, model: nn.Module, objective: Objective, chunks: list[tuple[Tensor, Any]]
) -> Tensor:
    """Compute the large batch's gradient from micro-batches, up to rounding (GradCache, Gao et al., arXiv:2101.06983).

    Embed every micro-batch without a graph; take the loss of the whole batch and its gradient at the features; embed
    again with a graph, the random state restored so that drop-path repeats, and backpropagate through the features.
    This costs one more forward pass. Batch norm, if a model has it, sees micro-batches (twice).
    """
    device = chunks[0][0].device
    random, embedded = [], []
    with torch.no_grad():
        for image, target in chunks:
            random.append(device_rng(device))
            embedded.append(objective.outputs(model, image, target))

    leaves = {name: torch.cat([e[name] for e in embedded]) for name in objective.rows}
    leaves |= {name: value for name, value in embedded[0].items() if name not in leaves}  # logit scale and bias
    leaves = {name: value.detach().requires_grad_(value.is_floating_point()) for name, value in leaves.items()}
    value = objective(**leaves)
    (value if accelerator.scaler is None else accelerator.scaler.scale(value)).backward()

    gradients = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    parts = {
        name: gradients.pop(name).split([len(e[name]) for e in embedded])
        for name in objective.rows
        if name in gradients
    }
    for i, (image, target) in enumerate(chunks):
        last = i == len(chunks) - 1
        set_device_rng(device, random[i])
        # Processes exchange gradients once, in the last backward pass; the scalars' gradient belongs to that one too.
        with nullcontext() if last else accelerator.no_sync(model):
            outputs = objective.outputs(model, image, target)
            pairs = [(outputs[name], part[i]) for name, part in parts.items()]
            if last:
                pairs += [(outputs[name], gradient) for name, gradient in gradients.items()]
            if pairs := [(output, part) for output, part in pairs if output.requires_grad]:  # a tower may be frozen
                torch.autograd.backward(*zip(*pairs, strict=True))
    return value.detach()
