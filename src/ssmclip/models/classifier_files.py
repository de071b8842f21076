"""The files of an image classifier that this package trains: any timm model with a head, in timm's form.

config.json           timm's form: architecture, model_args, num_classes, label_names, pretrained_cfg
model.safetensors     the weights; timm.create_model("local-dir:FOLDER", pretrained=True) reads the folder as well
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from timm.models import is_model
from torch import nn

from ssmclip.models.networks.registration import take_fields
from ssmclip.models.towers import set_image_size
from ssmclip.registry import UnknownName

__all__ = ["CONFIG", "WEIGHTS", "classifier_config", "classifier_transform", "create_classifier", "save_classifier"]

CONFIG, WEIGHTS = "config.json", "model.safetensors"
TIMM = "timm:"


def classifier_config(
    name: str,
    classes: Sequence[str],
    *,
    image_size: int | tuple[int, int],
    drop_path_rate: float | None = None,
    changes: dict[str, Any] | None = None,
    preprocess: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Return the configuration of a timm model that classifies images, in timm's form.

    name: NAME or timm:NAME, also NAME.field=JSON; classes: their names, in the order of the outputs; image_size: side
    of a square image, or (height, width), in pixels; changes: further arguments of timm.create_model; preprocess: in
    place of the model's own crop_pct, interpolation, mean, std ...
    Raises UnknownName for a model that timm does not know.
    """
    bare, _, tag = name.removeprefix(TIMM).partition(".")
    if not is_model(bare):
        raise UnknownName("image encoder", bare, timm.list_models())
    arguments = take_fields({"pretrained_cfg": tag}) if tag else {}
    arguments |= changes or {}
    if drop_path_rate is not None:
        arguments["drop_path_rate"] = drop_path_rate
    arguments = _sized(bare, arguments, image_size)
    config = {
        "architecture": bare,
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": arguments,
        "pretrained_cfg": {},
    }
    with torch.device("meta"):
        network = create_classifier(config)
    own = timm.data.resolve_model_data_config(network)
    sides = (image_size, image_size) if isinstance(image_size, int) else image_size
    size = {"input_size": [3, *sides]}
    kept = {
        key: value for key, value in own.items() if key in ("interpolation", "mean", "std", "crop_pct", "crop_mode")
    }
    # What timm needs to give the weights a head for other classes, or a stem for other channels.
    layers = {key: value for key in ("classifier", "first_conv") if (value := network.pretrained_cfg.get(key))}
    return {**config, "pretrained_cfg": {**kept, **layers, **size, **(preprocess or {})}}


def _sized(name: str, arguments: dict[str, Any], image_size: int | tuple[int, int]) -> dict[str, Any]:
    """Return the arguments with the image size, where the model has weights that depend on it, such as positions.

    Whoever reads the files then builds the model at the size that its weights have.
    """
    sized = {"img_size": image_size} | arguments
    with torch.device("meta"), suppress(TypeError):
        shapes = [
            {key: value.shape for key, value in timm.create_model(name, **given).state_dict().items()}
            for given in (arguments, sized)
        ]
        return sized if shapes[0] != shapes[1] else arguments
    return arguments


def create_classifier(config: dict[str, Any], *, grad_checkpointing: bool = False) -> nn.Module:
    """Return a classifier with random weights, at the image size of its configuration.

    Raises ValueError for arguments that its architecture does not take, and an image size that it cannot take.
    """
    name, arguments = config["architecture"], config.get("model_args", {})
    try:
        network = timm.create_model(name, num_classes=config["num_classes"], **arguments)
    except TypeError as error:
        given = ", ".join(arguments)
        raise ValueError(f"{name} cannot be built with the arguments {given} ({error})") from error
    if size := config.get("pretrained_cfg", {}).get("input_size"):
        set_image_size(network, tuple(size[1:]))
    if grad_checkpointing:
        network.set_grad_checkpointing()
    return network


def classifier_transform(
    pretrained_cfg: dict[str, Any], image_size: int | Sequence[int] | None = None
) -> Callable[[Any], torch.Tensor]:
    """Return the preprocessing of a classifier as timm's validation does it: PIL image -> float (3, H, W).

    The shorter side is resized to size / crop_pct and the centre is cut out, or as crop_mode says.
    pretrained_cfg: timm's; image_size: pixels or (height, width), in place of its own.
    """
    config = timm.data.resolve_data_config(pretrained_cfg=pretrained_cfg)
    if image_size is not None:
        sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        config["input_size"] = (config["input_size"][0], *sides)
    return timm.data.create_transform(**config)


def save_classifier(network: nn.Module, config: dict[str, Any], folder: str | Path) -> None:
    """Write `config.json` and `model.safetensors`: a folder that timm and `ssmclip.models.find` read."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: value.detach().contiguous() for key, value in network.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
