"""Attention controls: plain ViTs at any image size, whose attention may be causal, as a scan in one direction is.

    vit_nano_patch16    for small budgets: parameters and, at every image size, multiplications about VMamba-Nano's
    vit_small_patch16, vit_base_patch16    DeiT-S and DeiT-B (Touvron et al. 2021, arXiv:2012.12877), their keys

Patches of 16 as in the papers' ViT-B/16. What may differ between two models of the same size is a field of `ViT`: how
tokens are mixed, and which token is read. Yu and Wang 2025 (arXiv:2405.07992, figure 3b) ask the first question.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Float
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, PatchDropout
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn

from ssmclip.models.networks.registration import take_fields

__all__ = ["CausalAttention", "ViT"]

# readout: timm's pooling
READOUTS = {"mean": "avg", "first": "token", "last": "token"}


class CausalAttention(Attention):
    """timm's attention in which every token attends to itself and to those before it.

    moved_to_end: how many of the first tokens stand after all others in that order; where they are stored is the same.
    """

    moved_to_end: int = 0

    def forward(
        self, x: Float[Tensor, "b n d"], attn_mask: Tensor | None = None, is_causal: bool = True
    ) -> Float[Tensor, "b n d"]:
        """Attend. It is causal whatever `is_causal` is. Raises ValueError for a mask."""
        if attn_mask is not None:
            raise ValueError("attn_mask must be left out: causal attention has a mask of its own")
        if not self.moved_to_end:
            return super().forward(x, is_causal=True)
        x = super().forward(x.roll(-self.moved_to_end, 1), is_causal=True)
        return x.roll(self.moved_to_end, 1)


class ViT(VisionTransformer):
    """timm's vision transformer with two more fields.

    mixing: "full", every token attends to every other | "causal", to itself and to those before it, in every block and
    however the model is called; patches stand row by row.
    readout: what becomes the features. "mean": the mean of the patches; the class token stands first and is not read |
    "first": the class token, standing first, which causal attention makes blind: it sees no patch, a negative control |
    "last": the class token, standing last, which sees all patches. Where mixing is full, its place makes no difference:
    "first" and "last" are both DeiT's.
    settings: timm's. A `global_pool` among them replaces the pooling of `readout`.

    Names of parameters, and the order in which tokens are stored and returned (the class token first), are timm's.
    Raises ValueError for other values, and for settings that causal mixing cannot be combined with.
    """

    def __init__(
        self,
        mixing: Literal["full", "causal"] = "full",
        readout: Literal["mean", "first", "last"] = "mean",
        **settings: Any,
    ):
        if mixing not in ("full", "causal"):
            raise ValueError(f"mixing must be 'full' or 'causal' (got {mixing!r})")
        if readout not in READOUTS:
            raise ValueError(f"readout must be one of {', '.join(READOUTS)} (got {readout!r})")
        if readout != "mean" and not settings.get("class_token", True):
            raise ValueError(f"readout must be 'mean' without a class token (got {readout!r})")
        if mixing == "causal":
            if "attn_layer" in settings:
                raise ValueError(f"attn_layer must be left out with mixing='causal' (got {settings['attn_layer']!r})")
            settings["attn_layer"] = CausalAttention
        super().__init__(**{"global_pool": READOUTS[readout], **settings})
        self.mixing, self.readout = mixing, readout
        if mixing == "causal":
            self._order_tokens()

    def _order_tokens(self) -> None:
        for block in self.blocks:
            if not isinstance(getattr(block, "attn", None), CausalAttention):
                raise ValueError(f"mixing must be 'full' with blocks of {type(block).__name__}: they make no use of it")
            block.attn.moved_to_end = self.num_prefix_tokens if self.readout == "last" else 0
        if isinstance(self.patch_drop, PatchDropout):
            self.patch_drop.ordered = True  # by default the patches that are kept are shuffled


# name: the fields that make it
VARIANTS: dict[str, dict[str, Any]] = {
    "vit_nano_patch16": dict(img_size=96, embed_dim=192, depth=6, num_heads=3),
    "vit_small_patch16": dict(embed_dim=384, depth=12, num_heads=6, readout="last"),
    "vit_base_patch16": dict(embed_dim=768, depth=12, num_heads=12, readout="last"),
}


def _cfg(**cfg: Any) -> dict[str, Any]:
    return (
        dict(
            url="",
            num_classes=1000,
            fixed_input_size=False,  # positions are interpolated to whatever comes
            mean=IMAGENET_DEFAULT_MEAN,
            std=IMAGENET_DEFAULT_STD,
            first_conv="patch_embed.proj",
            classifier="head",
            license="mit",
        )
        | cfg
    )


default_cfgs = generate_default_cfgs(
    {
        "vit_nano_patch16": _cfg(input_size=(3, 96, 96)),
        "vit_small_patch16": _cfg(input_size=(3, 224, 224), crop_pct=0.9),  # DeiT's
        "vit_base_patch16": _cfg(input_size=(3, 224, 224), crop_pct=0.9),
    }
)


def _register(name: str) -> None:
    def entrypoint(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        any_size = dict(patch_size=16, dynamic_img_size=True, dynamic_img_pad=True)
        return build_model_with_cfg(
            ViT,
            name,
            pretrained,
            pretrained_filter_fn=checkpoint_filter_fn,
            feature_cfg=dict(out_indices=3, feature_cls="getter"),
            **{**any_size, **VARIANTS[name], **take_fields(kwargs)},
        )

    entrypoint.__name__ = name
    entrypoint.__module__ = __name__  # timm reads default_cfgs from the module a model was defined in
    entrypoint.__doc__ = (
        f"ViT with patches of 16 and {VARIANTS[name]}.\n\n"
        "Positions are interpolated as timm does (`dynamic_img_size`), images filled up with zeros to a multiple of\n"
        "16 (`dynamic_img_pad`)."
    )
    register_model(entrypoint)


for _name in VARIANTS:
    _register(_name)
