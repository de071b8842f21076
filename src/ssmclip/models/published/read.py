"""Load published weights without their configuration: the architecture is inferred from the file itself.

    file -> its state dict, online or averaged -> the configuration in its folder, else the layout that fits -> model

The layouts that are known are one file each in this folder; see `layout.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from ssmclip.models.clip import create_clip
from ssmclip.models.files.hub import HUB, WEIGHT_FILES, choose_weights, download
from ssmclip.models.files.weights import CheckpointError, load_into, load_state
from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.models.published.configured import read_configured
from ssmclip.models.published.layout import (
    LAYOUTS,
    Architecture,
    Hints,
    MissingWeight,
    State,
    UnknownLayout,
    WrongShape,
    find_layout,
)
from ssmclip.models.published.select import select_weights
from ssmclip.models.published.text import build_clip_text

__all__ = ["build", "create_encoder", "find_weights", "load_published", "read_published"]


def load_published(source: str | Path | Mapping[str, Any], weights: str = "online", **hints: Any) -> nn.Module:
    """Return the model that published weights belong to, with those weights, in evaluation mode.

    source: a checkpoint file (.safetensors, the .index.json of one in shards, or what torch.save wrote: no pickled code
    is run), a folder that holds one, `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME/FILE` (downloaded once), or what a file
    contains, a state dict or a dict around one;
    weights: "online" | "ema", the moving average a training run kept, exactly as saved | "ema_online_bn", the average
    with the batch statistics of the online weights: CLIP-Mamba averages parameters alone, so that the averaged SiMBA
    tower still has the statistics it began with;
    hints: what shapes cannot tell, by the fields of `Hints`: text_heads, quick_gelu, image_size, n_groups,
    layer_norm_epsilon, act_layer, conv_act.

    What shapes cannot tell is what is hinted, else what the configuration says that lies in the same folder as weights
    which have the name open_clip, timm or Hugging Face give them (open_clip_model.safetensors, model.safetensors), else
    what this package's own CLIP says that has exactly these shapes, else a guess, and a warning in the log that names
    the hint. With a configuration of open_clip's or timm's the model may be any that those know.

    Returns, for a CLIP, an open_clip model with `encode_image` and `encode_text`; for an image encoder, the timm model,
    which gives logits where the file has a classifier, else features; for CLIP's text tower alone, `ClipText`; for a
    language model, `LanguageModel`, which gives hidden states. The type is that of the weights, at least float32.

    Raises CheckpointError where nothing of this is known, and, key by key, where weights do not fit; FileNotFoundError;
    UnknownName for a configuration of another language model; ValueError for another `weights`; TypeError for a hint
    that does not exist.
    """
    return build(read_published(source, weights, Hints(**hints)), describe(source))


def read_published(
    source: str | Path | Mapping[str, Any], weights: str = "online", hints: Hints | None = None
) -> Architecture:
    """Return the architecture of published weights, with the weights in this package's names.

    Arguments and errors: those of `load_published`.
    """
    hints = hints or Hints()
    if not isinstance(source, str | Path):
        return _read_layout(select_weights(source, weights), hints, describe(source))
    path = find_weights(source)
    state = select_weights(load_state(path), weights, str(source))
    return read_configured(path, state, hints) or _read_layout(state, hints, str(source))


def _read_layout(state: State, hints: Hints, source: str) -> Architecture:
    try:
        layout = find_layout(state)
        if layout is None:
            raise UnknownLayout
        return layout.read(state, hints)
    except UnknownLayout as error:
        families = ", ".join(layout.title for _, layout in LAYOUTS.items())
        names = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{source} is not a known checkpoint ({families}). Its {len(state)} keys begin with: {names}"
        ) from error
    except MissingWeight as error:
        raise CheckpointError(f"{source} {error}") from error
    except WrongShape as error:
        shapes = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:4])
        raise CheckpointError(
            f"{source} has the names of a known checkpoint, but shapes that match no architecture "
            f"({error}). Its {len(state)} weights begin with: {shapes}"
        ) from error


def build(architecture: Architecture, source: str = "the state dict") -> nn.Module:
    """Return the model of an architecture, with its weights, in evaluation mode.

    Raises CheckpointError, key by key, where the weights do not fit.
    """
    config = architecture.config
    if architecture.kind == "clip":
        model = create_clip(config)
    elif architecture.kind == "encoder":
        model = create_encoder(architecture)
    elif architecture.kind == "text":
        model = build_clip_text(config)
    else:
        model = LanguageModel(read_config(config))
    load_into(model.to(_at_least_float32(architecture.weights)), architecture.weights, source, told=None)
    return model.eval()


def create_encoder(architecture: Architecture) -> nn.Module:
    """Return the timm model of an architecture of kind "encoder", with random weights."""
    config, described = architecture.config, architecture.pretrained_cfg
    more = {} if described is None else {"pretrained_cfg": dict(described)}
    return timm.create_model(config["architecture"], **config["model_args"], **more)


def find_weights(source: str | Path) -> Path:
    """Return the checkpoint file of a path: itself, the one in that folder, or in a repository of the hub.

    source: a path, or `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME/FILE`, which is downloaded once.
    Raises FileNotFoundError, CheckpointError.
    """
    path = download(str(source)) if str(source).startswith(HUB) else Path(source)
    if not path.is_dir():
        return path
    name = choose_weights(sorted(file.name for file in path.iterdir()), path)
    if name is None:
        raise CheckpointError(f"{path} contains no checkpoint: it has no {', '.join(WEIGHT_FILES)}")
    return path / name


def describe(source: Any) -> str:
    """Return the name of a source for error messages."""
    return str(source) if isinstance(source, str | Path) else "the state dict"


def _at_least_float32(state: State) -> torch.dtype:
    dtype = torch.float32
    for value in state.values():
        if value.is_floating_point():
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype
