"""ssmclip: train, evaluate and study CLIP models whose encoders are state-space models.

Importing it adds its encoders to timm (`timm.create_model("vmamba_small_s2l15")`) and its CLIP models to open_clip
(`open_clip.create_model_and_transforms("CLIP-VMamba-S")`).
"""

import importlib
from typing import Any

from ssmclip import ops
from ssmclip.data.distortions import distort
from ssmclip.models import clip_config, create_clip, list_clips, load, save_model
from ssmclip.registry import UnknownName
from ssmclip.results import Result, append_rows, read_rows, write_rows

__all__ = [
    "Result",
    "Spectrum",
    "UnknownName",
    "append_rows",
    "clip_config",
    "create_clip",
    "distort",
    "hessian_eigenvalues",
    "list_clips",
    "load",
    "ops",
    "read_rows",
    "save_model",
    "write_rows",
]


def __getattr__(name: str) -> Any:
    """The analysis is imported when it is first asked for."""
    if name in ("Spectrum", "hessian_eigenvalues"):
        return getattr(importlib.import_module("ssmclip.analyze.spectrum"), name)
    raise AttributeError(f"module 'ssmclip' has no attribute {name!r}")
