"""The smallest run that learns something: a VMamba of two blocks on synthetic scenes and digits.

    ssmclip train recipes/tiny.py

Under a minute on one core. Expect the loss to fall from ln 32 = 3.47 to below 2.9: that everything works, no more.
"""

from ssmclip.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
)


def tiny() -> TrainConfig:
    return TrainConfig(
        steps=60,
        batch_size=32,
        model=ModelConfig(
            name="CLIP-VMamba-Nano",
            changes={
                "embed_dim": 16,
                "vision_cfg": {"timm_model_name": "test_vmamba"},
                "text_cfg": {"width": 16, "heads": 2, "layers": 1},
            },
        ),
        data=DataConfig(source="synthetic:quickstart", image_sizes=((0.0, 32),), shuffle_buffer=200),
        optimiser=OptimiserConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=10),
        checkpoint=CheckpointConfig(every=20),
    )
