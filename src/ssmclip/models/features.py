"""A CLIP's image features before their projection."""

from __future__ import annotations

from open_clip.transformer import VisionTransformer as OpenClipViT
from torch import Tensor, nn

from ssmclip.models.towers import image_tower

__all__ = ["feature_width", "image_features"]


def feature_width(model: nn.Module) -> int:
    """Return how many image features a CLIP has before its projection. Raises ValueError where they are not known."""
    tower = image_tower(model)
    if isinstance(tower, OpenClipViT) and tower.attn_pool is None:
        return tower.proj.shape[0]
    head = getattr(model.visual, "head", None)
    if hasattr(model.visual, "trunk") and (hasattr(head, "proj") or hasattr(head, "mlp")) and not hasattr(head, "pool"):
        return head.proj.in_features if hasattr(head, "proj") else head.mlp.fc1.in_features
    raise ValueError(
        f"{type(tower).__name__} has no features between its pooling and its projection: choose a tower of timm's or "
        "this package's, or open_clip's vision transformer"
    )


def image_features(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return a CLIP's image features (B, D) before its projection, and after it (B, E), neither normalised.

    Of models that `feature_width` takes.
    """
    tower = image_tower(model)
    if isinstance(tower, OpenClipViT):
        pooled, _ = tower._pool(tower.transformer(tower._embeds(images)))
        return pooled, pooled @ tower.proj
    pooled = tower(images)
    return pooled, model.visual.head(pooled)
