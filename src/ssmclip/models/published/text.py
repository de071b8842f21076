"""Read CLIP's text transformer, alone or as part of a CLIP's weights."""

from __future__ import annotations

from typing import Any

import open_clip
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, guess, has, shape
from ssmclip.models.published.shapes import common_ratio, count

# CLIP's text transformers have heads of 64 channels (OpenAI's, open_clip's and CLIP-Mamba's). Narrower ones than any
# of these have been scaled down by 4 in every dimension, heads too.
HEAD_CHANNELS, NARROW_HEAD_CHANNELS, NARROW = 64, 16, 256


class ClipText(open_clip.transformer.TextTransformer):
    """CLIP's text tower by itself. forward, encode_text: tokens (B, L) -> features (B, E), not normalised."""

    def encode_text(self, text: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B E"]:
        features = self(text)
        return nn.functional.normalize(features, dim=-1) if normalize else features


def build_clip_text(fields: dict[str, Any]) -> ClipText:
    """Return CLIP's text tower with random weights. fields: those that `read` returns."""
    fields = dict(fields)
    quick_gelu = fields.pop("quick_gelu")
    return ClipText(act_layer=open_clip.transformer.QuickGELU if quick_gelu else nn.GELU, **fields)


def read(state: State, hints: Hints) -> Architecture:
    """Read the text tower alone. Its temperature, if it is there, belongs to no tower."""
    state = {key: value for key, value in state.items() if key != "logit_scale"}
    _, output_dim = shape(state, "text_projection", 2)
    quick_gelu = guess(hints.quick_gelu, "quick_gelu", True)
    fields = clip_text_fields(state, hints.text_heads) | dict(output_dim=output_dim, quick_gelu=quick_gelu)
    return Architecture("text", fields, state)


LAYOUTS.register("clip_text")(
    Layout(
        "CLIP's text tower",
        "text",
        lambda state: "token_embedding.weight" in state and not has(state, "visual."),
        read,
    )
)


def clip_text_fields(state: State, heads: int | None = None) -> dict[str, Any]:
    """Return open_clip's `text_cfg` of CLIP's text transformer.

    heads: of its attention, which leave no trace in the weights; None for a guess, which is logged: 64 channels each
    (16 in a transformer of fewer than 256 channels).
    """
    context_length, width = shape(state, "positional_embedding", 2)
    vocab_size, _ = shape(state, "token_embedding.weight", 2)
    hidden, _ = shape(state, "transformer.resblocks.0.mlp.c_fc.weight", 2)
    return dict(
        context_length=context_length,
        vocab_size=vocab_size,
        width=width,
        heads=guess(heads, "text_heads", usual_heads(width)),
        layers=count(state, "transformer.resblocks."),
        mlp_ratio=common_ratio([(width, hidden)]),
    )


def usual_heads(width: int) -> int:
    """Return the number of heads that a CLIP's text transformer of this width has, where nothing else is known.

    >>> usual_heads(512), usual_heads(320), usual_heads(128)
    (8, 5, 8)
    """
    heads = max(1, width // (HEAD_CHANNELS if width >= NARROW else NARROW_HEAD_CHANNELS))
    while width % heads:
        heads -= 1
    return heads
