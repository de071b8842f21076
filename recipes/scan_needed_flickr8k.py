"""Is the scan needed for a CLIP? The encoders of scan_needed.py as image towers, on the pairs of flickr8k.py.

    ssmclip train recipes/scan_needed_flickr8k.py
    ssmclip train recipes/scan_needed_flickr8k.py --set model.name=CLIP-ViT-Nano --out runs/vit

The recipe of flickr8k.py, shorter: 200 steps of 64 pixels in bfloat16, without its moving average, for which 200 steps
are too few, and without its color jitter, which takes as long as the model. Two minutes on one core.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import CheckpointConfig, EmaConfig, TrainConfig, ValidationConfig, load_recipe


def scan_needed_flickr8k() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("flickr8k.py"))
    return replace(
        recipe,
        steps=200,
        precision="bf16",
        data=replace(recipe.data, image_sizes=((0.0, 64),), augment=replace(recipe.data.augment, color_jitter=0.0)),
        schedule=replace(recipe.schedule, warmup_steps=20),
        ema=EmaConfig(),
        validation=ValidationConfig(),
        checkpoint=CheckpointConfig(every=200),
        logging=replace(recipe.logging, tensorboard=False),
    )
