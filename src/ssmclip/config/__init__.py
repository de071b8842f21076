"""The definition of a training run: typed settings, the recipe that returns them, overrides. Needs no torch."""

from ssmclip.config.overrides import apply_overrides, changed, changed_fields, from_dict, to_dict
from ssmclip.config.recipe import load_recipe
from ssmclip.config.settings import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    EmaConfig,
    LoggingConfig,
    LossConfig,
    MaskConfig,
    MixConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    SslConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "AugmentConfig",
    "CheckpointConfig",
    "DataConfig",
    "DistillConfig",
    "EmaConfig",
    "LoggingConfig",
    "LossConfig",
    "MaskConfig",
    "MixConfig",
    "ModelConfig",
    "OptimiserConfig",
    "ScheduleConfig",
    "SslConfig",
    "TrainConfig",
    "ValidationConfig",
    "apply_overrides",
    "changed",
    "changed_fields",
    "from_dict",
    "load_recipe",
    "to_dict",
]
