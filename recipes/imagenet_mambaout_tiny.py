"""MambaOut-Tiny on ImageNet-1k: the published recipe (Yu and Wang 2025, arXiv:2405.07992, table 5, and its train.py).

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_mambaout_tiny.py \\
        --set source=DIR/train validation.root=DIR

DIR has ImageNet's class folders: DIR/train/n01440764/*.JPEG, DIR/val/n01440764/*.JPEG. A batch is 4,096 images: 8
processes with 4 micro-batches of 128 each. Published: 82.7 % top-1 at 224 px (timm's measurement of those weights:
82.74 %; 83.45 % at 288 px). Nobody has run it to the end with this package yet.

As in the original: AdamW, no moving average, no clipping, no
repeated augmentation; the learning rate is held for each epoch, warm-up is within the 300 epochs of the cosine, and 10
epochs at the lowest rate follow. Its color jitter of 0.4 is left out: RandAugment takes its place in timm.
The siblings differ from it in the model and the rate of stochastic depth.
"""

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    MixConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

IMAGES, BATCH = 1_281_167, 4096
EPOCH = IMAGES // BATCH  # 312 steps


def imagenet_mambaout_tiny() -> TrainConfig:
    return TrainConfig(
        steps=310 * EPOCH,
        batch_size=BATCH,
        seed=42,
        model=ModelConfig(name="timm:mambaout_tiny", drop_path_rate=0.2),
        data=DataConfig(
            source="imagenet/train",
            image_sizes=((0.0, 224),),
            augment=AugmentConfig(
                library="timm",
                scale=(0.08, 1.0),
                flip=True,
                interpolation="random",
                auto_augment="rand-m9-mstd0.5-inc1",
                erase_prob=0.25,
                erase_mode="pixel",
            ),
            workers=8,
        ),
        optimiser=OptimiserConfig(lr=4e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, clip_norm=None),
        schedule=ScheduleConfig(
            shape="timm:cosine",
            warmup_steps=20 * EPOCH,
            start_lr=1e-6,
            end_lr=1e-5,
            hold_steps=EPOCH,
            cooldown_steps=10 * EPOCH,
        ),
        loss=LossConfig(
            kind="classification", micro_batch=128, label_smoothing=0.1, mix=MixConfig(mixup=0.8, cutmix=1.0)
        ),
        validation=ValidationConfig(every=EPOCH, tasks=("imagenet",), best="imagenet/top1"),
        checkpoint=CheckpointConfig(every=EPOCH, keep=2),
        logging=LoggingConfig(every=50),
    )
