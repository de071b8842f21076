"""ViT-S/16, the attention control, on ImageNet-1k, by MambaOut's recipe: imagenet_mambaout_tiny.py with another model.

    accelerate launch --multi_gpu --num_processes 8 -m ssmclip train recipes/imagenet_vit_small.py \\
        --set source=DIR/train validation.root=DIR

DeiT's architecture (Touvron et al. 2021, arXiv:2012.12877), in MambaOut's recipe so that only the model differs.
DeiT's own recipe, with repeated augmentation and a moving average, gives 79.8 % top-1. `--set
model.changes='{"mixing": "causal"}'` makes its attention causal, as in figure 3b of MambaOut's paper.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import ModelConfig, TrainConfig, load_recipe


def imagenet_vit_small() -> TrainConfig:
    recipe = load_recipe(Path(__file__).with_name("imagenet_mambaout_tiny.py"))
    return replace(recipe, model=ModelConfig(name="vit_small_patch16", drop_path_rate=0.1))
