"""The towers of a model: which they are, at which image sizes they work, and what goes into them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "Size",
    "as_size",
    "encode_image",
    "has_attention",
    "image_tower",
    "is_clip",
    "patch_size",
    "set_image_size",
    "tokens_of",
    "tower_parameters",
]

Size = tuple[int, int]  # height, width in pixels


def as_size(image_size: int | Size) -> Size:
    """(height, width). Raises ValueError for a side that is not a positive whole number of pixels."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size {image_size!r}: pixels, or (height, width), all above 0")
    return sides


def set_image_size(model: nn.Module, size: Size) -> None:
    """Make a model take images of this size, where it has anything that depends on it (positions, windows).

    Raises ValueError for a size that its patches do not divide.
    """
    tower = image_tower(model)
    if patch := patch_size(tower):
        wrong = [side for side, step in zip(size, patch, strict=True) if side % step]
        if wrong:
            near = [step * (side // step + more) for side, step in zip(size, patch, strict=True) for more in (0, 1)]
            near = ", ".join(map(str, sorted({side for side in near if side})))
            raise ValueError(f"image size {size[0]} x {size[1]} is no multiple of the patch, {patch[0]}: take {near}")
    target = tower if hasattr(tower, "set_input_size") else getattr(model, "visual", model)
    if hasattr(target, "set_input_size"):
        try:
            target.set_input_size(size)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"{type(tower).__name__} cannot take images of {size[0]} x {size[1]}: {error}") from error


def image_tower(model: nn.Module) -> nn.Module:
    """The image encoder of a CLIP (timm's own where it is one), any other model itself."""
    visual = getattr(model, "visual", model)
    return getattr(visual, "trunk", visual)


def patch_size(tower: nn.Module) -> Size | None:
    """(height, width) of the patches of a transformer over patches, None for an encoder of another kind."""
    if not has_attention(tower):
        return None
    patch = getattr(getattr(tower, "patch_embed", None), "patch_size", getattr(tower, "patch_size", None))
    return patch if patch is None else as_size(patch if isinstance(patch, int) else tuple(patch))


def has_attention(module: nn.Module) -> bool:
    """Whether some layer of it attends: known by the names that timm, open_clip and PyTorch give such layers."""
    return any("attention" in type(child).__name__.lower() for child in module.modules())


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """A CLIP's image features, any other model's output."""
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)


def tower_parameters(model: nn.Module, kind: str) -> list[nn.Parameter]:
    """Of the image tower ("image") or of all the rest but the logits' scale and bias ("text"); of no CLIP, all."""
    if not is_clip(model):
        return list(model.parameters())
    image = {id(p) for p in model.visual.parameters()}
    logits = {id(getattr(model, name, None)) for name in ("logit_scale", "logit_bias")}
    return [p for p in model.parameters() if (id(p) in image) == (kind == "image") and id(p) not in logits]


def is_clip(model: nn.Module) -> bool:
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def tokens_of(model: nn.Module, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Texts of `length` tokens, (batch, length), the last of each the highest: where CLIP's text towers look.

    Raises ValueError for a length the text tower has no positions for, for 0, and for a model that does not say how
    many tokens it knows, such as CoCa.
    """
    if length < 1:
        raise ValueError(f"texts of {length} tokens: a text has at least 1")
    if (vocabulary := getattr(model, "vocab_size", None)) is None:
        raise ValueError(
            f"{type(model).__name__} has no vocab_size, texts for it cannot be made; leave text_length out"
        )
    tokens = torch.arange(length, device=device) % (vocabulary - 2) + 1
    tokens[-1] = vocabulary - 1
    return tokens.expand(batch, length).contiguous()
