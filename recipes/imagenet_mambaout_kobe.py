"""MambaOut-Kobe on ImageNet-1k, by MambaOut's recipe: imagenet_mambaout_tiny.py with another model.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_mambaout_kobe.py \\
        --set source=DIR/train validation.root=DIR

Published: 80.0 % top-1 at 224 px (79.99 % as timm measures it).
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import ModelConfig, TrainConfig, load_recipe


def imagenet_mambaout_kobe() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_mambaout_tiny.py"))
    return replace(recipe, model=ModelConfig(name="timm:mambaout_kobe", drop_path_rate=0.025))
