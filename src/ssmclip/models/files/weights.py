"""Read and write weights: safetensors, or a pickle with only tensors and plain containers."""

from __future__ import annotations

import argparse
import logging
import pickle
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from ssmclip.files import parse_json

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
    """A file that is not a checkpoint, is truncated, belongs to another model, or would run code."""


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
    """Return the first line of an error's message, or its type if the message is empty."""
    return (str(error) or type(error).__name__).splitlines()[0]


def load_state(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint file: a flat dict of tensors (.safetensors), or what torch.save wrote (anything else); of
    an index of shards (.index.json), the contents of all of them.

    Pickles are read with `weights_only=True`: one that would run code is refused. In addition to tensors and containers
    they may have what training scripts save with the weights: an argparse.Namespace, NumPy scalars, paths, a yacs
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
            raise CheckpointError(f"{path} is truncated or not a safetensors file ({error}): copy it again") from error
    try:
        with torch.serialization.safe_globals(HARMLESS):
            held = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is refused: it is not a torch checkpoint, or unpickling it would run code "
            f"({first_line(error)}). Only tensors and plain containers are read; ask its author to save the "
            "state_dict, or a .safetensors file"
        ) from error
    except (OSError, MemoryError):
        raise
    except Exception as error:  # torch raises another type for every way a file can be cut or foreign
        raise CheckpointError(f"{path} is truncated or not a torch checkpoint ({first_line(error)})") from error
    if not isinstance(held, dict):
        raise CheckpointError(f"{path} must contain a state dict, or a dict around one (got {type(held).__name__})")
    return held


def shards(index: Path) -> list[str]:
    """Return the files that an index names, all of them in its folder. Raises CheckpointError."""
    named = read_json(index).get("weight_map")
    if not isinstance(named, dict):
        raise CheckpointError(f"{index} has no 'weight_map': it is not an index of sharded weights")
    for name in named.values():
        if not isinstance(name, str) or name != Path(name).name or name.endswith(INDEX):
            raise CheckpointError(f"{index} must name files of weights in its own folder (got {name!r})")
    return sorted(set(named.values()))


def load_into(model: nn.Module, state: dict[str, Tensor], source: str | Path, told: int | None = 4) -> None:
    """Copy `state` into `model`, all of it or none.

    Raises CheckpointError naming every kind of mismatch, with the first `told` keys of each, or all if it is None.
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
    """Return the configuration of weights with a library's standard file name; {} for other names, if there is none,
    or if another library's cannot be read, with a warning. Raises CheckpointError for an unreadable one of open_clip.
    """
    name = CONFIGS.get(path.name)
    if not name or not path.with_name(name).is_file():
        return {}
    try:
        return read_json(path.with_name(name))
    except CheckpointError as error:
        if name == CONFIG_NAME:
            raise
        log.warning("%s; using only the shapes of the weights", error)
        return {}


def read_json(path: Path) -> dict[str, Any]:
    """Read a configuration. Raises CheckpointError when it is missing or not a JSON object."""
    try:
        config = parse_json(path.read_text(encoding="utf-8-sig"), object_hook=_infinity)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent} is not a model folder: {path.name} cannot be read ({error})") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must contain a JSON object (got {type(config).__name__})")
    return config


def _infinity(value: dict[str, Any]) -> Any:
    """Decode an infinity, which JSON lacks: transformers writes {"__float__": "Infinity"}."""
    return float(value["__float__"]) if value.keys() == {"__float__"} else value


def load_config(folder: str | Path) -> dict[str, Any]:
    """Read the configuration `save_model` wrote. Raises CheckpointError when it is missing or has no model."""
    path = Path(folder) / CONFIG_NAME
    config = read_json(path)
    if "model_cfg" not in config:
        raise CheckpointError(f"{path} is not an open_clip configuration: it has no 'model_cfg'")
    groups = {"model_cfg": config["model_cfg"], "preprocess_cfg": config.get("preprocess_cfg", {})}
    if isinstance(config["model_cfg"], dict):
        groups |= {f"model_cfg.{part}": config["model_cfg"].get(part) for part in ("vision_cfg", "text_cfg")}
    for name, group in groups.items():
        if not isinstance(group, dict):
            raise CheckpointError(f"{path} is not an open_clip configuration: {name} must be an object (got {group!r})")
    return config


@contextmanager
def described_by(path: Path | None) -> Iterator[None]:
    """Turn what building a model raises into CheckpointError, naming the configuration (None: leave it as it is)."""
    try:
        yield
    except (RuntimeError, TypeError, AttributeError, AssertionError, LookupError, ValueError, ArithmeticError) as error:
        if path is None or isinstance(error, CheckpointError):
            raise
        reason = first_line(error) if isinstance(error, KeyError) else f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(
            f"{path} does not describe a model that can be built ({reason}): restore the file, or choose another model"
        ) from error
