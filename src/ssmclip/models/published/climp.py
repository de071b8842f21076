"""CLIMP: a VMamba and a Mamba language model, each with a projection, in CLIMP's own weight names."""

from __future__ import annotations

from ssmclip.models.published import clip
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, has, rename

PREFIXES = {
    "vision_encoder.": "visual.trunk.",
    "vision_projection.": "visual.head.proj.",
    "text_encoder.": "text.transformer.",
    "text_projection.": "text.proj.",
}


def read(state: State, hints: Hints) -> Architecture:
    state = rename(state, PREFIXES)
    first = "text.transformer.layers.0.mixer.x_proj.weight" in state  # the second Mamba has none
    return clip.read(state, hints, like="CLIMP-Mamba1" if first else "CLIMP-Mamba2")


LAYOUTS.register("climp")(Layout("CLIMP", "clip", lambda state: has(state, "vision_encoder."), read))
