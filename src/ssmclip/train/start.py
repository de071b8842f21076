"""The weights a run starts with: random, or those of trained models, taken key by key.

    model.weights -> the whole model; model.image_weights, model.text_weights -> one tower, after that

Keys are those of the run's model. Of what fits by name and shape everything is taken. The positions of a vision
transformer are resampled to the image size, and those of a text tower cut after its context length. What else differs
is an error, but for the projections and a classifier's head, which may be new.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import open_clip
import torch
from open_clip.hf_model import HFTextEncoder
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from ssmclip import models
from ssmclip.config import TrainConfig
from ssmclip.config.settings import ImageSize
from ssmclip.models.clip import OPEN_CLIP, list_clips
from ssmclip.models.files.hub import HUB
from ssmclip.models.files.weights import CONFIG_NAME, first_line, read_json
from ssmclip.models.names import TIMM, Source, source
from ssmclip.models.networks.mamba_text import LanguageModel, MambaText
from ssmclip.models.published.language_model import load_language_model
from ssmclip.models.published.read import load_published
from ssmclip.models.towers import behaviour, image_tower, is_clip
from ssmclip.train.blueprint import Blueprint
from ssmclip.train.checkpoint import write_text
from ssmclip.train.layers import classifier_keys

_LOG = logging.getLogger(__name__)
_NAMED = 6  # keys named in a message
START = "start.json"  # of a run's folder: what became of every key
_TEXT_PROJECTION = ("text_projection", "text.text_projection", "text.proj")
_NEW_IN_CLIP = ("logit_bias",)  # SigLIP's, which weights of a CLIP may lack
_IMAGE_PROJECTION = ("visual.head.", "visual.proj")

State = dict[str, Tensor]


@dataclass(frozen=True)
class Taken:
    """What became of the keys of a network that starts from other weights.

    taken: those that have the weights of the same name; fresh: those of the network that keep their random weights;
    left: those of the other weights that have no place in the network; changed: of those taken, what was done to them.
    """

    taken: tuple[str, ...]
    fresh: tuple[str, ...]
    left: tuple[str, ...]
    changed: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.taken)} of {len(self.taken) + len(self.fresh)} weights taken"]
        parts += [f"random: {_few(self.fresh)}"] if self.fresh else []
        parts += [f"not taken: {_few(self.left)}"] if self.left else []
        return "; ".join([*parts, *self.changed])


def take(
    network: nn.Module,
    given: State,
    replaceable: tuple[str, ...] = (),
    droppable: tuple[str, ...] = (),
    part: tuple[str, ...] = ("",),
) -> Taken:
    """Copy weights into a network where name and shape are the same, and return which.

    replaceable: prefixes of keys, such as a classifier's head, that may be missing on either side or have another
    shape; droppable: prefixes of given keys that may have no place; part: prefixes of the network's keys that are
    looked at. Any other difference raises CheckpointError.
    """
    own = {key: value for key, value in network.state_dict().items() if key.startswith(part)}
    fits = {key for key, value in own.items() if key in given and given[key].shape == value.shape}
    fresh = tuple(key for key in own if key not in fits)
    left = tuple(key for key in given if key not in fits)
    misfits = [key for key in fresh if not key.startswith(replaceable)]
    misfits += [key for key in left if not key.startswith((*replaceable, *droppable))]
    if misfits:
        described = [
            f"{key} {tuple(given[key].shape)}, the model's {tuple(own[key].shape)}"
            if key in own and key in given
            else f"{key} is {'missing' if key in own else 'not in the model'}"
            for key in dict.fromkeys(misfits)
        ]
        raise models.CheckpointError(f"{len(described)} of {len(own)} weights do not fit: {_few(described)}")
    with torch.no_grad():
        for key in fits:
            own[key].copy_(given[key])
    return Taken(tuple(sorted(fits)), fresh, left)


def load_start(
    model: nn.Module, config: TrainConfig, plan: Blueprint, checkpoint: Path | None
) -> dict[str, Taken] | None:
    """Load the initial weights: the checkpoint's, else those that the settings name.

    Returns what became of every key, by setting; None for a checkpoint, which has every weight.
    Raises ValueError, CheckpointError, FileNotFoundError, UnknownName.
    """
    if checkpoint:
        plan.load_checkpoint(model, checkpoint)
        return None
    settings = {
        "weights": (config.model.weights, _load_whole),
        "image_weights": (config.model.image_weights, _load_image),
        "text_weights": (config.model.text_weights, _load_text),
    }
    return {setting: load(model, config, plan) for setting, (name, load) in settings.items() if name}


def report_start(run: Path, taken: Mapping[str, Taken] | None, model: nn.Module, main: bool = True) -> None:
    """Log what was taken and what was not, and write every key of it to the run's folder, if anything was.

    taken: what `load_start` returned; main: whether this is the process that reports. A warning names parameters that
    are frozen with random weights.
    """
    if taken is None or not main:
        return
    for setting, keys in taken.items():
        _LOG.info("model.%s: %s", setting, keys)
    if taken:
        write_text(run / START, json.dumps({setting: vars(keys) for setting, keys in taken.items()}, indent=2) + "\n")
    known = {key for keys in taken.values() for key in keys.taken}
    random = [name for name, p in model.named_parameters() if not p.requires_grad and name not in known]
    if random:
        _LOG.warning("%d parameters are frozen with random weights: %s", len(random), _few(random))


# ---- the whole model


def _load_whole(model: nn.Module, config: TrainConfig, plan: Blueprint) -> Taken:
    name = config.model.weights
    known = source(name)
    if (known.config is None) != plan.labelled:
        kinds = ("an image encoder", "a CLIP")
        given, needed = kinds if known.config is None else kinds[::-1]
        raise ValueError(f"model.weights must be those of {needed} for {config.model.label} (got {name}, {given})")
    network = _network(known, config, config.image_size(config.steps) if plan.labelled else None)
    _warn_of_differences("weights", _statistics(known, network), network, model, plan)
    state = _under("text.", network.state_dict()) if hasattr(model, "text") else _over("text.", network.state_dict())
    state, changed = _fitted(state, network, model)
    with _explained(f"model.weights={name} are those of another model"):
        taken = take(model, state, classifier_keys(model) if plan.labelled else _NEW_IN_CLIP)
    if plan.labelled and taken.fresh:
        _shrink(model, taken.fresh, config.model.head_init_scale)
        _LOG.warning("the classifier's head is new, for %d classes: %s", len(plan.classes), ", ".join(taken.fresh))
    return replace(taken, changed=changed)


def _network(known: Source, config: TrainConfig, image_size: ImageSize | None = None) -> nn.Module:
    form = config.model.weights_form
    return known.load(image_size) if form == "online" else load_published(known.name, form)


def _shrink(model: nn.Module, keys: tuple[str, ...], scale: float) -> None:
    with torch.no_grad():
        for key in keys:
            model.get_parameter(key).mul_(scale)


# ---- the image tower


def _load_image(model: nn.Module, config: TrainConfig, plan: Blueprint) -> Taken:
    name = config.model.image_weights
    if plan.labelled:
        raise ValueError(f"model.image_weights must be empty for an image classifier: set model.weights={name}")
    known = source(name)
    network = _network(known, config)
    _warn_of_differences("image_weights", _statistics(known, network), network, model, plan)
    if is_clip(network):
        state, heads = network.state_dict(), ()
        state = {key: value for key, value in state.items() if key.startswith("visual.")}
    else:
        state = {f"visual.trunk.{key}": value for key, value in network.state_dict().items()}
        # Of a head in several layers the last is the classifier; those before it may belong to the tower.
        heads = tuple(f"visual.trunk.{key.partition('.')[0]}." for key in classifier_keys(network))
    state, changed = _fitted(state, network, model)
    with _explained(f"model.image_weights={name} do not fit the image tower of {config.model.label}"):
        taken = take(model, state, _IMAGE_PROJECTION, heads, part=("visual.",))
    return replace(taken, changed=changed)


# ---- the text tower


def _load_text(model: nn.Module, config: TrainConfig, plan: Blueprint) -> Taken:
    name, prefix = config.model.text_weights, "text." if hasattr(model, "text") else ""
    if plan.labelled:
        raise ValueError("model.text_weights must be empty for an image classifier, which has no text tower")
    if _is_language_model(name):
        state, changed = _language_model(model, config), ()
    else:
        network = _text_network(name, config.model.weights_form)
        _warn_of_differences("text_weights", None, network, model, plan)
        state, changed = _fitted(_text_state(network, prefix, name), network, model)
    part = tuple(key for key in model.state_dict() if not key.startswith(("visual.", "logit_")))
    with _explained(f"model.text_weights={name} do not fit the text tower of {config.model.label}"):
        taken = take(model, state, _TEXT_PROJECTION, (f"{prefix}transformer.pooler.",), part)
    return replace(taken, changed=changed)


def _is_language_model(name: str) -> bool:
    """Return whether a name is that of a model in Hugging Face's form: such a folder, or else a name on its hub."""
    folder = Path(name)
    if folder.is_dir():
        file = folder / "config.json"
        return not (folder / CONFIG_NAME).is_file() and file.is_file() and "model_type" in read_json(file)
    return not folder.exists() and not name.startswith((HUB, OPEN_CLIP, TIMM)) and name not in list_clips()


def _language_model(model: nn.Module, config: TrainConfig) -> State:
    """Return the weights of a language model in Hugging Face's form, in the names of the text tower."""
    name, text = config.model.text_weights, getattr(model, "text", None)
    if isinstance(text, MambaText):
        network = load_language_model(name)
    elif isinstance(text, HFTextEncoder):
        network = _from_hugging_face(name)
    else:
        raise ValueError(
            f"model.text_weights={name} is no CLIP, but a language model in Hugging Face's form, and the text tower of "
            f"{config.model.label} is none: name one in text_cfg.hf_model_name of model.changes, or take a model with "
            "a Mamba text tower"
        )
    return {f"text.transformer.{key}": value for key, value in network.state_dict().items()}


def _from_hugging_face(name: str) -> nn.Module:
    from transformers import AutoModel  # the text tower could not have been built without it

    try:
        network = AutoModel.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder with a language model nor could it be downloaded ({first_line(error)})"
        ) from error
    return network.encoder if network.config.is_encoder_decoder else network


def _text_network(name: str, form: str) -> nn.Module:
    """Return a CLIP, or a text tower alone."""
    path = Path(name)
    if name.startswith(HUB) or path.is_file() or (path.is_dir() and not (path / "checkpoints").is_dir()):
        return load_published(name, form)
    return source(name).load(None)


def _text_state(network: nn.Module, prefix: str, name: str) -> State:
    """Return the weights of the text tower, alone or of a CLIP, under the prefix."""
    state = network.state_dict()
    if isinstance(network, LanguageModel):
        state = {f"transformer.{key}": value for key, value in state.items()}
    elif not hasattr(network, "encode_text"):
        raise ValueError(f"model.text_weights must be those of a CLIP or a text tower (got {name}, an image encoder)")
    state = _over("text.", state)
    return {f"{prefix}{key}": value for key, value in state.items() if not key.startswith(("visual.", "logit_"))}


# ---- what is done to weights before they fit, and what does not show in them


def _over(prefix: str, state: State) -> State:
    return {key.removeprefix(prefix): value for key, value in state.items()}


def _under(prefix: str, state: State) -> State:
    """Return a CLIP's weights with those of its text tower under the prefix."""
    apart = ("visual.", "logit_", prefix)
    return {key if key.startswith(apart) else prefix + key: value for key, value in state.items()}


def _fitted(state: State, network: nn.Module, model: nn.Module) -> tuple[State, tuple[str, ...]]:
    """Return the weights with positions for the model's image size and text length, and what was changed.

    Raises ValueError for a text tower with more positions than there are weights for.
    """
    own, changed = model.state_dict(), []
    state = {
        key: value.reshape(own[key].shape) if key in own and value.numel() == own[key].numel() == 1 else value
        for key, value in state.items()
    }
    for key, resampled in _image_positions(state, network, model).items():
        state[key] = resampled
        changed.append(f"{key} resampled to {' x '.join(map(str, _grid(image_tower(model))))} patches")
    for key in ("positional_embedding", "text.positional_embedding"):
        if key in own and key in state and (long := len(state[key])) != (needed := len(own[key])):
            if long < needed:
                raise ValueError(
                    f"the text tower must have at most the {long} positions of the weights (got {needed}): set "
                    f'model.changes={{"text_cfg": {{"context_length": {long}}}}}'
                )
            state[key] = state[key][:needed]
            changed.append(f"{key} cut to the first {needed} of {long} positions")
    return state, tuple(changed)


def _image_positions(state: State, network: nn.Module, model: nn.Module) -> State:
    """Return a vision transformer's positions resampled to the model's grid of patches, {} where they fit."""
    old, new = _grid(image_tower(network)), _grid(image_tower(model))
    if old is None or new is None or old == new:
        return {}
    tower = image_tower(model)
    prefix = getattr(tower, "num_prefix_tokens", 1) if not getattr(tower, "no_embed_class", False) else 0
    resampled = {}
    for key in ("pos_embed", "visual.trunk.pos_embed", "visual.positional_embedding"):
        if key in state and key in model.state_dict() and state[key].shape != model.state_dict()[key].shape:
            positions = state[key] if state[key].ndim == 3 else state[key][None]
            fitted = resample_abs_pos_embed(positions, list(new), list(old), num_prefix_tokens=prefix)
            resampled[key] = fitted if state[key].ndim == 3 else fitted[0]
    return resampled


def _grid(tower: nn.Module) -> tuple[int, int] | None:
    """Return the rows and columns of a vision transformer's patches, None for another kind of tower."""
    grid = getattr(tower, "grid_size", None) or getattr(getattr(tower, "patch_embed", None), "grid_size", None)
    return grid and tuple(grid)


def _statistics(known: Source, network: nn.Module) -> tuple[tuple[float, ...], ...] | None:
    """Return the means and standard deviations that images of a network are normalised with, None if not known."""
    described = known.config["preprocess_cfg"] if known.config else getattr(network, "pretrained_cfg", None)
    described = described or open_clip.get_model_preprocess_cfg(network)
    if not described or described.get("mean") is None or described.get("std") is None:
        return None
    return tuple(map(float, described["mean"])), tuple(map(float, described["std"]))


def _warn_of_differences(
    setting: str,
    statistics: tuple[tuple[float, ...], ...] | None,
    network: nn.Module,
    model: nn.Module,
    plan: Blueprint,
) -> None:
    """Log what shapes do not show: other attention heads and activations, and images normalised another way."""
    theirs, own = behaviour(network), behaviour(model)
    other = [
        f"{name} {theirs[name]}, the model's {own[name]}" for name in own.keys() & theirs if theirs[name] != own[name]
    ]
    if other:
        _LOG.warning("model.%s come from a network that differs where shapes do not: %s", setting, _few(sorted(other)))
    if statistics and statistics != tuple(map(tuple, plan.statistics())):
        mean, std = (list(map(float, values)) for values in statistics)
        _LOG.warning(
            "model.%s were trained with images normalised by the mean %s and the standard deviation %s, unlike this "
            'run\'s: set model.preprocess={"mean": %s, "std": %s}',
            setting, mean, std, mean, std,
        )  # fmt: skip


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except models.CheckpointError as error:
        raise models.CheckpointError(f"{what}: {error}") from error


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (" …" if len(names) > _NAMED else "")
