"""SiMBA-L on ImageNet-1k, by SiMBA's recipe: imagenet_simba_small.py with another model.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_simba_large.py \\
        --set source=DIR/train validation.root=DIR

Stochastic depth and clipping as in its configs/simba/simba_l.py.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import ModelConfig, TrainConfig, load_recipe


def imagenet_simba_large() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_simba_small.py"))
    model = ModelConfig(name="simba_large", drop_path_rate=0.3)
    return replace(recipe, model=model, optimiser=replace(recipe.optimiser, clip_norm=1.0))
