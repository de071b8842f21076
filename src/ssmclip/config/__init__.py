"""The definition of a training run: typed settings, the recipe that returns them, overrides. Needs no torch."""

from ssmclip.config.overrides import apply_overrides, changed_fields, from_dict, to_dict
from ssmclip.config.recipe import load_recipe
from ssmclip.config.settings import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LoggingConfig,
    LossConfig,
    MixConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "EmaConfig",
    "LoggingConfig",
    "LossConfig",
    "MixConfig",
    "ModelConfig",
    "OptimiserConfig",
    "ScheduleConfig",
    "TrainConfig",
    "ValidationConfig",
    "apply_overrides",
    "changed_fields",
    "from_dict",
    "load_recipe",
    "to_dict",
]
