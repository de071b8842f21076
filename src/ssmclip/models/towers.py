"""The towers of a model: how to find them, set their image size, and make inputs for them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "LOGITS",
    "Size",
    "as_size",
    "behaviour",
    "encode_image",
    "has_attention",
    "image_dtype",
    "image_tower",
    "is_clip",
    "logit_scale",
    "patch_size",
    "set_image_size",
    "tokens_of",
    "tower_parameters",
]

ACTIVATIONS = ("elu", "gelu", "silu", "relu", "tanh", "swish", "mish")  # how names of their classes end
LOGITS = ("logit_scale", "logit_bias")  # parameters of a CLIP that belong to neither tower
Size = tuple[int, int]  # height, width in pixels


def as_size(image_size: int | Size) -> Size:
    """Return (height, width). Raises ValueError for a side that is not a positive whole number of pixels."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size must be pixels, or (height, width), all above 0 (got {image_size!r})")
    return sides


def set_image_size(model: nn.Module, size: Size) -> None:
    """Make a model accept images of this size, if any part of it depends on the size (positions, windows).

    Raises ValueError for a size that its patches do not divide.
    """
    tower = image_tower(model)
    if patch := patch_size(tower):
        wrong = [side for side, step in zip(size, patch, strict=True) if side % step]
        if wrong:
            near = [step * (side // step + more) for side, step in zip(size, patch, strict=True) for more in (0, 1)]
            near = ", ".join(map(str, sorted({side for side in near if side})))
            raise ValueError(
                f"the image size must be a multiple of the patch, {patch[0]} (got {size[0]} x {size[1]}): try {near}"
            )
    target = tower if hasattr(tower, "set_input_size") else getattr(model, "visual", model)
    if hasattr(target, "set_input_size"):
        try:
            target.set_input_size(size)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"{type(tower).__name__} cannot take images of {size[0]} x {size[1]}: {error}") from error


def image_tower(model: nn.Module) -> nn.Module:
    """Return the image encoder of a CLIP (timm's model if it is one), or any other model itself."""
    visual = getattr(model, "visual", model)
    return getattr(visual, "trunk", visual)


def behaviour(network: nn.Module) -> dict[str, str]:
    """Return what shapes of weights do not show, by name within a CLIP: attention heads, and classes of activations.

    An image encoder's names are those that it would have as a CLIP's tower.
    """
    shown = {}
    for name, module in network.named_modules():
        place = name.removeprefix("text.") if hasattr(network, "encode_text") else f"visual.trunk.{name}"
        if isinstance(getattr(module, "num_heads", None), int):
            shown[place] = f"{module.num_heads} heads"
        if (kind := type(module).__name__).lower().endswith(ACTIVATIONS):
            shown[place] = kind
    return shown


def patch_size(tower: nn.Module) -> Size | None:
    """Return the (height, width) of a vision transformer's patches, None for another kind of encoder."""
    if not has_attention(tower):
        return None
    patch = getattr(getattr(tower, "patch_embed", None), "patch_size", getattr(tower, "patch_size", None))
    return patch if patch is None else as_size(patch if isinstance(patch, int) else tuple(patch))


def has_attention(module: nn.Module) -> bool:
    """Return whether the model has attention layers, by the names that timm, open_clip and PyTorch give them."""
    return any("attention" in type(child).__name__.lower() for child in module.modules())


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """Return a CLIP's image features, or any other model's output."""
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)


def tower_parameters(model: nn.Module, kind: str) -> list[nn.Parameter]:
    """Return the parameters of the image tower ("image"), or all others but the logits' scale and bias ("text")."""
    if not is_clip(model):
        return list(model.parameters())
    image = {id(p) for p in model.visual.parameters()}
    logits = {id(getattr(model, name, None)) for name in LOGITS}
    return [p for p in model.parameters() if (id(p) in image) == (kind == "image") and id(p) not in logits]


def image_dtype(model: nn.Module) -> torch.dtype:
    """Return the type of the numbers that a model's layers take: of its first weight that is no scale of logits."""
    weights = [p for name, p in model.named_parameters() if name.rpartition(".")[2] not in LOGITS]
    return (weights or list(model.parameters()))[0].dtype


def is_clip(model: nn.Module) -> bool:
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def logit_scale(model: nn.Module) -> float:
    """Return what a CLIP multiplies its cosine similarities by before the softmax, 1 for a model without a scale."""
    scale = getattr(model, "logit_scale", None)
    return 1.0 if scale is None else float(scale.detach().exp())


def tokens_of(model: nn.Module, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Return texts of `length` tokens, (batch, length), each ending with the highest, where CLIP's text towers pool.

    Raises ValueError for a length the text tower has no positions for, for 0, and for a model that does not say how
    many tokens it knows, such as CoCa.
    """
    if length < 1:
        raise ValueError(f"the text length must be at least 1 (got {length})")
    if (vocabulary := getattr(model, "vocab_size", None)) is None:
        raise ValueError(
            f"{type(model).__name__} has no vocab_size, so texts for it cannot be generated: leave text_length out"
        )
    tokens = torch.arange(length, device=device) % (vocabulary - 2) + 1
    tokens[-1] = vocabulary - 1
    return tokens.expand(batch, length).contiguous()
