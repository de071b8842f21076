"""CLIP-VMamba-Nano from scratch on Flickr8k: 6,000 photographs with five captions each, in webdataset shards.

    ssmclip train recipes/flickr8k.py
    ssmclip train recipes/flickr8k.py --set model.name=CLIP-ViT-Nano --out runs/flickr8k-vit
    ssmclip train recipes/flickr8k.py --set source=DIR/train validation.root=DIR

A quarter of an hour on two cores. The shards are looked for in captions/train, and the test set in captions/retrieval,
below the current folder, the folder that SSMCLIP_DATA names, and data/ in a checkout or shared/data beside it.
6,000 photographs are few: expect to find the caption's photograph among the first ten of 1,000 for one caption in
five, not a model that knows the world. What made the difference, from 14 to 20 %, stands in LOG.md: all five captions
in every step, no text layers, a moving average, a lower learning rate for the blocks than for the convolutions.
"""

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)


def flickr8k() -> TrainConfig:
    return TrainConfig(
        steps=940,
        batch_size=128,
        model=ModelConfig(
            name="CLIP-VMamba-Nano",
            changes={"text_cfg": {"context_length": 24, "layers": 0, "width": 256}},  # a bag of words
        ),
        data=DataConfig(
            source="captions/train",
            image_sizes=((0.0, 80),),
            augment=AugmentConfig(scale=(0.5, 1.0), flip=True, color_jitter=0.2),
            shuffle_buffer=6000,
            captions_per_image=5,
        ),
        optimiser=OptimiserConfig(lr=1e-3, block_lr_scale=0.25, weight_decay=0.2),
        schedule=ScheduleConfig(warmup_steps=60),
        ema=EmaConfig(decay=0.995),
        validation=ValidationConfig(every=235, tasks=("flickr8k",)),
        checkpoint=CheckpointConfig(every=235),
    )
