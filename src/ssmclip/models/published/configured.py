"""Read the configuration in the same folder as the weights, which gives what shapes cannot."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn

from ssmclip.models.files.weights import CONFIG_NAME, CONFIGS, CheckpointError, config_beside
from ssmclip.models.published.hinted import hinted_clip
from ssmclip.models.published.language_model import known_fields, language_model_config, own_keys
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, State

__all__ = ["read_configured"]


def read_configured(path: Path, state: State, hints: Hints) -> Architecture | None:
    """Return the architecture from the configuration in the file's folder, None if there is none.

    The configuration is open_clip's, timm's or Hugging Face's, by the name of the file of weights.
    Raises CheckpointError, UnknownName.
    """
    config = config_beside(path)
    if "model_cfg" in config and CONFIGS[path.name] == CONFIG_NAME:
        config["model_cfg"]["vision_cfg"].pop("timm_model_pretrained", None)  # the weights are here
        return Architecture("clip", hinted_clip(config, state, hints), state)
    if encoder := _configured_encoder(config, state, hints):
        return encoder
    if "model_type" in config and LAYOUTS["language_model"].fits(state):
        state = own_keys(state)
        fields = language_model_config(state, hints, known_fields(config, path))
        return Architecture("language_model", fields, state)
    return None


def _configured_encoder(config: dict[str, Any], state: State, hints: Hints) -> Architecture | None:
    """Return a timm encoder, None if the configuration names no timm model or one whose weights differ."""
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    given = {"num_classes": config.get("num_classes"), "act_layer": hints.act_layer}
    arguments = (config.get("model_args") or {}) | {key: value for key, value in given.items() if value is not None}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **arguments)
    except (TypeError, ValueError, RuntimeError):  # arguments that timm's model does not take
        return None
    if {key: value.shape for key, value in model.state_dict().items()} != {
        key: value.shape for key, value in state.items()
    }:
        return None
    described = _described(config, model)
    return Architecture("encoder", {"architecture": name, "model_args": arguments}, state, described)


def _described(config: dict[str, Any], model: nn.Module) -> dict[str, Any] | None:
    """Return timm's `pretrained_cfg` from a configuration in the form of its hub, with the names of the classes in it;
    None where the configuration has neither. A configuration that does not say which layers are the classifier's means
    the architecture's. Raises CheckpointError for names that are not one text for each output.
    """
    names = config.get("label_names")
    given = config.get("pretrained_cfg")
    if not isinstance(given, dict) and names is None:
        return None
    if not isinstance(given, dict):
        given = model.pretrained_cfg
    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    described = {key: tuple(v) if isinstance(v, list) else v for key, v in given.items() if key in known}
    if not described.get("classifier"):
        described["classifier"] = model.pretrained_cfg.get("classifier")
    if names is not None:
        described |= {"label_names": _label_names(names, model.num_classes), "num_classes": model.num_classes}
    return described


def _label_names(names: Any, outputs: int) -> tuple[str, ...]:
    """Return the names of a classifier's outputs. Raises CheckpointError."""
    if isinstance(names, dict) and set(names) == {str(place) for place in range(len(names))}:
        names = [names[str(place)] for place in range(len(names))]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"label_names in config.json must be a list of texts (got {str(names)[:60]})")
    if len(names) != outputs:
        raise CheckpointError(
            f"label_names in config.json has {len(names):,} names for a classifier with {outputs:,} outputs: "
            "give one name for each output"
        )
    return tuple(names)
