"""CLIP-VMamba-Nano from scratch on Flickr8k: 6,000 photographs with five captions each, in webdataset shards.

    ssmclip train recipes/flickr8k.py
    ssmclip train recipes/flickr8k.py --set model.name=CLIP-ViT-Nano --out runs/flickr8k-vit
    ssmclip train recipes/flickr8k.py --set source=DIR/train validation.root=DIR

At most 30 minutes on two cores. The shards are looked for beside the project, in ../shared/data/captions/train.
6,000 photographs are few: expect to find the caption's photograph among the first ten of 1,000 for one caption in five,
not a model that knows the world.
"""

from pathlib import Path

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)

SHARED = Path(__file__).parents[2] / "shared" / "data"


def flickr8k() -> TrainConfig:
    return TrainConfig(
        steps=1100,
        batch_size=128,
        model=ModelConfig(name="CLIP-VMamba-Nano", drop_path_rate=0.05),
        data=DataConfig(
            source=str(SHARED / "captions" / "train"),
            image_sizes=((0.0, 48), (0.7, 64)),
            augment=AugmentConfig(scale=(0.5, 1.0), flip=True, color_jitter=0.2),
            shuffle_buffer=6000,
        ),
        optimiser=OptimiserConfig(lr=5e-4, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=100),
        validation=ValidationConfig(every=275, tasks=("flickr8k",), root=str(SHARED)),
        checkpoint=CheckpointConfig(every=275),
    )
