"""MambaOut, the encoder without a state-space model, as a tower: timm's own, with a linear head.

Yu and Wang 2025, "MambaOut: Do We Really Need Mamba for Vision?" (arXiv:2405.07992): Mamba's block less its scan is a
gated convolution. timm's head has a hidden layer, so that its output without classes is four times as wide as
`num_features`, and fitted to ImageNet's classes. Here the head is mean -> LN -> Linear: without classes it gives
`num_features` features, as a CLIP tower must.

MambaOut-Nano is this package's: for small budgets, parameters and, at every image size, multiplications within one
percent of VMamba-Nano's.
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import load_pretrained, register_model
from timm.models.mambaout import checkpoint_filter_fn as name_as_timm
from torch import Tensor, nn

from ssmclip.models.networks.registration import default_cfg, take_fields

__all__ = ["SIZES"]

# size: the fields that make it of timm's smallest, none for a size of timm's own
SIZES: dict[str, dict[str, Any]] = {
    # VMamba-Nano's widths but for the last; a block has 8 D^2 weights, not 10 D^2, so there are more of them.
    "nano": dict(depths=(1, 1, 6, 1), dims=(40, 80, 160, 336)),
    **{size: {} for size in ("femto", "kobe", "tiny", "small", "base")},
}


def _register(size: str, fields: dict[str, Any]) -> None:
    original, name = "mambaout_femto" if fields else f"mambaout_{size}", f"mambaout_{size}_linear_head"
    # Instead of what timm knows of its own, the place of weights included.
    none = dict(architecture=name, hf_hub_id=None, tag=None, test_input_size=None)
    cfg = default_cfg(first_conv="stem.conv1", classifier="head.fc") | none if fields else {}

    def entrypoint(pretrained: bool = False, **kwargs) -> nn.Module:
        kwargs = {**fields, **take_fields(kwargs)}
        usual = cfg if kwargs.get("pretrained_cfg") is None else {}  # what is given, such as a folder's, is whole
        kwargs["pretrained_cfg_overlay"] = {**usual, **(kwargs.get("pretrained_cfg_overlay") or {})}
        if kwargs.get("features_only"):  # no head
            return timm.create_model(original, pretrained=pretrained, **kwargs)
        model = timm.create_model(original, **kwargs)
        model.head.pre_logits = nn.Identity()
        model.head.num_features = model.head_hidden_size = model.num_features
        model.reset_classifier(model.num_classes)
        model.pretrained_cfg = model.default_cfg = {**model.pretrained_cfg, "architecture": name}
        if pretrained:
            load_pretrained(
                model,
                num_classes=model.num_classes,
                in_chans=model.stem.conv1.in_channels,
                filter_fn=_with_linear_head,
                cache_dir=kwargs.get("cache_dir"),
            )
        return model

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__
    entrypoint.__doc__ = (
        f"timm's {original}{f' with {fields}' if fields else ''}, its keys and arguments; head: mean -> LN -> Linear, "
        "new for timm's weights."
    )
    register_model(entrypoint)


def _with_linear_head(state: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return this model's weights unchanged; timm's with the model's last layer instead of the two-layer head."""
    state = name_as_timm(state, model)
    if "head.pre_logits.fc.weight" not in state:
        return state
    kept = {key: value for key, value in state.items() if not key.startswith(("head.fc.", "head.pre_logits."))}
    return kept | {key: value for key, value in model.state_dict().items() if key.startswith("head.fc.")}


for _size, _fields in SIZES.items():
    _register(_size, _fields)
