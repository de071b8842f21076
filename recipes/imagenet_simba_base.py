"""SiMBA-B on ImageNet-1k, by SiMBA's recipe: imagenet_simba_small.py with another model.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_simba_base.py \\
        --set source=DIR/train validation.root=DIR

Rates as in its configs/simba/simba_b.py.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import ModelConfig, TrainConfig, load_recipe


def imagenet_simba_base() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_simba_small.py"))
    model = ModelConfig(name="simba_base", drop_path_rate=0.1)
    return replace(recipe, model=model)
