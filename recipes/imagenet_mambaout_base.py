"""MambaOut-Base on ImageNet-1k, by MambaOut's recipe: imagenet_mambaout_tiny.py with another model.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_mambaout_base.py \\
        --set source=DIR/train validation.root=DIR

Published: 84.2 % top-1 at 224 px (84.19 % as timm measures it).
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import ModelConfig, TrainConfig, load_recipe


def imagenet_mambaout_base() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_mambaout_tiny.py"))
    return replace(recipe, model=ModelConfig(name="timm:mambaout_base", drop_path_rate=0.6))
