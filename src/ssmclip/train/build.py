"""Build what a run needs from its TrainConfig: the accelerator, the model, the stream of pairs."""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import nn

from ssmclip import models
from ssmclip.config import TrainConfig
from ssmclip.config.places import data_folders, find_data, not_found
from ssmclip.config.settings import ImageSize
from ssmclip.data.pairs.loader import PairLoader, Remote, TableFormat, Weighted, open_pairs, train_transform
from ssmclip.models.files import weights
from ssmclip.models.published.language_model import load_language_model
from ssmclip.models.text_towers import text_tower_of
from ssmclip.train import launch
from ssmclip.train.objective import OBJECTIVES, Objective
from ssmclip.train.optimiser import freeze_text_tower

_LOG = logging.getLogger(__name__)


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


def model_config(config: TrainConfig) -> dict[str, Any]:
    """Return the model's configuration in open_clip's format, at the final image size of the training."""
    made = models.clip_config(
        config.model.name, image_size=config.image_size(config.steps), drop_path_rate=config.model.drop_path_rate
    )
    start = _merge(made["model_cfg"], dict(OBJECTIVES[config.loss.kind].start))
    return {**made, "model_cfg": _merge(start, config.model.changes)}


def build_objective(config: TrainConfig, rank: int = 0, world_size: int = 1) -> Objective:
    """Return the objective that `loss.kind` names, for this process.

    Raises UnknownName for a name that is not registered, ValueError for an objective that has parameters.
    """
    made = OBJECTIVES[config.loss.kind](
        config.loss,
        rank=rank,
        world_size=world_size,
        views=config.data.views_per_image,
        captions=config.data.captions_per_image,
    )
    if names := [name for name, _ in made.named_parameters()]:
        raise ValueError(
            f"the objective {config.loss.kind!r} must not have parameters (got {', '.join(names)}): "
            "only the model's are trained and saved, so add them to the model with `start`"
        )
    return made


def build_model(config: TrainConfig, architecture: dict[str, Any], world_size: int = 1) -> nn.Module:
    """Return the model in training mode. Raises ValueError if it cannot take every image size of the schedule."""
    model = models.create_clip(architecture, grad_checkpointing=config.model.grad_checkpointing)
    if config.model.freeze_text:
        freeze_text_tower(model)
    batch = config.batch_size // world_size
    micro_batch = min(config.loss.micro_batch or batch, batch)
    alone = (batch % micro_batch or micro_batch) * config.data.views_per_image == 1  # batch norm has nothing to average
    probe = copy.deepcopy(model).train() if alone else model.eval()
    name = "multi_sizes" if config.data.multi_sizes else "image_sizes"
    for size in config.data.sizes():
        sides = (size, size) if isinstance(size, int) else size
        pixels = " x ".join(map(str, dict.fromkeys(sides)))
        try:
            with torch.no_grad():
                probe.encode_image(torch.zeros(1, 3, *sides))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts, others fail to add positions
            raise ValueError(
                f"{config.model.name} cannot take images of {pixels} pixels, one of data.{name}="
                f"{getattr(config.data, name)} ({error}). A model with fixed positions takes one size, ((0.0, SIZE),); "
                "a model with batch norm needs larger images, or several in each batch and micro-batch"
            ) from error
    return model.train()


def load_start(model: nn.Module, config: TrainConfig, checkpoint: Path | None) -> None:
    """Load the initial weights: the checkpoint's, else those of `model.text_weights` into the text tower.

    Raises ValueError, CheckpointError, FileNotFoundError.
    """
    source = config.model.text_weights
    if checkpoint:
        state = models.load_state(checkpoint / weights.WEIGHTS_NAME)
        try:
            weights.load_into(model, state, checkpoint)
        except models.CheckpointError as error:
            raise models.CheckpointError(
                f"{error}. If an older version of this package began the run, delete {checkpoint.parents[1]} or choose "
                "another --out"
            ) from error
    elif source:
        if not isinstance(getattr(model, "text", None), models.mamba_text.MambaText):
            raise ValueError(f"model.text_weights must be none for {config.model.name}, which has no Mamba text tower")
        state = load_language_model(source).state_dict()
        weights.load_into(model.text.transformer, state, source)


def open_stream(
    config: TrainConfig, architecture: dict[str, Any], size: ImageSize, rank: int, world_size: int, cursor: Any = None
) -> PairLoader:
    """Return this process's stream of batches at an image size, starting at `cursor` (None: at the beginning).

    Raises FileNotFoundError naming every folder searched for a relative `data.source`; ValueError for length buckets
    with a text tower that sees the padding; what `open_pairs` raises.
    """
    data, text_cfg = config.data, architecture["model_cfg"].get("text_cfg", {})
    if data.length_buckets and not text_tower_of(text_cfg).ignores_padding:
        raise ValueError(
            f"data.length_buckets must be 0 for {config.model.name} (got {data.length_buckets}): "
            "its text tower's embeddings depend on the padding"
        )
    preprocess = architecture["preprocess_cfg"]
    transform = train_transform(
        size,
        preprocess.get("mean", OPENAI_DATASET_MEAN),
        preprocess.get("std", OPENAI_DATASET_STD),
        **dataclasses.asdict(config.data.augment),
    )
    folders = data_folders(os.environ)
    names = [name for name, _ in data.sources] or [data.source]
    places = {name: find_data(name, folders) for name in names}
    for name, place in places.items():
        if place != name and rank == 0:
            _LOG.info("reading %s", place)
    with _naming_places(names, folders):
        return open_pairs(
            [Weighted(places[name], weight, name) for name, weight in data.sources] or places[data.source],
            transform=transform,
            tokenize=models.build_tokenizer(architecture),
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
            table_format=TableFormat(
                config.data.image_column, config.data.caption_column, config.data.encoding, config.data.separator
            ),
        )


@contextmanager
def _naming_places(sources: Sequence[str], folders: Sequence[Path]) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        missing = sources if len(sources) == 1 else [source for source in sources if source in str(error)][:1]
        raise FileNotFoundError(f"{error}{''.join(not_found(source, folders) for source in missing)}") from error


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
