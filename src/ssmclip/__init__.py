"""ssmclip: train, evaluate and study CLIP models whose encoders are state-space models.

Importing it adds its encoders to timm (`timm.create_model("vmamba_small_s2l15")`) and its CLIP models to open_clip
(`open_clip.create_model_and_transforms("CLIP-VMamba-S")`).
"""

import importlib
from typing import Any

from ssmclip import ops
from ssmclip.data.distortions.apply import distort
from ssmclip.models import clip_config, convert, create_clip, list_clips, load, load_published, push, save_model
from ssmclip.registry import UnknownName
from ssmclip.rows import Result, append_rows, read_rows, write_rows

__all__ = [
    "Embedder",
    "Result",
    "Spectrum",
    "UnknownName",
    "append_rows",
    "clip_config",
    "convert",
    "count_macs",
    "create_clip",
    "distort",
    "export_onnx",
    "hessian_eigenvalues",
    "list_clips",
    "load",
    "load_published",
    "ops",
    "push",
    "read_rows",
    "save_model",
    "write_rows",
]

# What is not loaded before it is asked for: name -> its module.
_LATER = {
    "Embedder": "ssmclip.evaluate.search.embedder",
    "Spectrum": "ssmclip.analyze.curvature.spectrum",
    "count_macs": "ssmclip.analyze.cost.macs",
    "export_onnx": "ssmclip.models.export",
    "hessian_eigenvalues": "ssmclip.analyze.curvature.spectrum",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_LATER[name]), name)
