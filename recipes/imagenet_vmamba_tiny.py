"""VMamba-T (s1l8) on ImageNet-1k: the published recipe (Liu et al. 2024, arXiv:2401.10166, and its code).

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_vmamba_tiny.py \\
        --set source=DIR/train validation.root=DIR

DIR has ImageNet's class folders: DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG. Published: 82.6 % top-1 at 224
px. It is Swin's recipe: 300 epochs of 1,024 images, warm-up before the cosine rather than within it, a rate that
changes at every step, gradients clipped at 5; with a moving average. Nobody has run it to the end with this package.
"""

from ssmclip.config import (
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

IMAGES, BATCH = 1_281_167, 1024
EPOCH = IMAGES // BATCH  # 1,251 steps


def imagenet_vmamba_tiny() -> TrainConfig:
    return TrainConfig(
        steps=300 * EPOCH,
        batch_size=BATCH,
        precision="fp16",
        model=ModelConfig(name="vmamba_tiny_s1l8", drop_path_rate=0.2),
        data=DataConfig(
            source="imagenet/train",
            image_sizes=((0.0, 224),),
            augment=AugmentConfig(
                library="timm",
                scale=(0.08, 1.0),
                flip=True,
                interpolation="bicubic",
                auto_augment="rand-m9-mstd0.5-inc1",
                erase_prob=0.25,
                erase_mode="pixel",
            ),
            workers=8,
        ),
        optimiser=OptimiserConfig(lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, clip_norm=5.0),
        schedule=ScheduleConfig(
            shape="timm:cosine",
            warmup_steps=20 * EPOCH,
            start_lr=1e-6,
            end_lr=1e-5,
            args={"warmup_prefix": True},
        ),
        loss=LossConfig(kind="classification", label_smoothing=0.1, mix=MixConfig(mixup=0.8, cutmix=1.0)),
        ema=EmaConfig(decay=0.9999),
        validation=ValidationConfig(every=EPOCH, tasks=("imagenet",), best="imagenet/top1"),
        checkpoint=CheckpointConfig(every=EPOCH, keep=2),
        logging=LoggingConfig(every=50),
    )
