"""Build what a run needs from its TrainConfig: the accelerator, the model, the stream of pairs."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import nn

from ssmclip.config import AugmentConfig, TrainConfig
from ssmclip.config.places import VARIABLE, data_folders, find_data, not_found
from ssmclip.config.settings import ImageSize
from ssmclip.data.pairs.augment import TimmTransform, TrainTransform, train_transform
from ssmclip.data.pairs.labelled import DATASET, classes_of, data_set
from ssmclip.data.pairs.loader import PairLoader, Remote, TableFormat, Weighted, open_pairs
from ssmclip.models.patch_dropout import set_patch_dropout
from ssmclip.models.text_towers import text_tower_of
from ssmclip.train import launch
from ssmclip.train.blueprint import Blueprint, blueprint
from ssmclip.train.layers import freeze, training_mode
from ssmclip.train.objective import OBJECTIVES, Objective
from ssmclip.train.trainee import Trainee

_LOG = logging.getLogger(__name__)
OWN_FIELDS = (
    "scale",
    "flip",
    "color_jitter",
    "color_jitter_prob",
    "gray_scale_prob",
    "gaussian_blur_prob",
    "solarize_prob",
    "interpolation",
    "color_order",
)
_NO_COLORS = {
    "color_jitter": 0.0,
    "color_jitter_prob": 1.0,
    "gray_scale_prob": 0.0,
    "gaussian_blur_prob": 0.0,
    "solarize_prob": 0.0,
}


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Return an Accelerator for this process, which runs alone or as one of several that a launcher started.

    train/launch.py decides which environment variables of launchers count; ignored ones are logged.
    Raises ValueError for fp16 without a GPU, for a batch that does not divide over the processes, and for modes of
    training that are not supported.
    """
    messages = launch.ignored(config, os.environ)
    AcceleratorState._reset_state()  # a process may train twice, with another precision; the process group stays
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # others wait while the main process validates
    accelerator = Accelerator(
        mixed_precision=config.precision, cpu=config.device == "cpu", kwargs_handlers=[patient], **launch.decided()
    )
    launch.check_devices(accelerator, config, os.environ)
    if accelerator.is_main_process:
        for message in messages:
            _LOG.warning(message)
    world = accelerator.num_processes
    if config.batch_size % world:
        raise ValueError(f"batch_size must be a multiple of the {world} processes (got {config.batch_size})")
    if is_sharded(accelerator) and (config.ema.decay is not None or config.validation.every):
        raise ValueError("FSDP supports no moving average and no validation: set ema.decay=none and validation.every=0")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def plan(config: TrainConfig) -> Blueprint:
    """Return the blueprint of a run's model; of a classifier, with the classes of its data.

    Raises FileNotFoundError and ValueError for data that do not say which classes they have, UnknownName.
    """
    if not OBJECTIVES[config.loss.kind].labelled:
        return blueprint(config)
    folders = data_folders(os.environ)
    if config.data.sources:
        if not config.data.classes:
            raise ValueError(
                "data.classes must be a file with the name of a class on each line, or their number, when data.sources "
                "has labelled images (got '')"
            )
        return blueprint(config, classes_of("", config.data.classes, _table_format(config)))
    with _naming_places([config.data.source], folders):
        source = _find_source(config.data.source, folders)
        return blueprint(config, classes_of(source, config.data.classes, _table_format(config)))


def build_objective(config: TrainConfig, rank: int = 0, world_size: int = 1, num_classes: int = 0) -> Objective:
    """Return the objective that `loss.kind` names, for this process. num_classes: of a classifier.

    Raises UnknownName for a name that is not registered, ValueError for an objective that has parameters, and for
    settings that it cannot do with.
    """
    OBJECTIVES[config.loss.kind].check(config)
    _check_views(config)
    if config.loss.mix.on:
        _check_even(config, world_size)
    made = OBJECTIVES[config.loss.kind](
        config.loss,
        rank=rank,
        world_size=world_size,
        views=config.data.views_per_image,
        captions=config.data.captions_per_image,
        num_classes=num_classes,
    )
    if names := [name for name, _ in made.named_parameters()]:
        raise ValueError(
            f"the objective {config.loss.kind!r} must not have parameters (got {', '.join(names)}): "
            "only the model's are trained and saved, so add them to the model with `start`, or to `heads`"
        )
    return made


def _check_views(config: TrainConfig) -> None:
    """Raise ValueError for views that the data cannot give the objective."""
    kind = OBJECTIVES[config.loss.kind]
    if (kind.further_views(config.loss) or kind.window) and config.data.augment.library != "own":
        raise ValueError(
            f"data.augment.library must be own for loss.kind={config.loss.kind}, which needs further views of each "
            f"image (got {config.data.augment.library})"
        )


def build_trainee(
    model: nn.Module, objective: Objective, heads_state: dict[str, Any] | None = None, sharded: bool = False
) -> nn.Module:
    """Return what the optimiser trains: the model, and with it the objective's heads, if it has some.

    heads_state: of the heads, when a run goes on; None for new ones. Raises ValueError for a model that they do not
    fit, and where weights are sharded.
    """
    heads = objective.heads(model)
    if heads is None:
        return model
    if sharded:
        raise ValueError(f"loss.kind must be one without heads under FSDP (got {objective.name}): use one process each")
    if heads_state is not None:
        heads.load_state_dict(heads_state)
    return Trainee(model, heads)


def _check_even(config: TrainConfig, world_size: int) -> None:
    """Raise ValueError if a micro-batch has an odd number of images, which cannot be mixed in pairs."""
    batch = config.batch_size // world_size
    micro_batch = min(config.loss.micro_batch or batch, batch)
    if micro_batch % 2 or (batch % micro_batch) % 2:
        raise ValueError(
            f"loss.mix needs an even number of images in each micro-batch (got batch_size={config.batch_size} on "
            f"{world_size} processes, loss.micro_batch={config.loss.micro_batch}): choose even numbers, or set "
            "loss.mix.mixup=0 and loss.mix.cutmix=0"
        )


def build_model(config: TrainConfig, plan: Blueprint, world_size: int = 1) -> nn.Module:
    """Return the model in training mode, frozen where the settings say so.

    Raises ValueError if it cannot take every image size of the schedule, and for layers to freeze that it lacks.
    """
    model = plan.create(config.model.grad_checkpointing)
    freeze(model, config.model)
    batch = config.batch_size // world_size
    if config.model.patch_drop_rate is not None:
        set_patch_dropout(model, config.model.patch_drop_rate)
    micro_batch = min(config.loss.micro_batch or batch, batch)
    alone = (batch % micro_batch or micro_batch) * config.data.views_per_image == 1  # batch norm has nothing to average
    probe = training_mode(copy.deepcopy(model), config.model) if alone else model.eval()
    name = "multi_sizes" if config.data.multi_sizes else "image_sizes"
    for size in config.data.sizes():
        sides = (size, size) if isinstance(size, int) else size
        pixels = " x ".join(map(str, dict.fromkeys(sides)))
        try:
            with torch.no_grad():
                plan.encode(probe, torch.zeros(1, 3, *sides))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts, others fail to add positions
            raise ValueError(
                f"{config.model.label} cannot take images of {pixels} pixels, one of data.{name}="
                f"{getattr(config.data, name)} ({error}). A model with fixed positions takes one size, ((0.0, SIZE),); "
                "a model with batch norm needs larger images, or several in each batch and micro-batch"
            ) from error
    return training_mode(model, config.model)


def open_stream(
    config: TrainConfig, plan: Blueprint, size: ImageSize, rank: int, world_size: int, cursor: Any = None
) -> PairLoader:
    """Return this process's stream of batches at an image size, starting at `cursor` (None: at the beginning).

    Raises FileNotFoundError naming every folder searched for a relative `data.source`; ValueError for length buckets
    with a text tower that sees the padding; what `open_pairs` raises.
    """
    data, text_cfg = config.data, plan.config.get("model_cfg", {}).get("text_cfg", {})
    if data.length_buckets and not (text_cfg and text_tower_of(text_cfg).ignores_padding):
        reason = "labels have no length" if plan.labelled else "its text tower's embeddings depend on the padding"
        raise ValueError(
            f"data.length_buckets must be 0 for {config.model.label} (got {data.length_buckets}): {reason}"
        )
    folders = data_folders(os.environ)
    names = [name for name, _ in data.sources] or [data.source]
    with _naming_places(names, folders):
        places = {name: _find_source(name, folders) for name in names}
        for name, place in places.items():
            if place != name and rank == 0:
                _LOG.info("reading %s", place)
        stream = open_pairs(
            [Weighted(places[name], weight, name) for name, weight in data.sources] or places[data.source],
            transform=_with_further(build_transform(data.augment, plan, size), config, plan),
            tokenize=plan.texts(),
            batch_size=config.batch_size // world_size,
            seed=config.seed,
            workers=config.data.workers,
            rank=rank,
            world_size=world_size,
            cursor=cursor,
            shuffle_buffer=config.data.shuffle_buffer,
            captions_per_image=config.data.captions_per_image,
            views_per_image=config.data.views_per_image,
            distinct=config.data.distinct,
            resample=data.resample,
            caption_shares=data.captions,
            stored_teacher=data.stored_teacher == "datacompdr",
            sizes=data.multi_sizes,
            length_buckets=data.length_buckets,
            pad_id=text_cfg.get("pad_id", 0),
            remote=Remote(data.retries, cache_dir=data.cache_dir, cache_gib=data.cache_gib),
            table_format=_table_format(config),
            labelled=plan.labelled,
        )
    images = stream.num_samples if plan.labelled else None
    if images is not None and images < config.batch_size:
        raise ValueError(
            f"{' and '.join(places.values())} has {images} images, fewer than a batch (got batch_size="
            f"{config.batch_size}): set batch_size to at most {images}"
        )
    return stream


def build_transform(augment: AugmentConfig, plan: Blueprint, size: ImageSize) -> TrainTransform | TimmTransform:
    """Return the augmentation of training images at a size, as `data.augment` describes it."""
    augment = augment if augment.colors else replace(augment, **_NO_COLORS)
    mean, std = plan.statistics()
    if augment.library == "own":
        given = {name: getattr(augment, name) for name in OWN_FIELDS}
        return train_transform(size, mean, std, **given)
    return TimmTransform(
        {
            "input_size": size,
            "mean": mean,
            "std": std,
            "scale": augment.scale,
            "hflip": 0.5 if augment.flip else 0.0,
            "color_jitter": augment.color_jitter,
            "color_jitter_prob": augment.color_jitter_prob if augment.color_jitter_prob < 1 else None,
            "grayscale_prob": augment.gray_scale_prob,
            "gaussian_blur_prob": augment.gaussian_blur_prob,
            "auto_augment": augment.auto_augment or None,
            "interpolation": augment.interpolation,
            "re_prob": augment.erase_prob,
            "re_mode": augment.erase_mode,
            "re_count": augment.erase_count,
        }
    )


def _with_further(
    transform: TrainTransform | TimmTransform, config: TrainConfig, plan: Blueprint
) -> TrainTransform | TimmTransform:
    """Return a transform that also makes the further views that the objective needs."""
    kind = OBJECTIVES[config.loss.kind]
    further = kind.further_views(config.loss)
    if not (further or kind.window):
        return transform
    made = tuple(build_transform(each, plan, transform.image_size) for each in further)
    return replace(transform, further=made, window=kind.window)


def _table_format(config: TrainConfig) -> TableFormat:
    data = config.data
    return TableFormat(data.image_column, data.caption_column, data.encoding, data.separator)


def _find_source(source: str, folders: Sequence[Path]) -> str:
    """Return a source below the first folder that contains it, also the data set that dataset:NAME stands for."""
    if not source.startswith(DATASET) or source.count(":") > 1:
        return find_data(source, folders)
    for folder in folders:
        with suppress(FileNotFoundError):
            data_set(place := f"{source}:{folder}")
            return place
    raise FileNotFoundError(
        f"no training split for {source} in {', '.join(str(folder.absolute()) for folder in folders)}: "
        f"pass {source}:FOLDER, or set {VARIABLE}"
    )


@contextmanager
def _naming_places(sources: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        missing = sources if len(sources) == 1 else [source for source in sources if source in str(error)][:1]
        raise FileNotFoundError(f"{error}{''.join(not_found(source, folders) for source in missing)}") from error
