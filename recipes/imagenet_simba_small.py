"""SiMBA-S on ImageNet-1k: the published recipe (Patro and Agneeswaran 2024, arXiv:2403.15360) without token labels.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_simba_small.py \\
        --set source=DIR/train validation.root=DIR

It is DeiT's recipe: 310 epochs of 1,024 images, a rate that is held for each epoch, 20 epochs more at the lowest one.
The published models were also trained with labels for parts of images from another network, which this package does
not read; with those their authors turn mixup and CutMix off. Here both are on, as in their script without such labels.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import LossConfig, MixConfig, ModelConfig, OptimiserConfig, ScheduleConfig, TrainConfig, load_recipe

IMAGES, BATCH = 1_281_167, 1024
EPOCH = IMAGES // BATCH  # 1,251 steps


def imagenet_simba_small() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_vmamba_tiny.py"))
    return replace(
        recipe,
        steps=330 * EPOCH,
        model=ModelConfig(name="simba_small", drop_path_rate=0.1),
        optimiser=OptimiserConfig(lr=2e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.05, clip_norm=None),
        schedule=ScheduleConfig(
            shape="timm:cosine",
            warmup_steps=5 * EPOCH,
            start_lr=1e-6,
            end_lr=1e-5,
            hold_steps=EPOCH,
            cooldown_steps=20 * EPOCH,
        ),
        loss=LossConfig(kind="classification", label_smoothing=0.1, mix=MixConfig(mixup=0.8, cutmix=1.0)),
        ema=replace(recipe.ema, decay=None),
    )
