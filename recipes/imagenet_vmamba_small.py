"""VMamba-S (s2l15) on ImageNet-1k, by VMamba's recipe: imagenet_vmamba_tiny.py with another model.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_vmamba_small.py \\
        --set source=DIR/train validation.root=DIR

Published: 83.6 % top-1 at 224 px.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import ModelConfig, TrainConfig, load_recipe


def imagenet_vmamba_small() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_vmamba_tiny.py"))
    return replace(recipe, model=ModelConfig(name="vmamba_small_s2l15", drop_path_rate=0.3))
