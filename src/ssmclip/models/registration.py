"""How this package's encoders become timm models: `timm.create_model("vmamba_small_s2l15", num_classes=10)`."""

from __future__ import annotations

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn


def default_cfg(**cfg: Any) -> dict[str, Any]:
    """What timm wants to know of a model: ImageNet's statistics and sizes, with no weights to download.

    cfg: what else there is to say, at least `first_conv` and `classifier`, names of parameters.
    """
    return (
        dict(
            url="",
            num_classes=1000,
            input_size=(3, 224, 224),
            pool_size=(7, 7),
            crop_pct=0.875,
            interpolation="bicubic",
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            license="mit",
        )
        | cfg
    )


def register_variants(encoder: type[nn.Module], variants: dict[str, dict[str, Any]]) -> None:
    """Make every variant of `encoder`, name -> fields, known to timm; `default_cfgs` is already in the same module."""
    for name, fields in variants.items():
        _register(encoder, name, fields)


def _register(encoder: type[nn.Module], name: str, fields: dict[str, Any]) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        settings = {**fields, **kwargs}
        return build_model_with_cfg(
            encoder,
            name,
            pretrained,
            feature_cfg=dict(out_indices=tuple(range(len(settings["dims"]))), feature_cls="getter"),
            **settings,
        )

    entrypoint.__name__ = name
    entrypoint.__module__ = encoder.__module__  # timm reads default_cfgs from the module a model was defined in
    entrypoint.__doc__ = f"{encoder.__name__} with {fields}."
    register_model(entrypoint)
