"""Register this package's encoders with timm and its CLIPs with open_clip, once these have been imported.

Neither has entry points, so both learn of models by a call only; `ssmclip.import_hook` makes it. Importing this module
imports neither of them.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

CONFIGS = Path(__file__).parent / "configs"  # files in open_clip's form


def add_encoders(timm: ModuleType) -> None:
    """Make `timm.create_model` know this package's image encoders."""
    from ssmclip.models.networks import mambaout, simba, vit, vmamba  # noqa: F401  they register themselves


def add_clips(open_clip: ModuleType) -> None:
    """Make `open_clip.create_model` know this package's CLIPs."""
    if not {path.stem for path in CONFIGS.glob("*.json")} <= {*open_clip.list_models()}:
        open_clip.add_model_config(CONFIGS)
