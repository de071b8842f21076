"""Encoders, all made by timm.create_model, and the CLIP models built from them."""

from ssmclip.models import mamba_text, mambaout, simba, vit, vmamba
from ssmclip.models.clip import (
    build_preprocess,
    build_tokenizer,
    clip_config,
    create_clip,
    list_clips,
    load,
    load_tokenizer,
    save_tokenizer,
)
from ssmclip.models.hub import download, push
from ssmclip.models.published import convert, load_published
from ssmclip.models.weights import CheckpointError, load_config, load_state, save_model

__all__ = [
    "CheckpointError",
    "build_preprocess",
    "build_tokenizer",
    "clip_config",
    "convert",
    "create_clip",
    "download",
    "list_clips",
    "load",
    "load_config",
    "load_published",
    "load_state",
    "load_tokenizer",
    "mamba_text",
    "mambaout",
    "push",
    "save_model",
    "save_tokenizer",
    "simba",
    "vit",
    "vmamba",
]
