"""CLIPs in open_clip's names with an image tower of timm's form, as this package and open_clip's trainer save them."""

from __future__ import annotations

import logging
from typing import Any

from ssmclip.models.clip import clip_config
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.published.hinted import hinted_clip
from ssmclip.models.published.language_model import language_model_config
from ssmclip.models.published.layout import (
    LAYOUTS,
    Architecture,
    Hints,
    Layout,
    State,
    UnknownLayout,
    find_layout,
    guess,
    has,
    shape,
    under,
)
from ssmclip.models.published.registered import BIAS, TRAINING_ONLY, registered_config
from ssmclip.models.published.text import clip_text_fields

log = logging.getLogger(__name__)

TRUNK = "visual.trunk."


def read(state: State, hints: Hints, like: str = "CLIP-VMamba-S") -> Architecture:
    """Read a CLIP in open_clip's names: a registered one if its weights have exactly these shapes, else by its shapes.

    like: the registered CLIP whose preprocessing and image size are assumed in the second case.
    """
    encoder = _read_trunk(under(state, TRUNK), hints)
    if encoder is not None:
        state = {key: value for key, value in state.items() if not key.startswith(TRUNK)}
        state |= {f"{TRUNK}{key}": value for key, value in encoder.weights.items()}
    config = registered_config(state)
    if config is not None:
        if hints.act_layer is not None and encoder is not None:
            config["model_cfg"]["vision_cfg"]["timm_model_name"] = _name(encoder)
        config = hinted_clip(config, state, hints)
    elif encoder is not None:
        config = _config_of_shapes(state, encoder, hints, like)
    else:
        raise UnknownLayout
    if BIAS in state:
        config["model_cfg"]["init_logit_bias"] = 0.0
    return Architecture("clip", config, state)


LAYOUTS.register("clip")(Layout("CLIPs as open_clip saves them", "clip", lambda state: has(state, TRUNK), read))


def _read_trunk(trunk: State, hints: Hints) -> Architecture | None:
    layout = find_layout(trunk, "encoder")
    return layout and layout.read(trunk, hints)


def _name(encoder: Architecture) -> str:
    arguments = {key: value for key, value in encoder.config["model_args"].items() if key != "num_classes"}
    return name_with_fields(encoder.config["architecture"], arguments)


def _config_of_shapes(state: State, encoder: Architecture, hints: Hints, like: str) -> dict[str, Any]:
    config = clip_config(like)
    model_cfg, vision_cfg = config["model_cfg"], config["model_cfg"]["vision_cfg"]
    model_cfg["embed_dim"] = shape(state, "visual.head.proj.weight", 2)[0]
    vision_cfg |= dict(timm_model_name=_name(encoder), timm_proj_bias="visual.head.proj.bias" in state)
    vision_cfg["image_size"] = guess(hints.image_size, "image_size", vision_cfg["image_size"])
    vision_cfg.pop(TRAINING_ONLY, None)
    if has(state, "text.transformer.layers."):
        model_cfg["text_cfg"] = _mamba_text_config(state, hints, model_cfg["text_cfg"])
    else:
        model_cfg["text_cfg"] = clip_text_fields(state, hints.text_heads)
        model_cfg["quick_gelu"] = guess(hints.quick_gelu, "quick_gelu", model_cfg["quick_gelu"])
    return config


def _mamba_text_config(state: State, hints: Hints, like: dict[str, Any]) -> dict[str, Any]:
    fields = language_model_config(under(state, "text.transformer."), hints)
    text_cfg = dict(context_length=None, mamba=fields, proj_bias="text.proj.bias" in state)
    if like.get("mamba", {}).get("vocab_size") == fields["vocab_size"]:  # else another tokenizer's
        text_cfg["hf_tokenizer_name"] = like["hf_tokenizer_name"]
    return text_cfg
