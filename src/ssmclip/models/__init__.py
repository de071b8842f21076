"""Encoders, all made by timm.create_model, and the CLIP models built from them."""

from ssmclip.models import mamba_text, mambaout, simba, vit, vmamba
from ssmclip.models.clip import (
    build_preprocess,
    build_tokenizer,
    clip_config,
    create_clip,
    list_clips,
    load,
    save_tokenizer,
)
from ssmclip.models.weights import CheckpointError, load_config, load_state, save_model

__all__ = [
    "CheckpointError",
    "build_preprocess",
    "build_tokenizer",
    "clip_config",
    "create_clip",
    "list_clips",
    "load",
    "load_config",
    "load_state",
    "mamba_text",
    "mambaout",
    "save_model",
    "save_tokenizer",
    "simba",
    "vit",
    "vmamba",
]
