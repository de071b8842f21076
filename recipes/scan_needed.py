"""Is the scan needed for classification? One of six encoders of 2.9 M parameters on a small data set, from scratch.

    ssmclip train recipes/scan_needed.py
    ssmclip train recipes/scan_needed.py --set model.changes='{"mixer": "gated_conv"}' --out runs/gated
    ssmclip train recipes/scan_needed.py --set model.name=vit_nano_patch16 --out runs/vit

The six differ in one field each: vmamba_nano with its scan in four directions, in one (directions=1), and without
(mixer=gated_conv); vit_nano_patch16 with full and causal attention (mixing); mambaout_nano_linear_head. `make
scan-needed` trains each with three seeds and compares them at image sizes from 32 to 128 pixels. A minute on one core
with bfloat16. The data, CIFAR-10 or any part of it, are looked for as `ssmclip datasets` says.
"""

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
)


def scan_needed() -> TrainConfig:
    return TrainConfig(
        steps=300,
        batch_size=64,
        precision="bf16",
        model=ModelConfig(name="vmamba_nano", drop_path_rate=0.05, preprocess={"crop_pct": 1.0}),
        data=DataConfig(
            source="dataset:cifar10",
            image_sizes=((0.0, 64),),
            augment=AugmentConfig(scale=(0.4, 1.0), flip=True),
        ),
        optimiser=OptimiserConfig(lr=1e-3, betas=(0.9, 0.999), weight_decay=0.05),
        schedule=ScheduleConfig(warmup_steps=30),
        loss=LossConfig(kind="classification", label_smoothing=0.1),
        checkpoint=CheckpointConfig(every=300),
        logging=LoggingConfig(every=20, tensorboard=False),
    )
