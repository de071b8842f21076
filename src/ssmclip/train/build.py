"""From a TrainConfig to the things a run needs: the accelerator, the model, the stream of pairs."""

from __future__ import annotations

import copy
import dataclasses
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
from ssmclip.data.pairs.loader import PairLoader, TableFormat, open_pairs, train_transform
from ssmclip.models.files import weights
from ssmclip.models.published.language_model import load_language_model
from ssmclip.train.optimiser import freeze_text_tower

# SigLIP's own start (Zhai et al. 2023, arXiv:2303.15343, section 4.2): every pair of the batch but one is a negative.
_SIGLIP_START = {"init_logit_scale": 2.302585092994046, "init_logit_bias": -10.0}


def build_accelerator(config: TrainConfig) -> Accelerator:
    """Accelerate's view of this process: alone, or one of several that `accelerate launch` or `torchrun` started.

    Raises ValueError for fp16 without a GPU, and for a batch that doesn't divide over the processes.
    """
    if config.precision == "fp16" and (config.device == "cpu" or not torch.cuda.is_available()):
        raise ValueError('precision="fp16" needs a GPU; here "no" (float32) or "bf16" would do')
    AcceleratorState._reset_state()  # a process may train twice, with another precision; the process group stays
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))  # others wait while the main process validates
    accelerator = Accelerator(mixed_precision=config.precision, cpu=config.device == "cpu", kwargs_handlers=[patient])
    world = accelerator.num_processes
    if config.batch_size % world:
        raise ValueError(f"batch_size={config.batch_size} doesn't divide over {world} processes")
    if is_sharded(accelerator) and (config.ema.decay is not None or config.validation.every):
        raise ValueError("with FSDP no process holds the whole model: set ema.decay=none and validation.every=0")
    return accelerator


def is_sharded(accelerator: Accelerator) -> bool:
    return accelerator.distributed_type == DistributedType.FSDP


def model_config(config: TrainConfig) -> dict[str, Any]:
    """The model's configuration in open_clip's form, at the image size that training ends with."""
    made = models.clip_config(
        config.model.name, image_size=config.data.image_sizes[-1][1], drop_path_rate=config.model.drop_path_rate
    )
    changes = config.model.changes
    if config.loss.kind == "siglip":
        changes = _SIGLIP_START | changes
    return {**made, "model_cfg": _merge(made["model_cfg"], changes)}


def build_model(config: TrainConfig, architecture: dict[str, Any], world_size: int = 1) -> nn.Module:
    """The model in training mode, after a look that it takes every image size of the schedule. Raises ValueError."""
    model = models.create_clip(architecture, grad_checkpointing=config.model.grad_checkpointing)
    if config.model.freeze_text:
        freeze_text_tower(model)
    batch = config.batch_size // world_size
    micro_batch = min(config.loss.micro_batch or batch, batch)
    alone = (batch % micro_batch or micro_batch) * config.data.views_per_image == 1  # batch norm has nothing to average
    probe = copy.deepcopy(model).train() if alone else model.eval()
    for _, size in config.data.image_sizes:
        try:
            with torch.no_grad():
                probe.encode_image(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as error:  # timm asserts, others fail to add positions
            raise ValueError(
                f"{config.model.name} can't take images of {size} pixels among data.image_sizes="
                f"{config.data.image_sizes} ({error}). A model with fixed positions takes one size, ((0.0, SIZE),); "
                "one with batch norm, larger images or more than one in a batch and in each micro-batch"
            ) from error
    return model.train()


def load_start(model: nn.Module, config: TrainConfig, checkpoint: Path | None) -> None:
    """The weights a run goes on with, or begins with: the checkpoint's, else `model.text_weights` in the text tower.

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
            raise ValueError(f"model.text_weights is for Mamba text towers; {config.model.name} has none")
        state = load_language_model(source).state_dict()
        weights.load_into(model.text.transformer, state, source)


def open_stream(
    config: TrainConfig, architecture: dict[str, Any], size: int, rank: int, world_size: int, cursor: Any = None
) -> PairLoader:
    """This process's stream of batches at an image size, from `cursor` on (None: from the start)."""
    preprocess = architecture["preprocess_cfg"]
    transform = train_transform(
        size,
        preprocess.get("mean", OPENAI_DATASET_MEAN),
        preprocess.get("std", OPENAI_DATASET_STD),
        **dataclasses.asdict(config.data.augment),
    )
    return open_pairs(
        config.data.source,
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
        table_format=TableFormat(
            config.data.image_column, config.data.caption_column, config.data.encoding, config.data.separator
        ),
    )


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged
