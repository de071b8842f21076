"""The layers of a model's towers in their order: those that are frozen, and those that learn at rates of their own.

A layer is a list of full names of parameters. Those of an image tower are timm's groups (`group_matcher`): its stem,
its blocks or stages, its head; those of open_clip's own vision transformer are as its `lock` has them: the stem, the
blocks, the last of them with the norm behind it, the projection. Those of a text tower: the embeddings, the blocks, the
last of them with the norm behind it, the projection.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from open_clip.transformer import VisionTransformer
from timm.models import group_parameters
from torch import nn

from ssmclip.config import ModelConfig
from ssmclip.models.towers import image_tower, is_clip

# What blocks are called in open_clip's transformers, in Mamba language models and in those of Hugging Face.
_BLOCK = re.compile(r"(?:^|\.)(?:resblocks|blocks|block|layers|layer|h)\.(\d+)\.")
_STEM = re.compile(r"emb|^conv1\.|^ln_pre\.|(?:^|\.)(?:wte|wpe|shared)\.")
_PROJECTION = re.compile(r"(?:text\.)?(?:text_projection|proj)\b|visual\.proj$")
_NOT_TEXT = re.compile(r"visual\.|logit_")

Layers = list[list[str]]


def image_layers(model: nn.Module, stages: bool = False) -> Layers | None:
    """Return the layers of the image tower, of a classifier with its head; None for a tower without groups of layers.

    stages: of timm's towers the stages in place of the blocks. The projection behind a timm tower is in no layer.
    """
    tower = image_tower(model)
    prefix = next(f"{name}." if name else "" for name, module in model.named_modules() if module is tower)
    if hasattr(tower, "group_matcher"):
        groups = group_parameters(tower, tower.group_matcher(coarse=stages))
        return [[prefix + name for name in groups[place]] for place in sorted(groups)]
    return _by_names(prefix, (name for name, _ in model.named_parameters())) if _is_own_vit(tower) else None


def text_layers(model: nn.Module) -> Layers:
    """Return the layers of a CLIP's text tower; a projection that has no parameters is an empty layer."""
    names = [name for name, _ in model.named_parameters() if not _NOT_TEXT.match(name)]
    return _by_names("text." if hasattr(model, "text") else "", names)


def freeze(model: nn.Module, config: ModelConfig) -> None:
    """Freeze the towers as `freeze_image` and `freeze_text` say, but for their last, unlocked layers.

    Raises ValueError for layers that the tower does not have, and for the text tower of an image classifier.
    """
    if config.freeze_image:
        _freeze(model, _lockable(model), config.unlocked_image_groups, "image")
    if config.freeze_text:
        if not is_clip(model):
            raise ValueError("model.freeze_text must be false for an image classifier, which has no text tower")
        _freeze(model, text_layers(model), config.unlocked_text_groups, "text")


def training_mode(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Put a model in training mode but for its frozen layers, and return it.

    These stay in evaluation mode: no dropout, no stochastic depth, and the statistics of batch norms as they are.
    """
    model.train()
    if config.freeze_image or config.freeze_text:
        for module in model.modules():
            parameters = list(module.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                module.eval()
    return model


def _lockable(model: nn.Module) -> Layers:
    """Return the layers of the image tower without a classifier's head, which learns whatever is frozen."""
    layers = image_layers(model)
    if layers is None:
        visual = image_tower(model)
        return [[name for name, p in model.named_parameters() if any(p is own for own in visual.parameters())]]
    if is_clip(model):
        return layers
    heads = classifier_keys(model)
    without = ([name for name in layer if not name.startswith(heads)] for layer in layers)
    return [layer for layer in without if layer]


def classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the keys of a timm model's last layers, one for each of its heads."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _freeze(model: nn.Module, layers: Layers, unlocked: int, tower: str) -> None:
    if unlocked >= len(layers):
        raise ValueError(
            f"model.unlocked_{tower}_groups must be less than {len(layers)}, the groups of layers of this {tower} "
            f"tower (got {unlocked}); to train all of it set model.freeze_{tower}=false"
        )
    for layer in layers[: len(layers) - unlocked]:
        for name in layer:
            model.get_parameter(name).requires_grad_(False)


def _is_own_vit(tower: nn.Module) -> bool:
    return isinstance(tower, VisionTransformer)


def _by_names(prefix: str, names: Iterable[str]) -> Layers:
    """Return the layers of a transformer: embeddings, blocks, projection."""
    names = [name for name in names if name.startswith(prefix)]
    numbers = [int(found[1]) for name in names if (found := _BLOCK.search(name))]
    blocks = max(numbers, default=-1) + 1
    layers: Layers = [[] for _ in range(blocks + 2)]
    for name in names:
        layers[_place(name, prefix, blocks)].append(name)
    return layers


def _place(name: str, prefix: str, blocks: int) -> int:
    if _PROJECTION.match(name):
        return blocks + 1
    if found := _BLOCK.search(name):
        return int(found[1]) + 1
    return 0 if _STEM.search(name.removeprefix(prefix)) else blocks
