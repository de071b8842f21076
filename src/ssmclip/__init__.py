"""ssmclip: train, evaluate and study CLIP models whose encoders are state-space models.

Importing it adds its encoders to timm (`timm.create_model("vmamba_small_s2l15")`) and its CLIP models to open_clip
(`open_clip.create_model_and_transforms("CLIP-VMamba-S")`).
"""

from ssmclip import ops
from ssmclip.models import clip_config, convert, create_clip, list_clips, load, load_published, push, save_model
from ssmclip.registry import UnknownName
from ssmclip.results import Result, append_rows, read_rows, write_rows

__all__ = [
    "Result",
    "UnknownName",
    "append_rows",
    "clip_config",
    "convert",
    "create_clip",
    "list_clips",
    "load",
    "load_published",
    "ops",
    "push",
    "read_rows",
    "save_model",
    "write_rows",
]
