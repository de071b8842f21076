"""Register this package's encoders as timm models: `timm.create_model("vmamba_small_s2l15", num_classes=10)`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, register_model
from torch import nn


def default_cfg(**cfg: Any) -> dict[str, Any]:
    """Return timm's metadata for a model: ImageNet's statistics and sizes, with no weights to download.

    cfg: further entries, at least `first_conv` and `classifier`, names of parameters.
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


def name_with_fields(name: str, fields: dict[str, Any]) -> str:
    """Return a model's name with its changed fields, `name.depths=[1, 1];gated=true`, for timm.create_model.

    open_clip's configurations hold of an image tower one string, a name; so a tower that has no name of its own is
    written with its fields where timm has the tag. fields: JSON values, strings without ";".
    """
    tag = ";".join(f"{key}={json.dumps(value)}" for key, value in fields.items())
    return f"{name}.{tag}" if tag else name


def take_fields(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Return an entrypoint's arguments, with the fields from the tag in the model's name. Raises ValueError."""
    tag = kwargs.get("pretrained_cfg")
    if not isinstance(tag, str):
        return kwargs
    try:
        fields = {key: json.loads(value) for key, value in (field.split("=", 1) for field in tag.split(";"))}
    except ValueError as error:
        raise ValueError(f"the tag must be the name of weights, or field=JSON;... (got {tag!r})") from error
    return {**fields, **{key: value for key, value in kwargs.items() if key != "pretrained_cfg"}}


def register_variants(
    encoder: type[nn.Module], variants: dict[str, dict[str, Any]], second_classifier: str = ""
) -> None:
    """Make every variant of `encoder`, name -> fields, known to timm; `default_cfgs` is already in the same module.

    second_classifier: name of a head that a model has only where the field of that name is true.
    """
    for name, fields in variants.items():
        _register(encoder, name, fields, second_classifier)


def _register(encoder: type[nn.Module], name: str, fields: dict[str, Any], second_classifier: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        settings = {**fields, **take_fields(kwargs)}
        if settings.get(second_classifier):
            overlay = settings.get("pretrained_cfg_overlay") or {}
            settings["pretrained_cfg_overlay"] = {"classifier": ("head", second_classifier), **overlay}
        device, dtype = settings.pop("device", None), settings.pop("dtype", None)
        with torch.device(device) if device is not None else nullcontext():
            model = build_model_with_cfg(
                encoder,
                name,
                pretrained,
                feature_cfg=dict(out_indices=tuple(range(len(settings["dims"]))), feature_cls="getter"),
                **settings,
            )
        return model if dtype is None else model.to(dtype)

    entrypoint.__name__ = name
    entrypoint.__module__ = encoder.__module__  # timm reads default_cfgs from the module a model was defined in
    entrypoint.__doc__ = f"{encoder.__name__} with {fields}."
    register_model(entrypoint)
