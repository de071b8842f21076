"""Classifiers: what their outputs stand for, their weights from a file, and how they are shown pictures.

A classifier is a timm model with a head, which gives a logit for each class.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import timm
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from timm.layers import apply_test_time_pool
from torch import Tensor, nn

from ssmclip.models.files.weights import load_into, load_state
from ssmclip.models.published.layout import Hints, MissingWeight, State, WrongShape, find_layout
from ssmclip.models.published.select import AVERAGED, select_weights
from ssmclip.models.towers import Size, as_size, is_clip, set_image_size

__all__ = ["View", "classes_of", "in_words", "load_checkpoint", "shown"]


def classes_of(network: nn.Module) -> tuple[str, ...]:
    """Return what a classifier's outputs stand for: the label names of its `pretrained_cfg`, else, by their number as
    timm tells them, the WordNet ids of an ImageNet's classes; () for any other network."""
    outputs = 0 if is_clip(network) else getattr(network, "num_classes", 0)
    if not outputs:
        return ()
    names = (getattr(network, "pretrained_cfg", None) or {}).get("label_names") or ()
    if len(names) == outputs and not isinstance(names, dict):
        return tuple(names)
    subset = infer_imagenet_subset(network)
    return tuple(ImageNetInfo(subset).label_names()) if subset else ()


def in_words(classes: Sequence[str], network: nn.Module) -> tuple[str, ...]:
    """Return classes in words: by the label descriptions of the network's `pretrained_cfg`, else by WordNet's lemmas
    where a class is one of its ids; a class without either is its own name."""
    described = (getattr(network, "pretrained_cfg", None) or {}).get("label_descriptions") or {}
    if not isinstance(described, dict):
        described = dict(zip(classes, described, strict=True)) if len(described) == len(classes) else {}
    return tuple(described.get(name) or _lemmas(name) for name in classes)


def _lemmas(name: str) -> str:
    try:
        return _wordnet().label_name_to_description(name)
    except KeyError:
        return name


@cache
def _wordnet() -> ImageNetInfo:
    """Its lemmas are those of every ImageNet, whichever subset it is asked for."""
    return ImageNetInfo()


# ---- weights


def load_checkpoint(create: Callable[..., nn.Module], file: str | Path) -> nn.Module:
    """Return a timm model with the weights of a file, which are in its own names or in a published layout's.

    create: timm's function of the model, which takes `num_classes`; a file with another number of classes than the
    model's usual one gives a model with that many. Where a file has both, timm takes the averaged weights.
    Raises FileNotFoundError, and CheckpointError, key by key, for weights of another model.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"no checkpoint file at {file}")
    network = create()
    try:
        timm.models.load_checkpoint(network, str(file))
        return network
    except (RuntimeError, KeyError, TypeError, ValueError):  # other names, other shapes, or nothing that timm reads
        state = _read(file)
    outputs = _outputs(network, state)
    if outputs is not None and outputs != network.num_classes:
        network = create(num_classes=outputs)
    load_into(network, state, file)
    return network


def _read(file: str | Path) -> State:
    """Return a file's weights, averaged if it has such, in timm's names where they are in a layout's."""
    contents = load_state(file)
    averaged = any(key in contents for key in AVERAGED)
    state = select_weights(contents, "ema" if averaged else "online", str(file))
    layout = find_layout(state, "encoder")
    try:
        return layout.read(state, Hints()).weights if layout else state
    except (MissingWeight, WrongShape):  # its names, and not its architectures: told apart key by key
        return state


def _outputs(network: nn.Module, state: State) -> int | None:
    """Return the number of classes that weights are for, None where the classifier is not among them."""
    head = f"{(getattr(network, 'pretrained_cfg', None) or {}).get('classifier')}.weight"
    return len(state[head]) if head in state and state[head].ndim else None


# ---- pictures


@dataclass(frozen=True)
class View:
    """How a classifier is shown pictures where that is not as its `pretrained_cfg` says; None, False: as it says.

    image_size: pixels, or (height, width); crop_pct: the part of the resized picture's shorter side that the crop
    keeps, above 0 up to 1; test_size: whether pictures have timm's test size for the model (and crop_pct), where there
    is one; test_pool: whether timm's pooling at test time is used above the training size, where the crop keeps all.
    Raises ValueError for a crop_pct outside its range.
    """

    image_size: int | Size | None = None
    crop_pct: float | None = None
    test_size: bool = False
    test_pool: bool = False

    def __post_init__(self):
        if self.crop_pct is not None and not 0 < self.crop_pct <= 1:
            raise ValueError(f"crop_pct must be above 0 and at most 1 (got {self.crop_pct:g})")


def shown(network: nn.Module, view: View) -> tuple[nn.Module, Callable[[Any], Tensor]]:
    """Return a classifier and its preprocessing, PIL image -> (3, H, W), as timm's validate.py would show it pictures.

    The network is made for their size; with test_pool it may be a copy, wrapped. Raises ValueError for a size it cannot
    take and for a network that timm cannot pool at test time.
    """
    asked = {} if view.image_size is None else {"input_size": (3, *as_size(view.image_size))}
    config = resolve_model_data_config(network, asked | {"crop_pct": view.crop_pct}, use_test_size=view.test_size)
    set_image_size(network, tuple(config["input_size"][1:]))
    if view.test_pool:
        network, pooled = _pooled(network, config, view.test_size)
        config |= {"crop_pct": 1.0} if pooled else {}
    return network, create_transform(**config)


def _pooled(network: nn.Module, config: dict[str, Any], test_size: bool) -> tuple[nn.Module, bool]:
    classes, described = network.num_classes, network.pretrained_cfg
    try:
        network, pooled = apply_test_time_pool(copy.deepcopy(network), config, test_size)
    except (AttributeError, RuntimeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{type(network).__name__} cannot be pooled at test time, which takes a convolution network with one "
            f"linear layer behind its pooling: leave test_pool out ({error})"
        ) from error
    if pooled:
        network.num_classes, network.pretrained_cfg = classes, described
    return network.eval(), pooled
