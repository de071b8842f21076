"""CLIP-VMamba-Nano from scratch on Flickr8k: 6,000 photographs with five captions each, in webdataset shards.

    ssmclip train recipes/flickr8k.py
    ssmclip train recipes/flickr8k.py --set model.name=CLIP-ViT-Nano --out runs/flickr8k-vit
    ssmclip train recipes/flickr8k.py --set source=DIR/train validation.root=DIR

Ten minutes on two cores. The shards are looked for beside the project, in ../shared/data/captions/train.
6,000 photographs are few: expect to find the caption's photograph among the first ten of 1,000 for one caption in
seven, not a model that knows the world. More passes than these 26 did not help (LOG.md).
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
        steps=1200,
        batch_size=128,
        model=ModelConfig(
            name="CLIP-VMamba-Nano",
            drop_path_rate=0.05,
            changes={"text_cfg": {"context_length": 24, "layers": 1}},
        ),
        data=DataConfig(
            source=str(SHARED / "captions" / "train"),
            image_sizes=((0.0, 48),),
            augment=AugmentConfig(scale=(0.5, 1.0), flip=True, color_jitter=0.2),
            shuffle_buffer=6000,
        ),
        optimiser=OptimiserConfig(lr=1e-3, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=100),
        validation=ValidationConfig(every=300, tasks=("flickr8k",), root=str(SHARED)),
        checkpoint=CheckpointConfig(every=300),
    )
