"""An attention control for small budgets: a plain ViT as large as VMamba-Nano, at any image size.

Patches of 16 as in the papers' ViT-B/16: then parameters and, at every image size, multiplications are about equal.
"""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

__all__ = ["vit_nano_patch16"]

default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch16": dict(
            url="",
            num_classes=1000,
            input_size=(3, 96, 96),
            fixed_input_size=False,  # positions are interpolated to whatever comes
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj",
            classifier="head",
            license="mit",
        )
    }
)


@register_model
def vit_nano_patch16(pretrained: bool = False, **kwargs) -> torch.nn.Module:
    """Return a ViT: patches of 16, width 192, depth 6, 3 heads.

    Positions are interpolated as timm does (`dynamic_img_size`), images
    filled up with zeros to a multiple of 16 (`dynamic_img_pad`).
    """
    settings = dict(img_size=96, patch_size=16, embed_dim=192, depth=6, num_heads=3, global_pool="avg")
    settings |= dict(dynamic_img_size=True, dynamic_img_pad=True)
    return build_model_with_cfg(VisionTransformer, "vit_nano_patch16", pretrained, **{**settings, **kwargs})
