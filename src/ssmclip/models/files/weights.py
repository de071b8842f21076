"""Weights in and out of files: safetensors or a pickle that may hold only tensors and plain containers."""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections import OrderedDict
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

log = logging.getLogger(__name__)

CONFIG_NAME = "open_clip_config.json"
WEIGHTS_NAME = "open_clip_model.safetensors"
INDEX = ".index.json"  # the end of the name of what says which weights are in which shard
# Weights under the names that open_clip, timm and Hugging Face give them: the configuration beside them. A folder may
# hold both forms; open_clip's is then taken, of which there is one reading.
CONFIGS = {
    WEIGHTS_NAME: CONFIG_NAME,
    "open_clip_pytorch_model.bin": CONFIG_NAME,
    "model.safetensors": "config.json",
    f"model.safetensors{INDEX}": "config.json",
    "pytorch_model.bin": "config.json",
}


class CheckpointError(ValueError):
    """A file that is no checkpoint, is cut short, belongs to another model, or would run code."""


PATHLIB = ("pathlib", "pathlib._local")
# What a pickle may hold besides: none of it runs code when it is made. NumPy's scalars changed modules in NumPy 2,
# paths theirs in Python 3.13; those come back as their pure kind, which is but text and which every system can make.
HARMLESS = [
    argparse.Namespace,
    np.dtype,
    *(type(np.dtype(kind)) for kind in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u8", "u4", "u2", "u1", "?", "U")),
    np._core.multiarray.scalar,
    (np._core.multiarray.scalar, "numpy.core.multiarray.scalar"),
    *((PurePosixPath, f"{module}.{kind}PosixPath") for module in PATHLIB for kind in ("", "Pure")),
    *((PureWindowsPath, f"{module}.{kind}WindowsPath") for module in PATHLIB for kind in ("", "Pure")),
    (OrderedDict, "yacs.config.CfgNode"),  # torch fills dicts and OrderedDicts, not what is derived from them
]


def first_line(error: BaseException) -> str:
    """Of what an error says; its type where it says nothing."""
    return (str(error) or type(error).__name__).splitlines()[0]


def load_state(path: str | Path) -> dict[str, Any]:
    """What a checkpoint file holds: a flat dict of tensors (.safetensors), or what torch.save wrote (anything else); of
    the index of one in shards (.index.json), what all of them hold.

    Pickles are read with `weights_only=True`: one that would run code is refused. Besides tensors and plain containers
    they may hold what training scripts put beside the weights: an argparse.Namespace, NumPy scalars, paths, a yacs
    config.
    Raises FileNotFoundError, CheckpointError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint file at {path}")
    if path.name.endswith(INDEX):
        return {key: value for shard in shards(path) for key, value in load_state(path.parent / shard).items()}
    if path.suffix == ".safetensors":
        try:
            return safetensors.torch.load_file(path)
        except SafetensorError as error:
            raise CheckpointError(f"{path} is cut short or is no safetensors file ({error}); copy it again") from error
    try:
        with torch.serialization.safe_globals(HARMLESS):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is no torch checkpoint, or unpickling it would run code "
            f"({first_line(error)}). Only tensors and plain containers are read; have its author save the "
            "state_dict, or a .safetensors file"
        ) from error
    except (RuntimeError, EOFError, ValueError) as error:  # torch's zip reader on a cut or foreign file
        raise CheckpointError(f"{path} is cut short or is no torch checkpoint ({first_line(error)})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} holds a {type(held).__name__}; read are a state dict, and a dict around one")
    return held


def shards(index: Path) -> list[str]:
    """The files that an index names. Raises CheckpointError."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise CheckpointError(f"{index} has no 'weight_map': it is no index of weights in shards")
    return sorted(set(named.values()))


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path, told: int | None = 4) -> None:
    """Copy `state` into `model`, all of it or none.

    Raises CheckpointError naming every kind of misfit, with the first `told` keys of each, or all where it is None.
    """
    own = model.state_dict()
    misfits = {
        "missing": [key for key in own if key not in state],
        "not in the model": [key for key in state if key not in own],
        "of another shape": [
            f"{key} {tuple(state[key].shape)}, the model's {tuple(own[key].shape)}"
            for key in own
            if key in state and own[key].shape != state[key].shape
        ],
    }
    if any(misfits.values()):
        reports = [
            f"{len(keys)} {kind}: {', '.join(keys[:told])}{' …' if len(keys) > len(keys[:told]) else ''}"
            for kind, keys in misfits.items()
            if keys
        ]
        raise CheckpointError(f"{source} is a checkpoint of another model; {'; '.join(reports)}")
    model.load_state_dict(state)


def config_beside(path: Path) -> dict[str, Any]:
    """The configuration of weights that have the name their library gives them; {} of any others, where there is none,
    and where it is another library's that cannot be read, with a warning. Raises CheckpointError for open_clip's.
    """
    name = CONFIGS.get(path.name)
    if not name or not path.with_name(name).is_file():
        return {}
    try:
        return read_json(path.with_name(name))
    except CheckpointError as error:
        if name == CONFIG_NAME:
            raise
        log.warning("%s; the shapes of the weights are read alone", error)
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """A configuration. Raises CheckpointError when it is missing, or no JSON object."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"), object_hook=_infinity)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent} is no model folder: {path.name} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds no configuration but a {type(config).__name__}")
    return config


def _infinity(value: dict[str, Any]) -> Any:
    """JSON has no infinity: transformers writes {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def load_config(folder: str | Path) -> dict[str, Any]:
    """The configuration `save_model` wrote. Raises CheckpointError when it is missing or has no model in it."""
    path = Path(folder) / CONFIG_NAME
    config = read_json(path)
    if "model_cfg" not in config:
        raise CheckpointError(f"{path} has no 'model_cfg'; it is not an open_clip configuration")
    return config
