"""Protocols of an evaluation: which prompts are used, and how images are resized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn

from ssmclip.data.testsets.prompts import Prompts, clip_benchmark_prompts
from ssmclip.models.clip import image_transform
from ssmclip.registry import Registry

OWN = "own"
Size = int | tuple[int, int]


@dataclass(frozen=True)
class Protocol:
    """prompts: those given on the command line -> those asked; preprocess: (model, its own, kind of task, pixels,
    (height, width) or None for the model's) -> the one used."""

    prompts: Callable[[Prompts | None], Prompts | None]
    preprocess: Callable[[nn.Module, Any, str, Size | None], Any]


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
    """Return CLIP-Mamba's preprocessing: resize the shorter side (bilinear; bicubic for retrieval), crop, normalise."""
    size = image_size or getattr(getattr(model, "visual", None), "image_size", None) or 224
    return image_transform(
        size,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        interpolation="bicubic" if kind == "retrieval" else "bilinear",
        resize_mode="shortest",
    )


def _benchmark_prompts(prompts: Prompts | None) -> Prompts:
    return prompts or clip_benchmark_prompts()


PROTOCOLS.register(OWN)(Protocol(lambda prompts: prompts, _its_own))
PROTOCOLS.register("clip-mamba")(Protocol(_paper_prompts, _paper_preprocess))
PROTOCOLS.register("clip-benchmark")(Protocol(_benchmark_prompts, _its_own))
