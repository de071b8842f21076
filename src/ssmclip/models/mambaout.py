"""MambaOut, the encoder without a state-space model, as a tower: timm's own, with a linear head.

Yu and Wang 2025, "MambaOut: Do We Really Need Mamba for Vision?" (arXiv:2405.07992): Mamba's block less its scan is a
gated convolution. timm's head has a hidden layer, so that its output without classes is four times as wide as
`num_features`, and fitted to ImageNet's classes. Here the head is mean -> LN -> Linear: without classes it gives
`num_features` features, as a CLIP tower must.
"""

from __future__ import annotations

import timm
from timm.models import register_model
from torch import nn

from ssmclip.models.registration import take_fields

__all__ = ["SIZES"]

SIZES = ("femto", "kobe", "tiny", "small", "base")


def _register(size: str) -> None:
    original = f"mambaout_{size}"

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        model = timm.create_model(original, pretrained=pretrained, **take_fields(kwargs))
        if hasattr(model, "head"):  # features_only leaves none
            model.head.pre_logits = nn.Identity()
            model.head.num_features = model.num_features
            model.reset_classifier(model.num_classes)
        return model

    entrypoint.__name__ = f"{original}_linear_head"
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = f"timm's {original}, its keys and arguments; head: mean -> LN -> Linear, new where pretrained."
    register_model(entrypoint)


for _size in SIZES:
    _register(_size)
