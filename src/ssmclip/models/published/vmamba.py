"""Convert VMamba's several key layouts, including CLIP-Mamba's, to this package's names and fields."""

from __future__ import annotations

import math
import re
from typing import Any

from ssmclip.models.networks import vmamba
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, WrongShape, has, shape
from ssmclip.models.published.shapes import classes, common_ratio, count
from ssmclip.models.published.variants import Unseen, named

OLDER_NAMES = [
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
]
LINEAR = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")
DIRECTIONS = 4  # of the published scans


def read(state: State, hints: Hints) -> Architecture:
    state = rename_vmamba(state)
    fields = vmamba_fields(state)
    # VMamba-Nano, which alone has batch norms, has it.
    unseen = {"conv_act": Unseen(hints.conv_act, fields["conv_norm"] == "batch")}
    return Architecture("encoder", named(vmamba.VARIANTS, "vmamba", vmamba.VMamba, fields, unseen), state)


LAYOUTS.register("vmamba")(Layout("VMamba", "encoder", lambda state: has(state, "layers.0.blocks."), read))


def rename_vmamba(state: State) -> State:
    """Return VMamba's weights from its older names, and from its single-file layout, where the four directions share
    one matrix."""
    renamed = {}
    for key, value in state.items():
        for old, new in OLDER_NAMES:
            key = re.sub(old, new, key)
        if key.endswith(("op.x_proj.weight", "op.dt_projs.weight")):
            rows, columns = shape({key: value}, key, 2)
            if rows % DIRECTIONS:
                raise WrongShape(f"{key} must stack the matrices of {DIRECTIONS} directions (got {(rows, columns)})")
            key, value = key.replace(".weight", "_weight"), value.reshape(DIRECTIONS, -1, columns)
        if key.endswith(LINEAR) and value.ndim == 4:  # as 1x1 convolution
            value = value.flatten(1)
        renamed[key] = value
    return renamed


def vmamba_fields(state: State) -> dict[str, Any]:
    """Return the fields of `VMamba` except conv_act, from weights in this package's names."""
    blocks = [f"layers.{i}.blocks" for i in range(count(state, "layers."))]
    first = [f"{block}.0" for block in blocks]
    dims = tuple(shape(state, f"{block}.norm.weight", 1)[0] for block in first)
    inner = [shape(state, f"{block}.op.out_norm.weight", 1)[0] for block in first]
    scans = "layers.0.blocks.0.op.A_logs" in state
    fields = dict(
        depths=tuple(count(state, f"{block}.") for block in blocks),
        dims=dims,
        mixer="ss2d" if scans else "gated_conv",
        ssm_ratio=common_ratio(list(zip(dims, inner, strict=True))),
        gated=shape(state, "layers.0.blocks.0.op.in_proj.weight", 2)[0] == 2 * inner[0],
        conv_bias="layers.0.blocks.0.op.conv2d.bias" in state,
        mlp_ratio=0.0,
        patch_embed="v2" if "patch_embed.5.weight" in state else "v1",
        downsample="v1" if "layers.0.downsample.reduction.weight" in state else "v3",
        conv_norm="batch" if "patch_embed.2.running_mean" in state else "layer",
        num_classes=classes(state, "classifier.head"),
        in_chans=shape(state, "patch_embed.0.weight", 4)[1],
    )
    if scans:
        fields["d_state"] = shape(state, "layers.0.blocks.0.op.A_logs", 2)[1]
        fields["directions"] = shape(state, "layers.0.blocks.0.op.dt_projs_weight", 3)[0]
        ranks = [shape(state, f"{block}.op.dt_projs_weight", 3)[2] for block in first]
        if ranks != [math.ceil(dim / 16) for dim in dims]:
            fields["dt_rank"] = ranks[0]
    if "layers.0.blocks.0.mlp.fc1.weight" in state:
        hidden = [shape(state, f"{block}.mlp.fc1.weight", 2)[0] for block in first]
        fields["mlp_ratio"] = common_ratio(list(zip(dims, hidden, strict=True)))
    return fields
