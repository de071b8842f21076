"""The last features of an encoder at every position of its map, and what its head makes of one position alone.

b pictures · h w positions · c channels · d numbers a tower gives: embedding dimensions, or logits
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import VisionTransformer
from torch import Tensor, nn

from ssmclip.models.towers import Size, image_tower

__all__ = ["LastMap", "embed_positions", "evaluating", "grid_of", "last_map", "to_map"]

ChannelsAt = Literal["last", "first"]


@dataclass(frozen=True)
class LastMap:
    """features: those of every position; embed: what follows them in the tower, applied to one position alone.

    A tower that averages its positions and is linear from there on embeds the picture as the mean of what it embeds
    its positions as. Where it is not (a norm after the mean, attention, a class token) this is how MaskCLIP and class
    activation maps read it all the same (Zhou et al. 2022, arXiv:2112.01071; Zhou et al. 2016, arXiv:1512.04150).
    """

    features: Float[Tensor, "b h w c"]
    embed: Callable[[Float[Tensor, "p c"]], Float[Tensor, "p d"]]


def embed_positions(network: nn.Module, images: Float[Tensor, "b 3 y x"]) -> Float[Tensor, "b h w d"]:
    """Return what the image tower makes of each position alone: embeddings of a CLIP, logits of a classifier.

    Raises ValueError for a tower whose positions cannot be told apart.
    """
    found = last_map(network, images)
    b, h, w, _ = found.features.shape
    embedded = found.embed(rearrange(found.features, "b h w c -> (b h w) c"))
    if embedded.ndim != 2:
        raise ValueError(f"{type(network).__name__} does not pool its positions: give it a head or a pooling")
    return rearrange(embedded, "(b h w) d -> b h w d", b=b, h=h, w=w)


def last_map(network: nn.Module, images: Float[Tensor, "b 3 y x"]) -> LastMap:
    """Return the last map of the image tower of a CLIP, or of an image encoder of timm's interface.

    Raises ValueError for a tower without a map, and for an attention pooling with positions of its own.
    """
    visual = getattr(network, "visual", network)
    if isinstance(visual, VisionTransformer):
        return _of_open_clip(visual, images)
    if isinstance(visual, ModifiedResNet):
        return _of_modified_resnet(visual, images)
    trunk = image_tower(network)
    if not hasattr(trunk, "forward_features") or not hasattr(trunk, "forward_head"):
        raise ValueError(
            f"{type(trunk).__name__} has no map of positions that can be found: the image tower must be open_clip's "
            "own or have timm's forward_features and forward_head"
        )
    return _of_timm(trunk, getattr(visual, "head", None) if visual is not trunk else None, images)


def _of_open_clip(visual: VisionTransformer, images: Tensor) -> LastMap:
    if visual.attn_pool is not None:
        raise ValueError("a vision transformer with open_clip's attention pooling has no embedding of one position")
    how = dict(indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NCHW")
    (features,) = visual.forward_intermediates(images, **how)["image_intermediates"]

    def embed(positions: Tensor) -> Tensor:
        return positions if visual.proj is None else positions @ visual.proj

    return LastMap(rearrange(features, "b c h w -> b h w c"), embed)


def _of_modified_resnet(visual: ModifiedResNet, images: Tensor) -> LastMap:
    """CLIP's ResNet pools with one attention layer, which gives a position alone its value, projected."""
    features = visual.forward_intermediates(images, indices=1, intermediates_only=True)["image_intermediates"][0]
    pool = visual.attnpool
    return LastMap(rearrange(features, "b c h w -> b h w c"), lambda positions: pool.c_proj(pool.v_proj(positions)))


def _of_timm(trunk: nn.Module, head: nn.Module | None, images: Tensor) -> LastMap:
    if head is not None and hasattr(head, "pool"):
        raise ValueError(f"the attention pooling after {type(trunk).__name__} has no embedding of one position")
    features = trunk.forward_features(images)
    as_input = _tokens(trunk) if features.ndim == 3 else _maps(_channels_at(trunk))

    def embed(positions: Tensor) -> Tensor:
        try:
            made = trunk.forward_head(as_input(positions))
        except (IndexError, RuntimeError) as error:
            raise ValueError(f"the head of {type(trunk).__name__} does not take one position alone: {error}") from error
        return made if head is None else head(made)

    return LastMap(rearrange(to_map(features, trunk, images.shape[-2:]), "b c h w -> b h w c"), embed)


def _tokens(trunk: nn.Module) -> Callable[[Tensor], Tensor]:
    """Positions -> sequences of one, behind as many empty class tokens as the head leaves out."""
    prefix = getattr(trunk, "num_prefix_tokens", 0)
    # The class token's place is that of the position itself; pooling that includes the prefix sees nothing else.
    if getattr(trunk, "global_pool", "") == "token" or getattr(trunk, "pool_include_prefix", False):
        prefix = 0
    return lambda positions: F.pad(positions[:, None], (0, 0, prefix, 0))


def _maps(channels_at: ChannelsAt) -> Callable[[Tensor], Tensor]:
    if channels_at == "last":
        return lambda positions: positions[:, None, None]
    return lambda positions: positions[:, :, None, None]


def _channels_at(trunk: nn.Module) -> ChannelsAt:
    return "last" if getattr(trunk, "output_fmt", "NCHW") == "NHWC" else "first"


def to_map(
    features: Tensor, tower: nn.Module, image: Size | torch.Size, layer: nn.Module | None = None
) -> Float[Tensor, "b c h w"]:
    """Return a layer's output as a map, channels first, without class tokens.

    features: (b, tokens, c), or a map with its channels where the tower has them, or first behind a convolution;
    image: height and width of the tower's input. Raises ValueError for anything else.
    """
    if features.ndim == 3:
        prefix = 1 if isinstance(tower, VisionTransformer) else getattr(tower, "num_prefix_tokens", 0)
        tokens = features[:, prefix:]
        height, width = grid_of(tokens.shape[1], image)
        return rearrange(tokens, "b (h w) c -> b c h w", h=height, w=width)
    if features.ndim != 4:
        raise ValueError(
            f"a layer must give maps (b, c, h, w) or (b, h, w, c), or tokens (b, n, c) (got {tuple(features.shape)})"
        )
    first = isinstance(layer, nn.Conv2d | nn.BatchNorm2d) or _channels_at(tower) == "first"
    return features if first else rearrange(features, "b h w c -> b c h w")


def grid_of(count: int, image: Size | torch.Size) -> tuple[int, int]:
    """Return the height and width of a map of `count` positions over an image of this height and width.

    Raises ValueError if no such map is nearly as wide for its height as the image.

    >>> grid_of(49, (224, 224)), grid_of(70, (97, 160))
    ((7, 7), (7, 10))
    """
    height, width = image

    def distortion(h: int) -> float:
        return abs(math.log((h / (count // h)) / (height / width)))

    best = min((h for h in range(1, count + 1) if count % h == 0), key=distortion, default=0)
    # A part of a position too many, at either side, changes the shape by less than a factor of 2.
    if not best or distortion(best) >= math.log(2):
        raise ValueError(f"{count} positions do not form a map over an image of {height} x {width}")
    return best, count // best


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Enter evaluation mode, with gradients of the input alone; modes and parameters are restored afterwards."""
    modes = {module: module.training for module in network.modules()}
    learning: list[Any] = [p for p in network.parameters() if p.requires_grad]
    network.eval()
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        with torch.enable_grad():
            yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
        for module, training in modes.items():
            module.training = training
