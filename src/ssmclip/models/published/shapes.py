"""Architectures read off the names and shapes of weights: what built a checkpoint, without its configuration.

Every function takes the state dict of one encoder, in the names of this package, and returns the fields that build
it. A weight it looks for and does not find is a KeyError with its name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ssmclip.models.files.weights import CheckpointError

State = dict[str, Tensor]

# CLIP's text transformers have heads of 64 channels (OpenAI's, open_clip's and CLIP-Mamba's). Narrower ones than any
# of these have been scaled down by 4 in every dimension, heads too.
HEAD_CHANNELS, NARROW_HEAD_CHANNELS, NARROW = 64, 16, 256


def count(state: State, prefix: str) -> int:
    """How many modules `prefix0`, `prefix1`, ... there are."""
    found = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)


def common_ratio(pairs: Sequence[tuple[int, int]]) -> float:
    """The r with int(r * dim) == hidden for each of the pairs (dim, hidden): the roundest there is.

    Where no r fits them all, the one of the first pair.
    """
    fits = [r for r in _candidates(pairs) if all(int(r * dim) == hidden for dim, hidden in pairs)]
    return fits[0] if fits else pairs[0][1] / pairs[0][0]


def _candidates(pairs: Sequence[tuple[int, int]]) -> list[float]:
    low = max(hidden / dim for dim, hidden in pairs)
    high = min((hidden + 1) / dim for dim, hidden in pairs)
    return [low, *(math.ceil(low * 10**digits) / 10**digits for digits in range(1, 6)), (low + high) / 2]


def classes(state: State, head: str) -> int:
    return len(state[f"{head}.weight"]) if f"{head}.weight" in state else 0


def vmamba_fields(state: State) -> dict[str, Any]:
    """The fields of `VMamba`."""
    blocks = [f"layers.{i}.blocks" for i in range(count(state, "layers."))]
    first = [f"{block}.0" for block in blocks]
    dims = tuple(len(state[f"{block}.norm.weight"]) for block in first)
    inner = [len(state[f"{block}.op.out_norm.weight"]) for block in first]
    scans = "layers.0.blocks.0.op.A_logs" in state
    batch_norms = "patch_embed.2.running_mean" in state
    fields = dict(
        depths=tuple(count(state, f"{block}.") for block in blocks),
        dims=dims,
        mixer="ss2d" if scans else "gated_conv",
        ssm_ratio=common_ratio(list(zip(dims, inner, strict=True))),
        gated=len(state["layers.0.blocks.0.op.in_proj.weight"]) == 2 * inner[0],
        conv_bias="layers.0.blocks.0.op.conv2d.bias" in state,
        mlp_ratio=0.0,
        patch_embed="v2" if "patch_embed.5.weight" in state else "v1",
        downsample="v1" if "layers.0.downsample.reduction.weight" in state else "v3",
        conv_norm="batch" if batch_norms else "layer",
        conv_act=batch_norms,  # leaves no trace; VMamba-Nano, which alone has batch norms, has it
        num_classes=classes(state, "classifier.head"),
        in_chans=state["patch_embed.0.weight"].shape[1],
    )
    if scans:
        fields["d_state"] = state["layers.0.blocks.0.op.A_logs"].shape[1]
        ranks = [state[f"{block}.op.dt_projs_weight"].shape[2] for block in first]
        if ranks != [math.ceil(dim / 16) for dim in dims]:
            fields["dt_rank"] = ranks[0]
    if "layers.0.blocks.0.mlp.fc1.weight" in state:
        hidden = [len(state[f"{block}.mlp.fc1.weight"]) for block in first]
        fields["mlp_ratio"] = common_ratio(list(zip(dims, hidden, strict=True)))
    return fields


def simba_fields(state: State) -> dict[str, Any]:
    """The fields of `SiMBA`."""
    stages = range(1, 1 + len({key for key in state if re.match(r"block\d+\.0\.norm2\.weight", key)}))
    dims = tuple(len(state[f"block{i}.0.norm2.weight"]) for i in stages)
    mamba = "block1.0.attn.mamba"
    einfft = "block1.0.mlp.complex_weight_1" in state
    ratios = (4.0,) * len(dims)
    if not einfft:
        ratios = tuple(
            common_ratio([(dim, len(state[f"block{i}.0.mlp.fc1.weight"]))]) for i, dim in zip(stages, dims, strict=True)
        )
    return dict(
        depths=tuple(count(state, f"block{i}.") for i in stages),
        dims=dims,
        mlp_ratios=ratios,
        stem_dim=len(state["patch_embed1.conv.0.weight"]),
        d_state=state[f"{mamba}.A_log"].shape[1],
        d_conv=state[f"{mamba}.conv1d.weight"].shape[2],
        expand=len(state[f"{mamba}.D"]) // dims[0],
        channel_mixer="einfft" if einfft else "mlp",
        num_classes=classes(state, "head"),
        in_chans=state["patch_embed1.conv.0.weight"].shape[1],
        aux_head="aux_head.weight" in state,
    )


def mambaout_fields(state: State) -> dict[str, Any]:
    """The arguments of timm's `MambaOut`, except its activation, which leaves no trace in the weights."""
    stages = range(count(state, "stages."))
    first = [f"stages.{i}.blocks.0" for i in stages]
    dims = tuple(len(state[f"{block}.norm.weight"]) for block in first)
    hidden = [state[f"{block}.fc2.weight"].shape[1] for block in first]
    convolved = [len(state[f"{block}.conv.weight"]) for block in first]
    stem_mid_norm, layer_scale = "stem.norm1.weight" in state, "stages.0.blocks.0.ls.gamma" in state
    # "conv" normalises what the convolution made, "conv_nf" what it is given. Where all widths are equal that leaves no
    # trace; timm's models with "conv_nf" are those with layer scale and one norm in the stem.
    before = [i for i in stages[1:] if len(state[f"stages.{i}.downsample.norm.weight"]) != dims[i]]
    likely = len(set(dims)) == 1 and layer_scale and not stem_mid_norm
    return dict(
        depths=tuple(count(state, f"stages.{i}.blocks.") for i in stages),
        dims=dims,
        expansion_ratio=common_ratio(list(zip(dims, hidden, strict=True))),
        conv_ratio=common_ratio(list(zip(dims, convolved, strict=True))),
        kernel_size=state["stages.0.blocks.0.conv.weight"].shape[2],
        stem_mid_norm=stem_mid_norm,
        ls_init_value=1e-6 if layer_scale else None,
        downsample="conv_nf" if before or likely else "conv",
        head_fn="default" if "head.pre_logits.norm.weight" in state else "norm_mlp",
        num_classes=classes(state, "head.fc"),
        in_chans=state["stem.conv1.weight"].shape[1],
    )


def clip_text_fields(state: State, heads: int | None = None) -> dict[str, Any]:
    """open_clip's `text_cfg` of CLIP's text transformer.

    heads: of its attention, which leave no trace in the weights; None for 64 channels each (16 in a transformer of
    fewer than 256 channels).
    """
    context_length, width = state["positional_embedding"].shape
    if heads is None:
        heads = max(1, width // (HEAD_CHANNELS if width >= NARROW else NARROW_HEAD_CHANNELS))
        while width % heads:
            heads -= 1
    return dict(
        context_length=context_length,
        vocab_size=len(state["token_embedding.weight"]),
        width=width,
        heads=heads,
        layers=count(state, "transformer.resblocks."),
        mlp_ratio=common_ratio([(width, len(state["transformer.resblocks.0.mlp.c_fc.weight"]))]),
    )


def language_model_fields(state: State, n_groups: int = 1) -> dict[str, Any]:
    """The fields of a language model's config, with its `model_type`.

    n_groups: of Mamba-2, whose weights tell n_groups * state_size but not the two. Raises CheckpointError where it does
    not divide that.
    """
    mixer = "layers.0.mixer"
    vocab_size, hidden_size = state["embeddings.weight"].shape
    fields = dict(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        num_hidden_layers=count(state, "layers."),
        conv_kernel=state[f"{mixer}.conv1d.weight"].shape[2],
        use_bias=f"{mixer}.in_proj.bias" in state,
        use_conv_bias=f"{mixer}.conv1d.bias" in state,
    )
    if f"{mixer}.x_proj.weight" in state:
        inner, state_size = state[f"{mixer}.A_log"].shape
        rank = state[f"{mixer}.dt_proj.weight"].shape[1]
        return fields | dict(
            model_type="mamba",
            state_size=state_size,
            expand=inner // hidden_size,
            time_step_rank="auto" if rank == math.ceil(hidden_size / 16) else rank,
        )
    inner, num_heads = state[f"{mixer}.out_proj.weight"].shape[1], len(state[f"{mixer}.A_log"])
    both = (len(state[f"{mixer}.conv1d.weight"]) - inner) // 2  # of B, as of C: n_groups * state_size
    if both % n_groups:
        raise CheckpointError(f"n_groups={n_groups} does not divide n_groups * state_size = {both} of these weights")
    return fields | dict(
        model_type="mamba2",
        state_size=both // n_groups,
        n_groups=n_groups,
        expand=inner // hidden_size,
        num_heads=num_heads,
        head_dim=inner // num_heads,
    )
