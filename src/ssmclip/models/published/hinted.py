"""Apply a caller's hints to a CLIP's configuration."""

from __future__ import annotations

import copy
from typing import Any

from ssmclip.models.published.language_model import known_fields, language_model_config
from ssmclip.models.published.layout import Hints, State, under
from ssmclip.models.text_towers import TRANSFORMER, text_tower_kind

TextConfig = dict[str, Any]


def hinted_clip(config: dict[str, Any], state: State, hints: Hints) -> dict[str, Any]:
    """Return the configuration with the hints that apply to its text tower, its activation and its image size.

    state: the CLIP's weights, of which a Mamba text tower's shapes are read again where n_groups is hinted.
    """
    config = copy.deepcopy(config)
    model_cfg = config["model_cfg"]
    text_cfg = model_cfg["text_cfg"]
    hinted = HINTED.get(text_tower_kind(text_cfg))
    model_cfg["text_cfg"] = hinted(text_cfg, state, hints) if hinted else text_cfg
    if hints.quick_gelu is not None:
        model_cfg["quick_gelu"] = hints.quick_gelu
    if hints.image_size is not None:
        model_cfg["vision_cfg"]["image_size"] = hints.image_size
    return config


def _hinted_transformer(text_cfg: TextConfig, state: State, hints: Hints) -> TextConfig:
    return text_cfg if hints.text_heads is None else {**text_cfg, "heads": hints.text_heads}


def _hinted_language_model(text_cfg: TextConfig, state: State, hints: Hints) -> TextConfig:
    if (hints.n_groups, hints.layer_norm_epsilon) == (None, None):
        return text_cfg
    configured = known_fields({"model_type": text_tower_kind(text_cfg), **text_cfg["mamba"]}, "text_cfg.mamba")
    return {**text_cfg, "mamba": language_model_config(under(state, "text.transformer."), hints, configured)}


# kind of text tower -> how hints change its `text_cfg`; other kinds have nothing that could be hinted at
HINTED = {TRANSFORMER: _hinted_transformer, "mamba": _hinted_language_model, "mamba2": _hinted_language_model}
