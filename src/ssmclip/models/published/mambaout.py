"""MambaOut, in timm's names and in its authors'."""

from __future__ import annotations

import functools
from typing import Any

import timm
import torch
from timm.models.mambaout import checkpoint_filter_fn as name_as_timm

from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, State, guess, has, shape
from ssmclip.models.published.shapes import classes, common_ratio, count

MAMBAOUTS = ("mambaout_*", "test_mambaout")


def read(state: State, hints: Hints) -> Architecture:
    state = name_as_timm(state, None)
    return Architecture("encoder", _name_mambaout(state, hints.act_layer), state)


LAYOUTS.register("mambaout")(
    Layout("MambaOut", "encoder", lambda state: has(state, "stages.0.", "downsample_layers.0."), read)
)


def _name_mambaout(state: State, act_layer: str | None) -> dict[str, Any]:
    """Return timm's model with exactly these shapes, else arguments for them with the nearest model's activation."""
    fields = mambaout_fields(state)
    inputs_and_outputs = {"num_classes": fields.pop("num_classes")}
    if (in_chans := fields.pop("in_chans")) != 3:
        inputs_and_outputs["in_chans"] = in_chans
    linear_head = "head.pre_logits.fc.weight" not in state
    names = [name for name in timm.list_models(MAMBAOUTS) if name.endswith("_linear_head") == linear_head]
    for name in names:
        if _timm_fields(name) == fields:
            activation = {"act_layer": act_layer} if act_layer else {}
            return {"architecture": name, "model_args": inputs_and_outputs | activation}
    # But for depths and widths timm's models are of few kinds, each with its activation.
    kin = next((name for name in names if _kind(_timm_fields(name)) == _kind(fields)), None)
    act_layer = guess(act_layer, "act_layer", _timm_activation(kin) if kin else "gelu")
    family = "mambaout_femto_linear_head" if linear_head else "mambaout_femto"
    if linear_head:
        del fields["head_fn"]
    return {"architecture": family, "model_args": fields | dict(act_layer=act_layer) | inputs_and_outputs}


def _kind(fields: dict[str, Any]) -> dict[str, Any]:
    return {field: value for field, value in fields.items() if field not in ("depths", "dims")}


def _timm_activation(name: str) -> str:
    with torch.device("meta"):
        return type(timm.create_model(name).stages[0].blocks[0].act).__name__.lower()


@functools.cache
def _timm_fields(name: str) -> dict[str, Any]:
    with torch.device("meta"):
        fields = mambaout_fields(timm.create_model(name, num_classes=1).state_dict())
    return {field: value for field, value in fields.items() if field not in ("num_classes", "in_chans")}


def mambaout_fields(state: State) -> dict[str, Any]:
    """Return the arguments of timm's `MambaOut`, except its activation, which leaves no trace in the weights."""
    stages = range(count(state, "stages."))
    first = [f"stages.{i}.blocks.0" for i in stages]
    dims = tuple(shape(state, f"{block}.norm.weight", 1)[0] for block in first)
    hidden = [shape(state, f"{block}.fc2.weight", 2)[1] for block in first]
    convolved = [shape(state, f"{block}.conv.weight", 4)[0] for block in first]
    stem_mid_norm, layer_scale = "stem.norm1.weight" in state, "stages.0.blocks.0.ls.gamma" in state
    # "conv" normalises what the convolution made, "conv_nf" what it is given. Where all widths are equal that leaves no
    # trace; timm's models with "conv_nf" are those with layer scale and one norm in the stem.
    before = [i for i in stages[1:] if shape(state, f"stages.{i}.downsample.norm.weight", 1)[0] != dims[i]]
    likely = len(set(dims)) == 1 and layer_scale and not stem_mid_norm
    return dict(
        depths=tuple(count(state, f"stages.{i}.blocks.") for i in stages),
        dims=dims,
        expansion_ratio=common_ratio(list(zip(dims, hidden, strict=True))),
        conv_ratio=common_ratio(list(zip(dims, convolved, strict=True))),
        kernel_size=shape(state, "stages.0.blocks.0.conv.weight", 4)[2],
        stem_mid_norm=stem_mid_norm,
        ls_init_value=1e-6 if layer_scale else None,
        downsample="conv_nf" if before or likely else "conv",
        head_fn="default" if "head.pre_logits.norm.weight" in state else "norm_mlp",
        num_classes=classes(state, "head.fc"),
        in_chans=shape(state, "stem.conv1.weight", 4)[1],
    )
