"""ssmclip: train, evaluate and study CLIP models whose encoders are state-space models.

Importing it makes its encoders timm models (`timm.create_model("vmamba_small_s2l15")`) and its CLIP models open_clip's
(`open_clip.create_model_and_transforms("CLIP-VMamba-S")`), as soon as timm and open_clip are imported. It imports
neither of them, nor torch, until a name that needs them is first used.
"""

from typing import TYPE_CHECKING

from ssmclip.import_hook import after_import
from ssmclip.lazy import lazily
from ssmclip.models.plugins import add_clips, add_encoders

if TYPE_CHECKING:
    from ssmclip import models as models
    from ssmclip import ops as ops
    from ssmclip.analyze.cost.macs import count_macs as count_macs
    from ssmclip.analyze.curvature.spectrum import Spectrum as Spectrum
    from ssmclip.analyze.curvature.spectrum import hessian_eigenvalues as hessian_eigenvalues
    from ssmclip.analyze.saliency.explanation import explain as explain
    from ssmclip.data.distortions.apply import distort as distort
    from ssmclip.evaluate.prediction import classify as classify
    from ssmclip.evaluate.search.embedder import Embedder as Embedder
    from ssmclip.models import clip_config as clip_config
    from ssmclip.models import convert as convert
    from ssmclip.models import create_clip as create_clip
    from ssmclip.models import find as find
    from ssmclip.models import list_clips as list_clips
    from ssmclip.models import load as load
    from ssmclip.models import load_published as load_published
    from ssmclip.models import push as push
    from ssmclip.models import save_model as save_model
    from ssmclip.models.export import export_onnx as export_onnx
    from ssmclip.registry import UnknownName as UnknownName
    from ssmclip.rows import Result as Result
    from ssmclip.rows import append_rows as append_rows
    from ssmclip.rows import read_rows as read_rows
    from ssmclip.rows import write_rows as write_rows

_HOMES = {
    "Embedder": "ssmclip.evaluate.search.embedder",
    "Result": "ssmclip.rows",
    "Spectrum": "ssmclip.analyze.curvature.spectrum",
    "UnknownName": "ssmclip.registry",
    "append_rows": "ssmclip.rows",
    "classify": "ssmclip.evaluate.prediction",
    "clip_config": "ssmclip.models",
    "convert": "ssmclip.models",
    "count_macs": "ssmclip.analyze.cost.macs",
    "create_clip": "ssmclip.models",
    "distort": "ssmclip.data.distortions.apply",
    "explain": "ssmclip.analyze.saliency.explanation",
    "export_onnx": "ssmclip.models.export",
    "find": "ssmclip.models",
    "hessian_eigenvalues": "ssmclip.analyze.curvature.spectrum",
    "list_clips": "ssmclip.models",
    "load": "ssmclip.models",
    "load_published": "ssmclip.models",
    "models": "ssmclip.models",
    "ops": "ssmclip.ops",
    "push": "ssmclip.models",
    "read_rows": "ssmclip.rows",
    "save_model": "ssmclip.models",
    "write_rows": "ssmclip.rows",
}

__all__ = list(_HOMES)

if not TYPE_CHECKING:
    __getattr__, __dir__ = lazily(__name__, _HOMES)

after_import("timm", add_encoders)
after_import("open_clip", add_clips)
