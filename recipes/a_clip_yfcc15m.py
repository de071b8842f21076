"""A-CLIP's ViT-B/16 on YFCC15M: two views of each image, of which the moving average hides half.

    torchrun --nproc-per-node 64 -m ssmclip train recipes/a_clip_yfcc15m.py \\
        --set source='DIR/{00000..01468}.tar' --out runs/a_clip

As the paper describes it (Yang et al. 2023, arXiv:2212.08653); what its code does otherwise is listed in
src/ssmclip/train/self_supervised/a_clip.py. Published: 43.9 % zero-shot on ImageNet after 25 epochs, 41.3 % without the
two self-supervised losses (`--set loss.ssl.weight=0 ema_weight=0`), 38.0 % with random blocks in place of the attended
ones (`mask.choice=random` too), 37.6 % for CLIP. 1.16 times CLIP's cost. Nobody has run it with this package; on
one process `ssmclip train recipes/a_clip_yfcc15m.py` starts it.
"""

from dataclasses import replace
from pathlib import Path

from ssmclip.config import LossConfig, ModelConfig, TrainConfig, load_recipe


def a_clip_yfcc15m() -> TrainConfig:
    base = load_recipe(Path(__file__).with_name("yfcc15m.py"))
    return replace(
        base,
        model=ModelConfig(name="CLIP-ViT-B-16", grad_checkpointing=True),
        data=replace(base.data, views_per_image=2),
        loss=LossConfig(kind="a-clip"),
    )
