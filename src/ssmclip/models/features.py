"""A CLIP's image features before their projection, of images of which parts are masked, and which parts matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from open_clip.transformer import VisionTransformer as OpenClipViT
from timm.models.vision_transformer import Attention
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor, nn

from ssmclip.models.towers import image_tower, patch_size

__all__ = ["drops_tokens", "feature_width", "features_and_saliency", "image_features", "masked_features"]


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
    return _features(model, images, lambda tower: tower(images))


def _features(model: nn.Module, images: Tensor, features: Callable[[nn.Module], Tensor]) -> tuple[Tensor, Tensor]:
    tower = image_tower(model)
    if isinstance(tower, OpenClipViT):
        pooled, _ = tower._pool(tower.transformer(tower._embeds(images)))
        return pooled, pooled @ tower.proj
    pooled = features(tower)
    return pooled, model.visual.head(pooled)


# ---- masked images


def masked_features(model: nn.Module, images: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return what `image_features` does of images of which only some blocks are seen. Raises ValueError.

    keep: bool (B, rows, columns), equally many true for each image; None: all. A vision transformer computes the tokens
    of these blocks alone, with their own positions. Encoders of maps, such as VMamba and MambaOut, have no tokens to
    leave out: the other blocks of the image are grey there, of the mean colour, which takes as long as the whole image.
    """
    if keep is None:
        return image_features(model, images)
    tower, (height, width) = image_tower(model), images.shape[-2:]
    if not drops_tokens(tower):
        return image_features(model, images * enlarged(keep, height, width)[:, None])
    patch = patch_size(tower)
    tokens = enlarged(keep, height // patch[0], width // patch[1]).flatten(1)
    kept = tokens.float().topk(int(tokens[0].sum()), dim=1).indices.sort(dim=1).values
    with _keeping(tower, kept):
        return image_features(model, images)


def enlarged(mask: Tensor, height: int, width: int) -> Tensor:
    """Return a mask (B, rows, columns) at a multiple of its size. Raises ValueError for another size."""
    rows, columns = mask.shape[1:]
    if height % rows or width % columns:
        raise ValueError(f"a mask of {rows} x {columns} blocks must divide {height} x {width} evenly")
    return mask.repeat_interleave(height // rows, 1).repeat_interleave(width // columns, 2)


def drops_tokens(tower: nn.Module) -> bool:
    """Return whether an image encoder is a vision transformer that can leave tokens out."""
    return isinstance(tower, TimmViT | OpenClipViT)


def prefix_tokens(tower: nn.Module) -> int:
    """Return how many tokens of a vision transformer come before those of the patches: class and registers."""
    return 1 if isinstance(tower, OpenClipViT) else getattr(tower, "num_prefix_tokens", 0)


@contextmanager
def _keeping(tower: nn.Module, kept: Tensor) -> Iterator[None]:
    """Leave out all patches but those of the numbers (B, K), after positions were added to them."""
    prefix = prefix_tokens(tower)

    def hook(_: nn.Module, __: object, tokens: Tensor) -> Tensor:
        patches = tokens[:, prefix:]
        chosen = patches.gather(1, kept[:, :, None].expand(-1, -1, patches.shape[2]))
        return torch.cat([tokens[:, :prefix], chosen], 1)

    module = tower.patch_dropout if isinstance(tower, OpenClipViT) else tower.patch_drop
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


# ---- which parts matter


def features_and_saliency(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the image features (B, D) before the projection, and how much each part matters to them (B, h, w).

    Of a vision transformer with plain attention: the attention that the pooled tokens (the class token, or all patches)
    pay to each patch, the mean over all layers and heads. Of any other encoder, as scans have no attention: how much
    each position of the last map contributes to the mean over positions that is pooled, its product with that mean over
    the number of positions; they add up to the mean's squared length. Neither needs a gradient.
    """
    tower = image_tower(model)
    if not _attention_layers(tower):
        saliency: list[Tensor] = []
        features, _ = _features(model, images, lambda tower: _by_share(tower, images, saliency))
        return features, saliency[0]
    height, width = (-(-side // patch) for side, patch in zip(images.shape[-2:], patch_size(tower), strict=True))
    with _watching(tower) as rows:
        features, _ = image_features(model, images)
    attention = torch.stack(rows).mean(0)
    return features, attention.reshape(len(images), height, width)


def _by_share(tower: nn.Module, images: Tensor, saliency: list[Tensor]) -> Tensor:
    last = tower.forward_features(images)
    saliency.append(_share_of_mean(tower, last, images))
    return tower.forward_head(last)


def _share_of_mean(tower: nn.Module, last: Tensor, images: Tensor) -> Tensor:
    last = last.float()
    if last.ndim == 3:  # tokens
        last = last[:, prefix_tokens(tower) :]
        rows = round((last.shape[1] * images.shape[-2] / images.shape[-1]) ** 0.5)
        last = last.reshape(len(last), rows, -1, last.shape[2])
    elif str(getattr(tower, "output_fmt", "NCHW")) != "NHWC":
        last = last.permute(0, 2, 3, 1)
    return (last * last.mean(dim=(1, 2), keepdim=True)).sum(-1) / (last.shape[1] * last.shape[2])


def _attention_layers(tower: nn.Module) -> list[nn.Module]:
    """Return a vision transformer's attention layers, [] for another encoder and for attention of another kind."""
    if not drops_tokens(tower):
        return []
    blocks = tower.transformer.resblocks if isinstance(tower, OpenClipViT) else getattr(tower, "blocks", [])
    layers = [getattr(block, "attn", None) for block in blocks]
    return layers if all(type(layer) in (Attention, nn.MultiheadAttention) for layer in layers) else []


@contextmanager
def _watching(tower: nn.Module) -> Iterator[list[Tensor]]:
    """Collect each layer's attention to the patches (B, patches) of what runs inside, though it be fused."""
    prefix, rows, handles = prefix_tokens(tower), [], []
    pooled = getattr(tower, "pool_type", None) or getattr(tower, "global_pool", "token")
    queries = slice(0, 1) if pooled in ("tok", "token") else slice(prefix, None)

    def note(query: Tensor, key: Tensor) -> None:
        """query, key (B, heads, tokens, width)."""
        scores = query[:, :, queries].float() @ key.float().transpose(-2, -1) * query.shape[-1] ** -0.5
        rows.append(scores.softmax(-1).mean(dim=(1, 2))[:, prefix:])

    for layer in _attention_layers(tower):
        if isinstance(layer, Attention):
            handles.append(layer.qkv.register_forward_hook(_timms(layer, note)))
        else:
            handles.append(layer.register_forward_pre_hook(_torchs(layer, note)))
    try:
        yield rows
    finally:
        for handle in handles:
            handle.remove()


def _timms(layer: Attention, note: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, __: object, qkv: Tensor) -> None:
        query, key, _ = qkv.unflatten(2, (3, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        note(layer.q_norm(query), layer.k_norm(key))

    return hook


def _torchs(layer: nn.MultiheadAttention, note: Callable[[Tensor, Tensor], None]) -> Callable[..., None]:
    def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0] if layer.batch_first else inputs[0].transpose(0, 1)
        width = layer.embed_dim
        both = nn.functional.linear(x, layer.in_proj_weight[: 2 * width], layer.in_proj_bias[: 2 * width])
        query, key = both.unflatten(2, (2, layer.num_heads, layer.head_dim)).permute(2, 0, 3, 1, 4).unbind(0)
        note(query, key)

    return hook
