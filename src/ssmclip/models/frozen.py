"""Features of a frozen image encoder, for a probe: what stands before its last linear layer, or behind it.

    pooled       before the projection into the space that images and texts share, or before the classifier. CLIP's
                 probes take these (Radford et al. 2021, A.3), as do those of SLIP and CLIP-Mamba
    embedding    behind the projection: what zero-shot classification compares with texts

A tower whose pooling is its projection, such as the attention pooling of CLIP's ResNets, has only the latter for both.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

from torch import Tensor, nn

from ssmclip.models.towers import is_clip
from ssmclip.registry import Registry

__all__ = ["FEATURES", "POOLED", "FeatureEncoder"]

POOLED = "pooled"
PROJECTIONS = ("proj", "mlp")  # in the head that open_clip gives timm's models

FEATURES: Registry[Callable[[nn.Module], nn.Module]] = Registry("kind of features")


class FeatureEncoder(nn.Module):
    """A frozen tower whose `encode_image` returns features (batch, width) of one of the FEATURES, not normalised.

    It shares its weights with the network, which is left as it is. Raises UnknownName, and ValueError for a network
    without such features.
    """

    def __init__(self, network: nn.Module, kind: str = POOLED):
        super().__init__()
        self.tower = FEATURES[kind](network)

    def encode_image(self, images: Tensor) -> Tensor:
        features = self.tower(images)
        features = features[0] if isinstance(features, tuple) else features  # open_clip's towers that return tokens too
        if features.ndim != 2:
            raise ValueError(
                f"{type(self.tower).__name__} returns features of shape {tuple(features.shape)}, not one vector for "
                "each image: it cannot be probed"
            )
        return features


@FEATURES.register(POOLED)
def pooled(network: nn.Module) -> nn.Module:
    """Return a tower without its projection, or an encoder without its classifier."""
    visual = getattr(network, "visual", None)
    if not is_clip(network) or visual is None:
        return _BeforeHead(network)
    if hasattr(visual, "trunk"):
        return _without_timm_projection(visual)
    return _without_parameter(visual, "proj")


@FEATURES.register("embedding")
def embedding(network: nn.Module) -> nn.Module:
    """Return a tower with its projection. Raises ValueError for an encoder, which has none."""
    if not is_clip(network):
        raise ValueError(
            f"only a CLIP has the features embedding (got {type(network).__name__}, an image encoder): take {POOLED}"
        )
    return _Embedding(network)


class _BeforeHead(nn.Module):
    """A model of timm's interface up to its classifier."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        if not (hasattr(encoder, "forward_features") and hasattr(encoder, "forward_head")):
            raise ValueError(
                f"{type(encoder).__name__} has no forward_features and forward_head: its features before the "
                "classifier are not known"
            )
        self.encoder = encoder

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder.forward_head(self.encoder.forward_features(images), pre_logits=True)


class _Embedding(nn.Module):
    def __init__(self, clip: nn.Module):
        super().__init__()
        self.clip = clip

    def forward(self, images: Tensor) -> Tensor:
        return self.clip.encode_image(images)


def _without_timm_projection(visual: nn.Module) -> nn.Module:
    """Return open_clip's wrapper of a timm model without its projection, which may be the model's own classifier."""
    kept = OrderedDict((name, layer) for name, layer in visual.head.named_children() if name not in PROJECTIONS)
    bare = copy.copy(visual)
    bare._modules = {**visual._modules, "head": nn.Sequential(kept)}
    if not len(visual.head):
        bare._modules["trunk"] = _BeforeHead(visual.trunk)
    return bare


def _without_parameter(visual: nn.Module, name: str) -> nn.Module:
    """Return a tower whose projection, a parameter or None, is None."""
    if visual._parameters.get(name) is None:
        return visual
    bare = copy.copy(visual)
    bare._parameters = {**visual._parameters, name: None}
    return bare
