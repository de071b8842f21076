"""Protocols of an evaluation: which prompts are used, and how images are resized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from torch import nn
from torchvision.transforms import InterpolationMode, Resize

from ssmclip.data.testsets.prompts import Prompts, clip_benchmark_prompts
from ssmclip.models.clip import image_transform
from ssmclip.models.towers import as_size
from ssmclip.registry import Registry

OWN = "own"
PROBE = "probe"  # the kind of task that trains a classifier on features, beside the kinds of test sets
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """prompts: those given on the command line -> those asked; preprocess: (model, its own, kind of task, pixels,
    (height, width) or None for the model's) -> the one used; probes: name of a probe in a task -> the one of PROBES
    that it stands for, where that is another."""

    prompts: Callable[[Prompts | None], Prompts | None]
    preprocess: Callable[[nn.Module, Any, str, Size | None], Any]
    probes: Mapping[str, str] = field(default_factory=dict)


PROTOCOLS: Registry[Protocol] = Registry("protocol")


def _its_own(model: nn.Module, preprocess: Any, kind: str, image_size: Size | None) -> Any:
    return preprocess


def _paper_prompts(prompts: Prompts | None) -> Prompts:
    if prompts is None:
        raise ValueError(
            "the protocol clip-mamba needs SLIP's prompts: give --prompts FOLDER with labels.json and templates.json "
            "from https://github.com/facebookresearch/SLIP (MIT licence)"
        )
    return prompts


def _paper_preprocess(model: nn.Module, preprocess: Any, kind: str, image_size: Size | None) -> Any:
    """Return CLIP-Mamba's preprocessing: resize the shorter side (bilinear; bicubic for retrieval), crop, normalise.

    For probes the shorter side is resized to 256 / 224 of the crop.
    """
    size = image_size or getattr(getattr(model, "visual", None), "image_size", None) or _made_for(model)
    transform = image_transform(
        size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation="bicubic" if kind == "retrieval" else "bilinear",
        resize_mode="shortest",
    )
    if kind == PROBE:
        transform.transforms[0] = Resize(max(as_size(size)) * 256 // 224, InterpolationMode.BILINEAR)
    return transform


def _made_for(model: nn.Module) -> Size:
    return resolve_data_config(model=model)["input_size"][1:] if hasattr(model, "pretrained_cfg") else 224


def _benchmark_prompts(prompts: Prompts | None) -> Prompts:
    return prompts or clip_benchmark_prompts()


PROTOCOLS.register(OWN)(Protocol(lambda prompts: prompts, _its_own))
PROTOCOLS.register("clip-mamba")(Protocol(_paper_prompts, _paper_preprocess, {"linear": "linear-sgd"}))
PROTOCOLS.register("clip-benchmark")(Protocol(_benchmark_prompts, _its_own))
