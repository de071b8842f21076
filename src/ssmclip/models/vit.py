"""The attention control for small budgets: a plain ViT in VMamba-Nano's size, at any resolution its patches divide."""

from __future__ import annotations

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

__all__ = ["vit_nano_patch8"]

default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch8": dict(
            url="",
            num_classes=1000,
            input_size=(3, 64, 64),
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
def vit_nano_patch8(pretrained: bool = False, **kwargs) -> torch.nn.Module:
    """Patches of 8, width 192, depth 6, 3 heads; positions interpolated as timm does (`dynamic_img_size`)."""
    settings = dict(
        img_size=64, patch_size=8, embed_dim=192, depth=6, num_heads=3, global_pool="avg", dynamic_img_size=True
    )
    return build_model_with_cfg(VisionTransformer, "vit_nano_patch8", pretrained, **{**settings, **kwargs})
