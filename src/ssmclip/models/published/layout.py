"""The interface of readers of published weights: `Layout`, one per file of this package, each registered in `LAYOUTS`.

    state dict in some code base's names -> fits(state)? -> read(state, hints) -> Architecture, in this package's names

A layout from outside this package is one entry too: `LAYOUTS.register("name")(Layout(...))`. The last registered that
fits is the one that reads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from ssmclip.models.files.weights import CheckpointError
from ssmclip.registry import Registry

__all__ = [
    "LAYOUTS",
    "Architecture",
    "Hints",
    "Layout",
    "MissingWeight",
    "State",
    "UnknownLayout",
    "WrongShape",
    "find_layout",
    "shape",
]

log = logging.getLogger(__name__)

State = dict[str, Tensor]
Kind = Literal["clip", "encoder", "text", "language_model"]


@dataclass(frozen=True)
class Hints:
    """Properties of a model that shapes cannot tell. None: use the configuration or a registered model, else a guess.

    text_heads: of CLIP's text transformer; quick_gelu: whether CLIP's transformers use QuickGELU rather than GELU;
    image_size: pixels, or (height, width), that a CLIP's images have; n_groups, layer_norm_epsilon: of a Mamba language
    model; act_layer: activation of a MambaOut, in timm's words ("gelu", "silu"); conv_act: whether a VMamba has a GELU
    after the convolutions of its stem and its halvings.
    """

    text_heads: int | None = None
    quick_gelu: bool | None = None
    image_size: int | tuple[int, int] | None = None
    n_groups: int | None = None
    layer_norm_epsilon: float | None = None
    act_layer: str | None = None
    conv_act: bool | None = None


@dataclass(frozen=True)
class Architecture:
    """The description of a model, and its weights under the names that the built model uses.

    config: for a CLIP, open_clip's {"model_cfg": ..., "preprocess_cfg": ...}; for an encoder, timm's name and
    arguments, {"architecture": ..., "model_args": ...}; for the others, their fields;
    pretrained_cfg: for an encoder, timm's description of its preprocessing and classes, None for the architecture's.
    """

    kind: Kind
    config: dict[str, Any]
    weights: State
    pretrained_cfg: dict[str, Any] | None = None


@dataclass(frozen=True)
class Layout:
    """A code base's naming scheme for weights.

    title: the family's name in error messages; kind: of the model it reads, and those of kind "encoder" also read the
    image tower of a CLIP; fits: whether the names of a state dict are this layout's; read: (state, hints) ->
    architecture, raises CheckpointError for weights that are missing or have other shapes than the layout gives them.
    """

    title: str
    kind: Kind
    fits: Callable[[State], bool]
    read: Callable[[State, Hints], Architecture]


LAYOUTS: Registry[Layout] = Registry("layout of weights")


class UnknownLayout(CheckpointError):
    """An error for weights in no registered layout."""


class MissingWeight(CheckpointError):
    """A weight that the layout needs and the file does not have."""


class WrongShape(CheckpointError):
    """A weight whose shape no model of its layout can have."""


def find_layout(state: State, kind: Kind | None = None) -> Layout | None:
    """Return the layout that these weights are in, of any kind or of one; None if there is none."""
    fitting = [layout for _, layout in LAYOUTS.items() if kind in (None, layout.kind) and layout.fits(state)]
    return fitting[-1] if fitting else None


def shape(state: State, key: str, axes: int) -> tuple[int, ...]:
    """Return the shape of a weight, which must have this many axes.

    Raises MissingWeight, and WrongShape where it has other axes or no numbers.
    """
    if key not in state:
        raise MissingWeight(f"has no {key!r}, which is needed to determine the architecture")
    sizes = tuple(state[key].shape)
    if len(sizes) != axes or 0 in sizes:
        raise WrongShape(f"{key} must have {axes} axes, none of them empty (got {sizes})")
    return sizes


def guess(hint: Any, name: str, value: Any) -> Any:
    """Return the hint, else `value`, with a warning in the log that it is a guess and how to correct it."""
    if hint is not None:
        return hint
    log.warning("guessing %s=%s, which the weights do not determine; if it is wrong, pass %s", name, value, name)
    return value


def has(state: State, *prefixes: str) -> bool:
    """Return whether some key begins with one of these."""
    return any(key.startswith(prefixes) for key in state)


def under(state: State, prefix: str) -> State:
    """Return the weights whose keys begin with `prefix`, without it."""
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def rename(state: State, prefixes: dict[str, str]) -> State:
    """Return the weights with each key's prefix replaced by its new one."""
    renamed = {}
    for key, value in state.items():
        old = next((prefix for prefix in prefixes if key.startswith(prefix)), "")
        renamed[prefixes.get(old, "") + key.removeprefix(old)] = value
    return renamed
