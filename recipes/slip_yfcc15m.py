"""SLIP's ViT-B/16 on YFCC15M: CLIP's loss, and SimCLR's between two further views of each image.

    torchrun --nproc-per-node 64 -m ssmclip train recipes/slip_yfcc15m.py \\
        --set source='DIR/{00000..01468}.tar' --out runs/slip

As its published code has it (Mu et al. 2021, arXiv:2112.12750): three views of each image pass through the tower, that
of the text only cropped; no moving average; CLIP's features are gathered without gradient. Published: 42.8 % zero-shot
on ImageNet after 25 epochs, 37.6 % without the further views at a rate of 5e-4 and weight decay 0.5. 2.7 times CLIP's
cost. Nobody has run it with this package; on one process `ssmclip train recipes/slip_yfcc15m.py` starts it.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import AugmentConfig, EmaConfig, LossConfig, ModelConfig, TrainConfig, load_recipe


def slip_yfcc15m() -> TrainConfig:
    base = load_recipe(Path(__file__).with_name("yfcc15m.py"))
    return replace(
        base,
        model=ModelConfig(name="CLIP-ViT-B-16", grad_checkpointing=True),
        data=replace(base.data, augment=AugmentConfig(scale=(0.5, 1.0), interpolation="bilinear")),
        optimiser=replace(base.optimiser, lr=3e-3, weight_decay=0.1),
        loss=LossConfig(kind="slip", gather_with_grad=False),
        ema=EmaConfig(),
    )
