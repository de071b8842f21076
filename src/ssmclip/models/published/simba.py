"""SiMBA, in its authors' names, which are this package's."""

from __future__ import annotations

import re
from typing import Any

from ssmclip.models.networks import simba
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, has, shape
from ssmclip.models.published.shapes import classes, common_ratio, count
from ssmclip.models.published.variants import named


def read(state: State, hints: Hints) -> Architecture:
    return Architecture("encoder", named(simba.VARIANTS, "simba", simba.SiMBA, simba_fields(state)), state)


LAYOUTS.register("simba")(Layout("SiMBA", "encoder", lambda state: has(state, "block1.0."), read))


def simba_fields(state: State) -> dict[str, Any]:
    """Return the fields of `SiMBA`."""
    inputs = shape(state, "patch_embed1.conv.0.weight", 4)
    stages = range(1, 1 + len({key for key in state if re.match(r"block\d+\.0\.norm2\.weight", key)}))
    dims = tuple(shape(state, f"block{i}.0.norm2.weight", 1)[0] for i in stages)
    mamba = "block1.0.attn.mamba"
    einfft = "block1.0.mlp.complex_weight_1" in state
    ratios = (4.0,) * len(dims)
    if not einfft:
        ratios = tuple(
            common_ratio([(dim, shape(state, f"block{i}.0.mlp.fc1.weight", 2)[0])])
            for i, dim in zip(stages, dims, strict=True)
        )
    return dict(
        depths=tuple(count(state, f"block{i}.") for i in stages),
        dims=dims,
        mlp_ratios=ratios,
        stem_dim=inputs[0],
        d_state=shape(state, f"{mamba}.A_log", 2)[1],
        d_conv=shape(state, f"{mamba}.conv1d.weight", 3)[2],
        expand=shape(state, f"{mamba}.D", 1)[0] // shape(state, "block1.0.norm2.weight", 1)[0],
        channel_mixer="einfft" if einfft else "mlp",
        num_classes=classes(state, "head"),
        in_chans=inputs[1],
        aux_head="aux_head.weight" in state,
    )
