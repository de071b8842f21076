"""CLIP-Mamba's training checkpoints: open_clip's names, except for the image tower and its projection."""

from __future__ import annotations

from ssmclip.models.published import clip
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, has, rename, shape

PROJECTION = "image_projection"


def read(state: State, hints: Hints) -> Architecture:
    shape(state, PROJECTION, 2)
    state = rename(state, {"visual.": clip.TRUNK})
    state["visual.head.proj.weight"] = state.pop(PROJECTION).T.contiguous()
    return clip.read(state, hints)


LAYOUTS.register("clip_mamba")(
    Layout("CLIP-Mamba", "clip", lambda state: PROJECTION in state and has(state, "visual."), read)
)
