"""Encoders, all made by timm.create_model, and the CLIP models built from them."""

from ssmclip.models.clip import build_preprocess, build_tokenizer, clip_config, create_clip, list_clips, save_tokenizer
from ssmclip.models.files.hub import download, push
from ssmclip.models.files.weights import CheckpointError, load_config, load_state, save_model
from ssmclip.models.names import load, load_tokenizer
from ssmclip.models.networks import mamba_text, mambaout, simba, vit, vmamba
from ssmclip.models.published.read import convert, load_published

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
