"""A published CLIP on your own pairs, gently: all layers learn, at a low rate that falls with depth.

    ssmclip train recipes/finetune_clip.py --set source='DIR/{0000..0099}.tar'
    ssmclip blend open_clip:ViT-B-32-quickgelu/openai runs/finetune_clip --weight 0.25,0.5,0.75 --out blends
    ssmclip train recipes/finetune_clip.py --set source=DIR model.name= model.weights=runs/flickr8k \\
        data.image_sizes='[[0, 80]]' batch_size=128 --out runs/tuned

Fine-tuning forgets: a blend with the model before keeps most of what either knows (WiSE-FT, Wortsman et al. 2022,
arXiv:2109.01903). The loss is the one of pretraining, which suits fine-tuning better than another (Goyal et al. 2023,
arXiv:2212.00638); rate and weight decay are of that order, the layer decay is this package's choice. Nobody has run the
recipe at this size with this package: take `steps` from the number of your pairs, about ten passes over them.
"""

from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    ValidationConfig,
)


def finetune_clip() -> TrainConfig:
    return TrainConfig(
        steps=2000,
        batch_size=512,
        precision="bf16",
        model=ModelConfig(name="open_clip:ViT-B-32-quickgelu", weights="open_clip:ViT-B-32-quickgelu/openai"),
        data=DataConfig(
            source="data/pairs/{0000..0099}.tar",
            image_sizes=((0.0, 224),),
            augment=AugmentConfig(scale=(0.9, 1.0)),
            workers=8,
            shuffle_buffer=10_000,
        ),
        optimiser=OptimiserConfig(
            lr=1e-5, betas=(0.9, 0.98), eps=1e-6, weight_decay=0.1, layer_decay=0.75, text_layer_decay=0.75
        ),
        schedule=ScheduleConfig(warmup_steps=200),
        loss=LossConfig(kind="clip", micro_batch=128),
        validation=ValidationConfig(every=0),
        checkpoint=CheckpointConfig(every=500),
    )
