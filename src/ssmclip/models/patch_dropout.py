"""Patch dropout: in training a vision transformer sees a random part of each image (FLIP, arXiv:2212.00794)."""

from __future__ import annotations

from open_clip.transformer import PatchDropout as OpenClipPatchDropout
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import nn

from ssmclip.models.towers import image_tower

__all__ = ["set_patch_dropout"]


def set_patch_dropout(model: nn.Module, rate: float) -> None:
    """Make the image tower leave out a share of an image's patches, drawn for each image, in training mode only.

    rate: share of the patches, at least 0 and below 1; one patch always remains, and so do class and register tokens.
    Patches keep the positions that they have in the whole image. Weights and their names stay as they are.
    Raises ValueError for a tower that is not a timm or open_clip vision transformer: others need every patch.
    """
    tower = image_tower(model)
    if isinstance(tower, OpenClipViT):
        tower.patch_dropout = OpenClipPatchDropout(rate)
    elif type(getattr(tower, "patch_drop", None)) in (nn.Identity, PatchDropout) and isinstance(tower, TimmViT):
        in_order = getattr(tower, "mixing", "full") == "causal"  # the order of the patches matters there
        tower.patch_drop = PatchDropout(rate, tower.num_prefix_tokens, ordered=in_order)
    else:
        raise ValueError(
            f"model.patch_drop_rate must be none for {type(tower).__name__}, which needs every patch (got {rate}): "
            "choose a vision transformer, such as CLIP-ViT-B-16"
        )
