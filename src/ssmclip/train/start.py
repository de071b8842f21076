"""The weights a run starts with: random, or those of a trained model, taken key by key."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmclip import models
from ssmclip.config import TrainConfig
from ssmclip.models.files import weights
from ssmclip.models.names import source
from ssmclip.models.published.language_model import load_language_model
from ssmclip.train.blueprint import Blueprint

_LOG = logging.getLogger(__name__)
_NAMED = 6  # keys named in a message


@dataclass(frozen=True)
class Taken:
    """What became of the keys of a network that starts from other weights.

    taken: those that have the weights of the same name; fresh: those of the network that keep their random weights;
    left: those of the other weights that have no place in the network.
    """

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} of {len(self.taken) + len(self.fresh)} weights taken"]
        parts += [f"random: {_few(self.fresh)}"] if self.fresh else []
        parts += [f"not taken: {_few(self.left)}"] if self.left else []
        return "; ".join(parts)


def take(network: nn.Module, given: dict[str, Tensor], replaceable: tuple[str, ...] = ()) -> Taken:
    """Copy weights into a network where name and shape are the same, and return which.

    replaceable: prefixes of keys, such as a classifier's head, that may be missing or have another shape. Any other
    difference raises CheckpointError.
    """
    own = network.state_dict()
    fits = {key for key, value in own.items() if key in given and given[key].shape == value.shape}
    fresh = tuple(key for key in own if key not in fits)
    left = tuple(key for key in given if key not in fits)
    if misfits := [key for key in (*fresh, *left) if not key.startswith(replaceable)]:
        described = [
            f"{key} {tuple(given[key].shape)}, the model's {tuple(own[key].shape)}"
            if key in own and key in given
            else key
            for key in dict.fromkeys(misfits)
        ]
        raise models.CheckpointError(f"{len(described)} of {len(own)} weights do not fit: {_few(described)}")
    network.load_state_dict({key: given[key] if key in fits else value for key, value in own.items()})
    return Taken(tuple(sorted(fits)), fresh, left)


def load_start(model: nn.Module, config: TrainConfig, plan: Blueprint, checkpoint: Path | None) -> None:
    """Load the initial weights: the checkpoint's, else those that the settings name.

    Raises ValueError, CheckpointError, FileNotFoundError, UnknownName.
    """
    if checkpoint:
        plan.load_checkpoint(model, checkpoint)
        return
    if config.model.weights:
        _load_whole(model, config, plan)
    if config.model.text_weights:
        _load_text(model, config)


def _load_whole(model: nn.Module, config: TrainConfig, plan: Blueprint) -> None:
    name = config.model.weights
    known = source(name)
    if (known.config is None) != plan.labelled:
        kinds = ("an image encoder", "a CLIP")
        given, needed = kinds if known.config is None else kinds[::-1]
        raise ValueError(f"model.weights must be those of {needed} for {config.model.name} (got {name}, {given})")
    size = config.image_size(config.steps)
    given = known.load(size if plan.labelled else None).state_dict()
    heads = _classifier_keys(model) if plan.labelled else ()
    try:
        taken = take(model, given, heads)
    except models.CheckpointError as error:
        raise models.CheckpointError(f"model.weights={name} are those of another model: {error}") from error
    if taken.fresh:
        _shrink(model, taken.fresh, config.model.head_init_scale)
        _LOG.warning("the classifier's head is new, for %d classes: %s", len(plan.classes), ", ".join(taken.fresh))
    _LOG.info("%s: %s", name, taken)


def _classifier_keys(model: nn.Module) -> tuple[str, ...]:
    """Return the prefixes of the keys of a timm model's last layers, one for each of its heads."""
    names = model.pretrained_cfg.get("classifier") or ()
    return tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))


def _shrink(model: nn.Module, keys: tuple[str, ...], scale: float) -> None:
    with torch.no_grad():
        for key in keys:
            model.get_parameter(key).mul_(scale)


def _load_text(model: nn.Module, config: TrainConfig) -> None:
    if not isinstance(getattr(model, "text", None), models.mamba_text.MambaText):
        raise ValueError(f"model.text_weights must be none for {config.model.name}, which has no Mamba text tower")
    state = load_language_model(config.model.text_weights).state_dict()
    weights.load_into(model.text.transformer, state, config.model.text_weights)


def _few(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
