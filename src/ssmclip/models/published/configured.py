"""Read the configuration in the same folder as the weights, which gives what shapes cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch

from ssmclip.models.files.weights import CONFIG_NAME, CONFIGS, config_beside
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
            built = timm.create_model(name, **arguments).state_dict()
    except (TypeError, ValueError, RuntimeError):  # arguments that timm's model does not take
        return None
    if {key: value.shape for key, value in built.items()} != {key: value.shape for key, value in state.items()}:
        return None
    return Architecture("encoder", {"architecture": name, "model_args": arguments}, state)
