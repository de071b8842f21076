"""Published weights, without knowing which configuration made them: the architecture is read off the file itself.

    file -> its state dict, online or averaged -> this package's names -> fields, from the shapes -> model

Where weights lie in a folder of open_clip's, timm's or Hugging Face's, its configuration says what shapes cannot.
Known are: CLIP-Mamba's training checkpoints, VMamba in both its key layouts and its older names, SiMBA, CLIMP, timm's
and the original MambaOut, Hugging Face's and mamba_ssm's language models, and what this package itself saves.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
import timm
import torch
from jaxtyping import Float, Int
from timm.models.mambaout import checkpoint_filter_fn as name_as_timm
from torch import Tensor, nn

from ssmclip.models.clip import clip_config, create_clip
from ssmclip.models.files.hub import HUB, WEIGHT_FILES, choose_weights, download
from ssmclip.models.files.weights import (
    CONFIG_NAME,
    CONFIGS,
    CheckpointError,
    config_beside,
    load_into,
    load_state,
    save_model,
)
from ssmclip.models.networks import simba, vmamba
from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.published.language_model import known_fields, own_keys
from ssmclip.models.published.shapes import (
    State,
    clip_text_fields,
    language_model_fields,
    mambaout_fields,
    simba_fields,
    vmamba_fields,
)
from ssmclip.models.tokenizer import FILES as TOKENIZER_FILES
from ssmclip.registry import UnknownName

__all__ = ["Architecture", "ClipText", "build", "convert", "load_published", "read_published"]

WEIGHTS = ("online", "ema", "ema_online_bn")
ONLINE, AVERAGED = ("state_dict", "model"), ("model_ema", "state_dict_ema")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")
MAMBAOUTS = ("mambaout_*", "test_mambaout")


@dataclass(frozen=True)
class Architecture:
    """What builds a model. kind: "clip" | "encoder" | "text" | "language_model".

    config: of a CLIP, open_clip's {"model_cfg": ..., "preprocess_cfg": ...}; of an encoder, timm's name and arguments,
    {"architecture": ..., "model_args": ...}; of the others, fields of theirs.
    """

    kind: str
    config: dict[str, Any]


class ClipText(open_clip.transformer.TextTransformer):
    """CLIP's text tower by itself. forward, encode_text: tokens (B, L) -> features (B, E), not normalised."""

    def encode_text(self, text: Int[Tensor, "B L"], normalize: bool = False) -> Float[Tensor, "B E"]:
        features = self(text)
        return nn.functional.normalize(features, dim=-1) if normalize else features


def load_published(
    source: str | Path | Mapping[str, Any],
    weights: str = "online",
    *,
    text_heads: int | None = None,
    n_groups: int | None = None,
    layer_norm_epsilon: float | None = None,
    act_layer: str | None = None,
) -> nn.Module:
    """The model that published weights belong to, with those weights, in evaluation mode.

    source: a checkpoint file (.safetensors, the .index.json of one in shards, or what torch.save wrote: no pickled code
    is run), a folder that holds one, `hf-hub:OWNER/NAME` or `hf-hub:OWNER/NAME/FILE` (downloaded once), or what a file
    contains, a state dict or a dict around one;
    weights: "online" | "ema", the moving average a training run kept, exactly as saved | "ema_online_bn", the average
    with the batch statistics of the online weights: CLIP-Mamba averages parameters alone, so that the averaged SiMBA
    tower still has the statistics it began with.

    What shapes cannot tell is what was asked for here, else what the configuration says that lies beside weights which
    have the name open_clip, timm or Hugging Face give them (open_clip_model.safetensors, model.safetensors), else a
    default: text_heads, of CLIP's text transformer, 64 channels each (16 where it has fewer than 256); n_groups and
    layer_norm_epsilon, of a Mamba language model, 1 and 1e-5; act_layer, of a MambaOut, that of timm's model which
    differs in depths and widths at most, "gelu" where there is none. With a configuration of open_clip's or timm's the
    model may be any that those know.

    Returns, for a CLIP, an open_clip model with `encode_image` and `encode_text`; for an image encoder, the timm model,
    which gives logits where the file has a classifier, else features; for CLIP's text tower alone, `ClipText`; for a
    language model, `LanguageModel`, which gives hidden states. The type is that of the weights, at least float32.

    Raises CheckpointError where nothing of this is known, and, key by key, where weights do not fit; FileNotFoundError;
    UnknownName for a configuration of another language model; ValueError for another `weights`.
    """
    architecture, state = read_published(
        source,
        weights,
        text_heads=text_heads,
        n_groups=n_groups,
        layer_norm_epsilon=layer_norm_epsilon,
        act_layer=act_layer,
    )
    return build(architecture, state, _told(source))


def build(architecture: Architecture, state: State, source: str = "the state dict") -> nn.Module:
    """The model of an architecture with its weights. Raises CheckpointError, key by key, where they do not fit."""
    config = architecture.config
    if architecture.kind == "clip":
        model = create_clip(config)
    elif architecture.kind == "encoder":
        model = timm.create_model(config["architecture"], **config["model_args"])
    elif architecture.kind == "text":
        model = ClipText(act_layer=open_clip.transformer.QuickGELU, **config)
    else:
        model = LanguageModel(read_config(config))
    load_into(model.to(_at_least_float32(state)), state, source, told=None)
    return model.eval()


def convert(
    source: str | Path | Mapping[str, Any], folder: str | Path, weights: str = "online", **unreadable: Any
) -> str:
    """Write published weights as a folder that others read without this function: safetensors and a configuration.

    source, weights, and what shapes cannot tell: as in `load_published`. Of a CLIP `open_clip_config.json` and weights,
    and the tokenizer's files beside the original where there is one, which `ssmclip.load(folder)` reads, and
    `open_clip.create_model_and_transforms("local-dir:" + folder)` too once ssmclip is imported (but for text towers
    that are no transformers: open_clip cannot build them, and its error names `ssmclip.load`); of an image encoder
    timm's form, `timm.create_model("local-dir:" + folder, pretrained=True)`; of a language model Hugging Face's.
    Returns which of these: "clip" | "encoder" | "language_model".

    Raises what `load_published` raises, and CheckpointError for CLIP's text tower alone, which no library reads.
    """
    architecture, state = read_published(source, weights, **unreadable)
    if architecture.kind == "text":
        raise CheckpointError(f"{_told(source)} is CLIP's text tower alone, for which no library has a file format")
    model = build(architecture, state, _told(source))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if architecture.kind == "clip":
        save_model(model, architecture.config, folder)
        if isinstance(source, str | Path):
            beside = find_weights(source).parent
            for name in TOKENIZER_FILES:
                if (beside / name).is_file():
                    shutil.copyfile(beside / name, folder / name)
    elif architecture.kind == "encoder":
        arguments = {k: v for k, v in architecture.config["model_args"].items() if k != "num_classes"}
        name = {"architecture": architecture.config["architecture"]}
        timm.models.save_for_hf(model, str(folder), model_config=name, model_args=arguments, safe_serialization=True)
    else:
        config = {**architecture.config, "architectures": [HUGGING_FACE[architecture.config["model_type"]]]}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        safetensors.torch.save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return architecture.kind


HUGGING_FACE = {"mamba": "MambaModel", "mamba2": "Mamba2Model"}


def read_published(
    source: str | Path | Mapping[str, Any],
    weights: str = "online",
    *,
    text_heads: int | None = None,
    n_groups: int | None = None,
    layer_norm_epsilon: float | None = None,
    act_layer: str | None = None,
) -> tuple[Architecture, State]:
    """The architecture of published weights, and the weights in this package's names. Arguments: `load_published`'s."""
    if weights not in WEIGHTS:
        raise ValueError(f"weights {weights!r}: one of {', '.join(map(repr, WEIGHTS))}")
    path = find_weights(source) if isinstance(source, str | Path) else None
    state = select_weights(source if path is None else load_state(path), weights, _told(source))
    config = {} if path is None else config_beside(path)
    try:
        if "model_cfg" in config and CONFIGS[path.name] == CONFIG_NAME:
            return _configured_clip(config, state, text_heads, n_groups, layer_norm_epsilon), state
        if encoder := _configured_encoder(config, act_layer, state):
            return encoder, state
        if "layers.0.norm.weight" in own_keys(state):
            state = own_keys(state)
            said = known_fields(config, _told(source)) if "model_type" in config else {}
            return Architecture("language_model", _language_model(state, n_groups, layer_norm_epsilon, said)), state
        return _read_bare(state, text_heads, n_groups, layer_norm_epsilon, act_layer)
    except (CheckpointError, UnknownName):
        raise
    except KeyError as error:
        raise CheckpointError(
            f"{_told(source)} lacks {error.args[0]!r}, from which the architecture would be read"
        ) from error
    except UnknownLayout as error:
        some = ", ".join(list(state)[:4])
        raise CheckpointError(
            f"{_told(source)} is none of the checkpoints known: CLIP-Mamba, VMamba, SiMBA, CLIMP, MambaOut, Mamba or "
            f"Mamba-2 language models. Its {len(state)} keys begin with: {some}"
        ) from error
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as error:  # a weight with other axes
        some = ", ".join(f"{key} {tuple(value.shape)}" for key, value in list(state.items())[:4])
        raise CheckpointError(
            f"{_told(source)} has the names of a checkpoint that is known but other shapes, of which no architecture "
            f"can be made ({error}). Its {len(state)} weights begin with: {some}"
        ) from error


class UnknownLayout(ValueError):
    """Weights in no layout known."""


def find_weights(source: str | Path) -> Path:
    """The checkpoint file of a path: itself, the one in that folder, or in a repository of the hub, `hf-hub:OWNER/NAME`
    or `hf-hub:OWNER/NAME/FILE`, downloaded once. Raises FileNotFoundError, CheckpointError.
    """
    path = download(str(source)) if str(source).startswith(HUB) else Path(source)
    if not path.is_dir():
        return path
    name = choose_weights(sorted(file.name for file in path.iterdir()), path)
    if name is None:
        raise CheckpointError(f"{path} holds no checkpoint: no {', '.join(WEIGHT_FILES)}")
    return path / name


# ---- which of the weights in a file


def select_weights(held: Mapping[str, Any], weights: str, source: str = "the state dict") -> State:
    """The state dict in what a file holds, online or averaged, without what training wrapped around its names.

    An average is kept as a state dict of its own ("model_ema"), or beside the online weights, with "_e" at the end of
    the first part of their names. A file with an average alone gives it as "online". Raises CheckpointError.
    """
    online = next((held[key] for key in ONLINE if isinstance(held.get(key), Mapping)), None)
    averaged = next((held[key] for key in AVERAGED if isinstance(held.get(key), Mapping)), None)
    if online is None:
        online = averaged if averaged is not None else held
    online = unwrap(online, source)
    if averaged is not None:
        averaged = unwrap(averaged, source)
    else:
        own = {_online_name(key): value for key, value in online.items() if _online_name(key) != key}
        online = {key: value for key, value in online.items() if _online_name(key) == key}
        averaged = online | own if own else None
    if weights == "online":
        return online
    if averaged is None:
        raise CheckpointError(f"{source} holds no moving average; its weights are weights='online'")
    if weights == "ema":
        return averaged
    return averaged | {key: online[key] for key in averaged if key.endswith(BUFFERS)}


def unwrap(state: Mapping[str, Any], source: str) -> State:
    """Without the prefixes of DistributedDataParallel and torch.compile. Raises CheckpointError for no tensors."""
    other = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other or not state:
        told = f"{', '.join(map(str, other[:4]))} are no tensors with a name" if other else "it is empty"
        raise CheckpointError(
            f"{source} holds no state dict: {told}. Known are a flat dict of tensors, and one under any of "
            f"{', '.join(ONLINE + AVERAGED)}"
        )
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _online_name(key: str) -> str:
    first, dot, rest = key.partition(".")
    return first.removesuffix("_e") + dot + rest


# ---- what a configuration beside the weights says


def _configured_clip(
    config: dict[str, Any],
    state: State,
    text_heads: int | None,
    n_groups: int | None,
    layer_norm_epsilon: float | None,
) -> Architecture:
    text_cfg = config["model_cfg"]["text_cfg"]
    config["model_cfg"]["vision_cfg"].pop("timm_model_pretrained", None)  # the weights are here
    if "mamba" not in text_cfg:
        text_cfg |= {"heads": text_heads} if text_heads is not None else {}
    elif (n_groups, layer_norm_epsilon) != (None, None):
        own = _under(state, "text.transformer.")
        said = known_fields({"model_type": "mamba"} | text_cfg["mamba"], "text_cfg.mamba")
        text_cfg["mamba"] = _language_model(own, n_groups, layer_norm_epsilon, said)
    return Architecture("clip", config)


def _configured_encoder(config: dict[str, Any], act_layer: str | None, state: State) -> Architecture | None:
    """None where the configuration names no model of timm's, or one with other weights: it may be another library's."""
    name = config.get("architecture")
    if not isinstance(name, str) or not timm.is_model(name):
        return None
    told = {"num_classes": config.get("num_classes"), "act_layer": act_layer}
    arguments = (config.get("model_args") or {}) | {key: value for key, value in told.items() if value is not None}
    try:
        with torch.device("meta"):
            wanted = timm.create_model(name, **arguments).state_dict()
    except (TypeError, ValueError, RuntimeError):  # arguments that timm's model does not take
        return None
    if {key: value.shape for key, value in wanted.items()} != {key: value.shape for key, value in state.items()}:
        return None
    return Architecture("encoder", {"architecture": name, "model_args": arguments})


# ---- the layouts


def _read_bare(
    state: State,
    text_heads: int | None,
    n_groups: int | None,
    layer_norm_epsilon: float | None,
    act_layer: str | None,
) -> tuple[Architecture, State]:
    if _has(state, "visual.", "vision_encoder."):
        return _read_clip(state, text_heads, n_groups, layer_norm_epsilon)
    if "token_embedding.weight" in state:
        return _read_text(state, text_heads)
    encoder, state = _read_encoder(state, act_layer)
    return Architecture("encoder", encoder), state


def _read_clip(
    state: State, text_heads: int | None, n_groups: int | None, layer_norm_epsilon: float | None
) -> tuple[Architecture, State]:
    """CLIP-Mamba's, CLIMP's and this package's CLIPs in open_clip's names."""
    if _has(state, "vision_encoder."):
        state = rename(state, CLIMP)
        example = "CLIMP-Mamba1" if "text.transformer.layers.0.mixer.x_proj.weight" in state else "CLIMP-Mamba2"
    else:
        example = "CLIP-VMamba-S"
        if "image_projection" in state:
            state = rename(state, {"visual.": "visual.trunk."})
            state["visual.head.proj.weight"] = state.pop("image_projection").T.contiguous()
    encoder, trunk = _read_encoder(_under(state, "visual.trunk."))
    state = {k: v for k, v in state.items() if not k.startswith("visual.trunk.")}
    state |= {f"visual.trunk.{key}": value for key, value in trunk.items()}

    config = clip_config(example)
    model_cfg = config["model_cfg"]
    arguments = {k: v for k, v in encoder["model_args"].items() if k != "num_classes"}
    model_cfg["embed_dim"] = len(state["visual.head.proj.weight"])
    model_cfg["vision_cfg"] |= dict(
        timm_model_name=name_with_fields(encoder["architecture"], arguments),
        timm_proj_bias="visual.head.proj.bias" in state,
    )
    model_cfg["vision_cfg"].pop("timm_drop_path", None)
    if "logit_bias" in state:
        model_cfg["init_logit_bias"] = 0.0
    if _has(state, "text.transformer.layers."):
        fields = _language_model(_under(state, "text.transformer."), n_groups, layer_norm_epsilon)
        known = model_cfg["text_cfg"]
        model_cfg["text_cfg"] = dict(context_length=None, mamba=fields, proj_bias="text.proj.bias" in state)
        if known.get("mamba", {}).get("vocab_size") == fields["vocab_size"]:  # else another tokenizer's
            model_cfg["text_cfg"]["hf_tokenizer_name"] = known["hf_tokenizer_name"]
    else:
        model_cfg["text_cfg"] = clip_text_fields(state, text_heads)
    return Architecture("clip", config), state


CLIMP = {
    "vision_encoder.": "visual.trunk.",
    "vision_projection.": "visual.head.proj.",
    "text_encoder.": "text.transformer.",
    "text_projection.": "text.proj.",
}


def _read_text(state: State, heads: int | None) -> tuple[Architecture, State]:
    """CLIP's text tower alone. Its temperature, if it is there, belongs to no tower."""
    state = {key: value for key, value in state.items() if key != "logit_scale"}
    return Architecture(
        "text", clip_text_fields(state, heads) | dict(output_dim=state["text_projection"].shape[1])
    ), state


def _read_encoder(state: State, act_layer: str | None = None) -> tuple[dict[str, Any], State]:
    """An image encoder: timm's name and arguments, and the weights in its names."""
    if _has(state, "layers.0.blocks."):
        state = _name_as_vmamba(state)
        return _named(vmamba.VARIANTS, "vmamba", vmamba.VMamba, vmamba_fields(state)), state
    if _has(state, "block1.0."):
        return _named(simba.VARIANTS, "simba", simba.SiMBA, simba_fields(state)), state
    if _has(state, "stages.0.", "downsample_layers.0."):
        state = name_as_timm(state, None)
        return _name_mambaout(state, act_layer), state
    raise UnknownLayout


def _language_model(
    state: State, n_groups: int | None, layer_norm_epsilon: float | None, said: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The fields that shapes tell; of the others those asked for, else those a configuration said, else defaults."""
    known = dict(said) if said else dict(layer_norm_epsilon=1e-5)
    if layer_norm_epsilon is not None:
        known["layer_norm_epsilon"] = layer_norm_epsilon
    fields = language_model_fields(state, n_groups or known.get("n_groups", 1))
    if said and said.get("model_type", "mamba") != fields["model_type"]:
        raise CheckpointError(
            f"the configuration says {said['model_type']}, the weights are a {fields['model_type']}'s"
        )
    return known | fields


def _name_as_vmamba(state: State) -> State:
    """VMamba's older names, and its single-file layout, where what the four directions have is one matrix."""
    named = {}
    for key, value in state.items():
        for old, new in VMAMBA:
            key = re.sub(old, new, key)
        if key.endswith(("op.x_proj.weight", "op.dt_projs.weight")):
            key, value = key.replace(".weight", "_weight"), value.reshape(4, -1, value.shape[1])
        if key.endswith(LINEAR) and value.ndim == 4:  # as 1x1 convolution
            value = value.flatten(1)
        named[key] = value
    return named


VMAMBA = [
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"\.ln_1\.", ".norm."),
    (r"\.self_attention\.", ".op."),
    (r"^(norm|head)\.", r"classifier.\1."),
]
LINEAR = ("in_proj.weight", "out_proj.weight", "fc1.weight", "fc2.weight", "reduction.weight")


def _named(variants: dict[str, dict], family: str, encoder: type, fields: dict[str, Any]) -> dict[str, Any]:
    """The variant with these fields, and the arguments that are not its own; where there is none, the family's name."""
    ours = {"num_classes": fields.pop("num_classes")}
    if (in_chans := fields.pop("in_chans")) != 3:
        ours["in_chans"] = in_chans
    defaults = {name: default for name, default in _defaults(encoder).items() if name in fields}
    for name, own in variants.items():
        if {**defaults, **own} == {**defaults, **fields}:
            return {"architecture": name, "model_args": ours}
    changed = {name: value for name, value in fields.items() if value != defaults.get(name)}
    return {"architecture": family, "model_args": changed | ours}


def _defaults(encoder: type) -> dict[str, Any]:
    return {name: p.default for name, p in inspect.signature(encoder).parameters.items()}


def _name_mambaout(state: State, act_layer: str | None) -> dict[str, Any]:
    """timm's model of exactly these shapes; else the arguments that give them, the activation of timm's nearest kin."""
    fields = mambaout_fields(state)
    ours = {"num_classes": fields.pop("num_classes")}
    if (in_chans := fields.pop("in_chans")) != 3:
        ours["in_chans"] = in_chans
    linear_head = "head.pre_logits.fc.weight" not in state
    names = [name for name in timm.list_models(MAMBAOUTS) if name.endswith("_linear_head") == linear_head]
    for name in names:
        if _timm_fields(name) == fields:
            return {"architecture": name, "model_args": ours | ({"act_layer": act_layer} if act_layer else {})}
    # But for depths and widths timm's models are of few kinds, each with its activation.
    kin = next((name for name in names if _kind(_timm_fields(name)) == _kind(fields)), None)
    act_layer = act_layer or (_timm_activation(kin) if kin else "gelu")
    family = "mambaout_femto_linear_head" if linear_head else "mambaout_femto"
    if linear_head:
        del fields["head_fn"]
    return {"architecture": family, "model_args": fields | dict(act_layer=act_layer) | ours}


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


# ---- small things


def rename(state: State, prefixes: dict[str, str]) -> State:
    """Each key's prefix replaced by its new name."""
    renamed = {}
    for key, value in state.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = value
    return renamed


def _under(state: State, prefix: str) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def _has(state: State, *prefixes: str) -> bool:
    return any(key.startswith(prefixes) for key in state)


def _at_least_float32(state: State) -> torch.dtype:
    dtype = torch.float32
    for value in state.values():
        if value.is_floating_point():
            dtype = torch.promote_types(dtype, value.dtype)
    return dtype


def _told(source: Any) -> str:
    return str(source) if isinstance(source, str | Path) else "the state dict"
