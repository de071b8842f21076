"""Select weights in a file: online or averaged, without the prefixes that training added to their names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmclip.models.files.weights import CheckpointError
from ssmclip.models.published.layout import State

__all__ = ["WEIGHTS", "select_weights"]

WEIGHTS = ("online", "ema", "ema_online_bn")
ONLINE, AVERAGED = ("state_dict", "model"), ("model_ema", "state_dict_ema")
BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def select_weights(contents: Mapping[str, Any], weights: str, source: str = "the state dict") -> State:
    """Return the state dict in what a file holds, online or averaged.

    weights: one of WEIGHTS. An average is kept as a state dict of its own ("model_ema"), or together with the online
    weights, with "_e" at the end of the first part of their names. A file with an average alone gives it as "online".
    Raises CheckpointError, and ValueError for other `weights`.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, WEIGHTS))} (got {weights!r})")
    online = next((contents[key] for key in ONLINE if isinstance(contents.get(key), Mapping)), None)
    averaged = next((contents[key] for key in AVERAGED if isinstance(contents.get(key), Mapping)), None)
    if online is None:
        online = averaged if averaged is not None else contents
    online = unwrap(online, source)
    if averaged is not None:
        averaged = unwrap(averaged, source)
    else:
        online, averaged = _split(online)
    if weights == "online":
        return online
    if averaged is None:
        raise CheckpointError(f"{source} contains no moving average: pass weights='online'")
    if weights == "ema":
        return averaged
    return averaged | {key: online[key] for key in averaged if key.endswith(BUFFERS)}


def unwrap(state: Mapping[str, Any], source: str) -> State:
    """Return the state without the prefixes of DistributedDataParallel and torch.compile.

    Raises CheckpointError where something else than tensors with names is in it.
    """
    other = [key for key, value in state.items() if not isinstance(key, str) or not isinstance(value, Tensor)]
    if other or not state:
        why = f"{', '.join(map(str, other[:4]))} are no tensors with a name" if other else "it is empty"
        raise CheckpointError(
            f"{source} contains no state dict: {why}. It must be a flat dict of tensors, or have one under any of "
            f"{', '.join(ONLINE + AVERAGED)}"
        )
    for prefix in ("module.", "_orig_mod.", "module."):
        if all(key.startswith(prefix) for key in state):
            state = {key.removeprefix(prefix): value for key, value in state.items()}
    return dict(state)


def _split(state: State) -> tuple[State, State | None]:
    """Split a state dict into the online weights and the averaged ones."""
    averages = {_online_name(key): value for key, value in state.items() if _online_name(key) != key}
    online = {key: value for key, value in state.items() if _online_name(key) == key}
    return online, online | averages if averages else None


def _online_name(key: str) -> str:
    first, dot, rest = key.partition(".")
    return first.removesuffix("_e") + dot + rest
