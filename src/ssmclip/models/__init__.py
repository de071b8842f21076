"""Image encoders, all timm models, and the CLIP models built from them. Each is imported when first used."""

from typing import TYPE_CHECKING

from ssmclip.lazy import lazily

if TYPE_CHECKING:
    from ssmclip.models.clip import build_preprocess as build_preprocess
    from ssmclip.models.clip import build_tokenizer as build_tokenizer
    from ssmclip.models.clip import clip_config as clip_config
    from ssmclip.models.clip import create_clip as create_clip
    from ssmclip.models.clip import list_clips as list_clips
    from ssmclip.models.clip import save_model as save_model
    from ssmclip.models.clip import save_tokenizer as save_tokenizer
    from ssmclip.models.files.hub import download as download
    from ssmclip.models.files.hub import push as push
    from ssmclip.models.files.weights import CheckpointError as CheckpointError
    from ssmclip.models.files.weights import load_config as load_config
    from ssmclip.models.files.weights import load_state as load_state
    from ssmclip.models.interpolation import blend as blend
    from ssmclip.models.names import Model as Model
    from ssmclip.models.names import find as find
    from ssmclip.models.names import load as load
    from ssmclip.models.names import load_tokenizer as load_tokenizer
    from ssmclip.models.networks import mamba_text as mamba_text
    from ssmclip.models.networks import mambaout as mambaout
    from ssmclip.models.networks import simba as simba
    from ssmclip.models.networks import vit as vit
    from ssmclip.models.networks import vmamba as vmamba
    from ssmclip.models.published.read import load_published as load_published
    from ssmclip.models.published.write import convert as convert

_HOMES = {
    "CheckpointError": "ssmclip.models.files.weights",
    "Model": "ssmclip.models.names",
    "blend": "ssmclip.models.interpolation",
    "build_preprocess": "ssmclip.models.clip",
    "build_tokenizer": "ssmclip.models.clip",
    "clip_config": "ssmclip.models.clip",
    "convert": "ssmclip.models.published.write",
    "create_clip": "ssmclip.models.clip",
    "download": "ssmclip.models.files.hub",
    "list_clips": "ssmclip.models.clip",
    "find": "ssmclip.models.names",
    "load": "ssmclip.models.names",
    "load_config": "ssmclip.models.files.weights",
    "load_published": "ssmclip.models.published.read",
    "load_state": "ssmclip.models.files.weights",
    "load_tokenizer": "ssmclip.models.names",
    "mamba_text": "ssmclip.models.networks.mamba_text",
    "mambaout": "ssmclip.models.networks.mambaout",
    "push": "ssmclip.models.files.hub",
    "save_model": "ssmclip.models.clip",
    "save_tokenizer": "ssmclip.models.clip",
    "simba": "ssmclip.models.networks.simba",
    "vit": "ssmclip.models.networks.vit",
    "vmamba": "ssmclip.models.networks.vmamba",
}

__all__ = list(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _HOMES)
