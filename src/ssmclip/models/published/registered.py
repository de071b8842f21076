"""Find the CLIP of this package with exactly these weights; its configuration gives what shapes cannot."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

from ssmclip.models.clip import clip_config, create_clip, list_clips
from ssmclip.models.published.layout import State

log = logging.getLogger(__name__)

BIAS = "logit_bias"  # comes with a loss, not with a model
TRAINING_ONLY = "timm_drop_path"

Shapes = dict[str, tuple[int, ...]]


def registered_config(state: State) -> dict[str, Any] | None:
    """Return the configuration of the registered CLIP whose weights have these names and shapes; None if there is none.

    state: a CLIP's, in open_clip's names. Which one it is, is logged, and if several are of the same shapes, all of
    them: the first's settings are returned.
    """
    shapes = {key: tuple(value.shape) for key, value in state.items() if key != BIAS}
    names = [name for name in list_clips() if _may_have(clip_config(name), shapes) and _shapes_of(name) == shapes]
    if not names:
        return None
    log.info("using the settings of %s, whose weights have the same shapes", names[0])
    configs = [_settings(name) for name in names]
    if any(config != configs[0] for config in configs):
        log.warning("%s have weights of the same shapes; using the settings of %s", ", ".join(names), names[0])
    return configs[0]


def _settings(name: str) -> dict[str, Any]:
    config = clip_config(name)
    config["model_cfg"]["vision_cfg"].pop(TRAINING_ONLY, None)
    return config


def _may_have(config: dict[str, Any], shapes: Shapes) -> bool:
    """Return whether the embedding's size matches, to avoid building most models."""
    return shapes.get("visual.head.proj.weight", (0,))[:1] == (config["model_cfg"]["embed_dim"],)


@functools.cache
def _shapes_of(name: str) -> Shapes:
    with torch.device("meta"):
        return {key: tuple(value.shape) for key, value in create_clip(name).state_dict().items()}
