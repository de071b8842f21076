"""A trained ImageNet classifier at 384 px: ConvNeXt's fine-tuning recipe for a larger image size.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_finetune_384.py \\
        --set source=DIR/train validation.root=DIR model.weights=runs/imagenet_mambaout_tiny

30 epochs at a low, layer-wise decayed learning rate, without mixing (Liu et al. 2022, arXiv:2201.03545, and its
TRAINING.md). Layers are timm's stages, for which ConvNeXt's factor of 0.7 was chosen: MambaOut has 6 of them, and with
one layer for each of its 20 blocks the stem would hardly learn. Set data.source for classes of your own: the head is
replaced then, and its weights begin at a thousandth of the usual ones.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import (
    EmaConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    load_recipe,
)

IMAGES, BATCH = 1_281_167, 512
EPOCH = IMAGES // BATCH  # 2,502 steps


def imagenet_finetune_384() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_mambaout_tiny.py"))
    return replace(
        recipe,
        steps=30 * EPOCH,
        batch_size=BATCH,
        model=ModelConfig(
            name="timm:mambaout_tiny",
            weights="timm:mambaout_tiny.in1k",
            head_init_scale=1e-3,
            drop_path_rate=0.4,
            preprocess={"crop_pct": 1.0, "crop_mode": "squash"},
        ),
        data=replace(recipe.data, image_sizes=((0.0, 384),)),
        optimiser=OptimiserConfig(
            lr=5e-5,
            betas=(0.9, 0.999),
            eps=1e-8,
            weight_decay=1e-8,
            clip_norm=None,
            layer_decay=0.7,
            layer_groups="stage",
        ),
        schedule=ScheduleConfig(warmup_steps=0, end_lr=1e-6),
        loss=LossConfig(kind="classification", micro_batch=32, label_smoothing=0.1),
        ema=EmaConfig(decay=0.9999),
        validation=replace(recipe.validation, every=EPOCH),
        checkpoint=replace(recipe.checkpoint, every=EPOCH),
    )
