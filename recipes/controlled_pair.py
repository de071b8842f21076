"""The controlled pair: an encoder and each of three parts of CLIP-Mamba's recipe that its ViT baseline had not.

    ssmclip train recipes/controlled_pair.py
    ssmclip train recipes/controlled_pair.py --set model.name=CLIP-ViT-Nano --out runs/vit
    ssmclip train recipes/controlled_pair.py --set colors=false ema.decay=none gather_with_grad=false --out runs/none

The Mamba models of CLIP-Mamba are compared with SLIP's CLIP models, which were trained without the colour augmentation,
without the moving average, and without gradient through gathered features. Here each is one field, and the encoder is
model.name: CLIP-VMamba-Nano, CLIP-VMamba-Nano-GatedConv (the same without its scan) or CLIP-ViT-Nano.
benchmarks/controlled_pair.py trains them all.

The pairs, the text tower and the rates are those of flickr8k.py, at 64 pixels in bfloat16, for 160 steps: three and a
half passes, a minute and a half on one core. The augmentation is that of yfcc15m.py, but for the mirrored pictures. Its
moving average, 0.996 rising to 1 along half a cosine, ends up with weights whose mean age is 13 % of the run; here it
rises from 0, which gives 17 %: in so few steps it cannot be less.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import CheckpointConfig, EmaConfig, TrainConfig, ValidationConfig, load_recipe

STEPS = 160


def controlled_pair() -> TrainConfig:
    base, published = (load_recipe(Path(__file__).with_name(name)) for name in ("flickr8k.py", "yfcc15m.py"))
    augment = replace(published.data.augment, flip=base.data.augment.flip)
    return replace(
        base,
        steps=STEPS,
        precision="bf16",
        data=replace(base.data, image_sizes=((0.0, 64),), augment=augment),
        schedule=replace(base.schedule, warmup_steps=STEPS // 10),
        ema=EmaConfig(decay=0.0, schedule="cosine"),
        validation=ValidationConfig(),
        checkpoint=CheckpointConfig(every=STEPS),
        logging=replace(base.logging, tensorboard=False),
    )
