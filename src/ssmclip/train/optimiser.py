"""The optimiser: AdamW or one of timm's, which parameters have weight decay, and how fast each learns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import timm.optim
import torch
from torch import Tensor, nn

from ssmclip.config import OptimiserConfig
from ssmclip.models.towers import image_tower, is_clip
from ssmclip.registry import UnknownName
from ssmclip.train.layers import image_layers, text_layers
from ssmclip.train.trainee import model_of, named_parameters

# State-space parameters by the last part of their name, in every published layout: A_log(s) sets the time constants and
# D the skip; decay would pull every time constant towards one value. Biases of any shape, dt's too, go by name.
_NEVER_DECAYED = re.compile(r"^(A_logs?|Ds?|logit_scale|logit_bias)$|bias")

# timm's towers call theirs blocks, open_clip's own resblocks.
_IMAGE_BLOCK = re.compile(r"visual\..*blocks\.")
_IMAGE_TOWER = re.compile(r"visual\.(?!head\.|proj$)")
_NOT_TEXT = re.compile(r"visual\.|logit_|heads\.|(text\.)?(text_projection|proj\b)")


def decays(rule: str, name: str, parameter: Tensor) -> bool:
    """Return whether weight decay applies to a parameter, by its full name and number of dimensions.

    "original", as mamba-clip's training script: not to anything of fewer than two dimensions, nor where the full name
    contains "bias", "ln" or "bn". That decays A_log(s), which is two-dimensional.
    "ssm": not to anything of fewer than two dimensions (norms, biases, D, logit scale), nor A_log(s), D(s) and biases
    (dt's included) of any shape.
    """
    if parameter.ndim < 2:
        return False
    if rule == "original":
        return not any(part in name for part in ("bias", "ln", "bn"))
    return not _NEVER_DECAYED.search(name.rsplit(".", 1)[-1])


def in_text_tower(name: str) -> bool:
    """Return whether a parameter of a CLIP, by full name, belongs to the text tower, excluding its projection."""
    return not _NOT_TEXT.match(name)


def parameter_groups(
    parameters: Iterable[tuple[str, nn.Parameter]],
    config: OptimiserConfig,
    scales: Mapping[str, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Return an optimiser's groups, each with one learning rate and decay; frozen parameters are in none.

    A group's `lr_scale`, which `set_lr` reads, is its learning rate over the others'. scales: further factors by the
    parameters' names, such as `layer_scales` gives.
    """
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {(1.0, True): [], (1.0, False): []}
    for name, parameter in parameters:
        if parameter.requires_grad:
            scale = lr_scale(name, config) * scales.get(name, 1.0)
            kind = scale, decays(config.decay_rule, name, parameter)
            groups.setdefault(kind, []).append(parameter)
    return [
        {"params": members, "weight_decay": config.weight_decay if decay else 0.0, "lr_scale": scale}
        for (scale, decay), members in groups.items()
    ]


def lr_scale(name: str, config: OptimiserConfig) -> float:
    """Return a parameter's learning rate relative to `config.lr`, by its full name in a CLIP."""
    if in_text_tower(name):
        return config.text_lr_scale
    block = config.block_lr_scale if _IMAGE_BLOCK.match(name) else 1.0
    return block * config.image_lr_scale if _IMAGE_TOWER.match(name) else block


def layer_scales(
    model: nn.Module, decay: float | None, groups: str = "block", text_decay: float | None = None
) -> dict[str, float]:
    """Return the learning rate of each parameter of a tower over that of the tower's last layer, by full name.

    It falls by the factor `decay` from each layer of the image tower to the one before it, and by `text_decay` from
    each of the text tower (BEiT, arXiv:2106.08254, appendix); None: it does not. groups: "stage" for timm's stages in
    place of its blocks. Layers are those of train/layers.py.
    Raises ValueError for an image tower without groups of layers, and for the text tower of an image classifier.
    """
    scales = {}
    if decay is not None:
        if (layers := image_layers(model, groups == "stage")) is None:
            raise ValueError(
                f"optimiser.layer_decay must be none for {type(image_tower(model)).__name__}, which has no groups of "
                "layers"
            )
        scales |= _falling(layers, decay)
    if text_decay is not None:
        if not is_clip(model):
            raise ValueError("optimiser.text_layer_decay must be none for an image classifier, which has no text tower")
        scales |= _falling(text_layers(model), text_decay)
    return scales


def _falling(layers: list[list[str]], decay: float) -> dict[str, float]:
    last = len(layers) - 1
    return {name: decay ** (last - place) for place, layer in enumerate(layers) for name in layer}


def build_optimiser(model: nn.Module, config: OptimiserConfig) -> torch.optim.Optimizer:
    """Return the optimiser of the trainable parameters: AdamW, fused where the device supports it, or one of timm's.

    Raises UnknownName for a name that timm does not have, ValueError for arguments that it does not take.
    """
    scales = layer_scales(model_of(model), config.layer_decay, config.layer_groups, config.text_layer_decay)
    groups = parameter_groups(named_parameters(model), config, scales)
    groups = [group for group in groups if group["params"]] if config.algorithm != "adamw" else groups
    if config.algorithm == "adamw" and not config.args:
        fused = all(p.device.type in ("cpu", "cuda") for p in model.parameters())
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)
    if config.algorithm not in (known := timm.optim.list_optimizers()):
        raise UnknownName("optimiser", config.algorithm, known)
    about = timm.optim.get_optimizer_info(config.algorithm)
    given: dict[str, Any] = {"betas": config.betas} if about.has_betas else {}
    given |= {"eps": config.eps} if about.has_eps else {}
    try:
        return timm.optim.create_optimizer_v2(groups, opt=config.algorithm, lr=config.lr, **(given | config.args))
    except TypeError as error:
        raise ValueError(
            f"optimiser.args must be arguments of timm's {config.algorithm} (got {config.args}: {error})"
        ) from error


def set_lr(optimiser: torch.optim.Optimizer, lr: float) -> None:
    for group in optimiser.param_groups:
        group["lr"] = float(lr) * group.get("lr_scale", 1.0)
