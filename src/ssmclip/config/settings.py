"""What a training run is: frozen dataclasses, read from a recipe, changed by `--set`, kept as JSON beside the weights.

A recipe is a Python file with one public function that returns a TrainConfig. Needs no torch.

>>> from ssmclip.config import apply_overrides, from_dict, to_dict
>>> config = apply_overrides(TrainConfig(), ["lr=3e-4", "model.drop_path_rate=0.1", "image_sizes=[[0, 32], [0.5, 64]]"])
>>> config.optimiser.lr, config.model.drop_path_rate, config.data.image_sizes
(0.0003, 0.1, ((0.0, 32), (0.5, 64)))
>>> from_dict(to_dict(config)) == config
True
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class ModelConfig:
    """The network, made by `ssmclip.models.create_clip`, with fresh weights unless said otherwise."""

    name: str = "CLIP-VMamba-Nano"  # one of `ssmclip models`, or open_clip:NAME
    drop_path_rate: float | None = None  # stochastic depth at the deepest block, in [0, 1); None: the model's own
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the forward pass
    text_weights: str = ""  # folder of the Mamba language model the text tower starts from, in Hugging Face's form
    freeze_text: bool = False  # the text tower keeps the weights it starts with; its projection learns
    changes: dict[str, Any] = field(default_factory=dict)  # merged into the model's configuration, open_clip's form


@dataclass(frozen=True)
class AugmentConfig:
    """What happens to a training image; the arguments of `ssmclip.data.pairs.loader.train_transform`."""

    scale: tuple[float, float] = (0.5, 1.0)  # share of the image's area that a random crop keeps
    flip: bool = False  # mirror half of the images; wrong wherever captions say left and right, or show digits
    # Strength of random brightness, contrast and saturation; or of each of them, and of hue (in turns).
    color_jitter: float | tuple[float, float, float, float] = 0.0
    color_jitter_prob: float = 1.0  # share of the images whose colours are jittered; the others below are alike
    gray_scale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0  # sigma 0.1 to 2 pixels
    solarize_prob: float = 0.0  # values of 128 and above are inverted

    def __post_init__(self):
        for name in ("color_jitter_prob", "gray_scale_prob", "gaussian_blur_prob", "solarize_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"data.augment.{name}={getattr(self, name)}: wanted a share, 0 to 1")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"data.augment.scale={self.scale}: wanted two shares above 0, the smaller one first")
        strengths = self.color_jitter if isinstance(self.color_jitter, tuple) else (self.color_jitter,)
        if min(strengths) < 0 or max(strengths[3:], default=0) > 0.5:
            raise ValueError(f"data.augment.color_jitter={self.color_jitter}: wanted at least 0, of hue at most 0.5")


@dataclass(frozen=True)
class DataConfig:
    """Where pairs come from."""

    source: str = (
        "synthetic:quickstart"  # shards, a csv/tsv/parquet file or synthetic:NAME; see ssmclip.data.pairs.loader
    )
    image_sizes: tuple[tuple[float, int], ...] = ((0.0, 64),)  # (from this share of the steps on, pixels); first at 0
    augment: AugmentConfig = AugmentConfig()
    workers: int = 0  # processes that decode images, per training process; 0: the training process itself
    shuffle_buffer: int = 2048  # samples of a shard stream that are shuffled together
    captions_per_image: int = 1  # drawn each time an image is seen; the loss is the mean of theirs
    views_per_image: int = 1  # augmented differently, each time an image is seen; the loss is the mean of theirs
    image_column: str = ""  # of a table; "": the first known name, see ssmclip.data.pairs.tables
    caption_column: str = ""
    encoding: str = "utf-8"  # of a csv or tsv file
    separator: str = ""  # of a csv or tsv file: a character or tab, semicolon ...; "": the one its header shows

    def __post_init__(self):
        starts = [start for start, _ in self.image_sizes]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
            raise ValueError(
                f"data.image_sizes={self.image_sizes!r}: wanted pairs (share, pixels) whose shares start at 0.0, rise, "
                "and stay under 1, such as ((0.0, 48), (0.6, 64))"
            )
        if any(size < 1 for _, size in self.image_sizes):
            raise ValueError(f"data.image_sizes={self.image_sizes!r}: an image size is at least 1 pixel")


@dataclass(frozen=True)
class OptimiserConfig:
    """AdamW."""

    lr: float = 1e-3  # at the end of the warm-up
    block_lr_scale: float = 1.0  # the learning rate of the image tower's residual blocks, over lr
    text_lr_scale: float = 1.0  # the text tower's learning rate, its projection's apart, over lr
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_rule: Literal["ssm", "original"] = "ssm"  # which parameters it applies to; see train/optimiser.py
    clip_norm: float | None = 1.0  # gradients are scaled down to this norm; None: never


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate: linear warm-up, then half a cosine. See train/optimiser.py."""

    warmup_steps: int = 100
    start_lr: float = 1e-6  # at the first step
    end_lr: float = 1e-5  # approached at the last


@dataclass(frozen=True)
class LossConfig:
    """The objective."""

    kind: Literal["clip", "siglip"] = "clip"  # softmax over the batch, or a sigmoid for every pair
    micro_batch: int | None = None  # pairs embedded at a time per process (GradCache); None: the whole batch
    view_weight: float = 0.0  # of the loss between two views of an image, added (SLIP); needs views_per_image > 1
    max_logit_scale: float = 100.0  # logit_scale is clamped to [0, ln of this] after every step


@dataclass(frozen=True)
class EmaConfig:
    """A moving average of weights and buffers. With one, the average is what is validated and saved for use."""

    decay: float | None = None  # per step, such as 0.999; None: no average
    # warmup: low at first, so that the random weights are soon forgotten; cosine: from decay towards 1 at the last step
    schedule: Literal["constant", "warmup", "cosine"] = "constant"


@dataclass(frozen=True)
class ValidationConfig:
    """What is measured while training."""

    every: int = 0  # steps; 0: never
    tasks: tuple[str, ...] = ()  # names that `ssmclip evaluate --tasks` takes
    root: str = ""  # folder of the evaluation data
    best: str = ""  # "task/metric" whose highest value marks the best checkpoint; "": none is marked


@dataclass(frozen=True)
class CheckpointConfig:
    """When the run can be continued from."""

    every: int = 1000  # steps; the last step is always saved
    keep: int = 2  # newest checkpoints kept (the best one is kept besides)


@dataclass(frozen=True)
class LoggingConfig:
    """What is said while training."""

    every: int = 10  # steps between rows in rows.jsonl and TensorBoard
    tensorboard: bool = True
    progress: bool = True  # the bar


@dataclass(frozen=True)
class TrainConfig:
    """One training run. Nested fields are written with a dot, or by their last name where only one field has it."""

    steps: int = 1000  # optimiser steps
    batch_size: int = 128  # pairs per step, over all processes
    seed: int = 0
    precision: Literal["no", "bf16", "fp16"] = "no"  # mixed precision; "no" is float32
    device: Literal["auto", "cpu"] = "auto"  # auto: the accelerator where there is one
    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    optimiser: OptimiserConfig = OptimiserConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    loss: LossConfig = LossConfig()
    ema: EmaConfig = EmaConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()

    def __post_init__(self):
        at_least = {
            "steps": (self.steps, 1),
            "batch_size": (self.batch_size, 1),
            "seed": (self.seed, 0),
            "model.drop_path_rate": (self.model.drop_path_rate, 0),
            "data.workers": (self.data.workers, 0),
            "data.shuffle_buffer": (self.data.shuffle_buffer, 1),
            "data.captions_per_image": (self.data.captions_per_image, 1),
            "data.views_per_image": (self.data.views_per_image, 1),
            "optimiser.block_lr_scale": (self.optimiser.block_lr_scale, 0),
            "optimiser.text_lr_scale": (self.optimiser.text_lr_scale, 0),
            "optimiser.weight_decay": (self.optimiser.weight_decay, 0),
            "schedule.warmup_steps": (self.schedule.warmup_steps, 0),
            "schedule.start_lr": (self.schedule.start_lr, 0),
            "schedule.end_lr": (self.schedule.end_lr, 0),
            "loss.micro_batch": (self.loss.micro_batch, 1),
            "loss.view_weight": (self.loss.view_weight, 0),
            "ema.decay": (self.ema.decay, 0),
            "validation.every": (self.validation.every, 0),
            "checkpoint.every": (self.checkpoint.every, 1),
            "checkpoint.keep": (self.checkpoint.keep, 1),
            "logging.every": (self.logging.every, 1),
        }
        above = {
            "optimiser.lr": (self.optimiser.lr, 0),
            "optimiser.eps": (self.optimiser.eps, 0),
            "optimiser.clip_norm": (self.optimiser.clip_norm, 0),
            "loss.max_logit_scale": (self.loss.max_logit_scale, 1),
        }
        below = {
            "seed": (self.seed, 2**63),
            "model.drop_path_rate": (self.model.drop_path_rate, 1),
            "ema.decay": (self.ema.decay, 1),
        }
        for wanted, fits, values in (
            ("at least", operator.ge, at_least),
            ("more than", operator.gt, above),
            ("less than", operator.lt, below),
        ):
            for name, (value, bound) in values.items():
                if value is not None and not fits(value, bound):
                    raise ValueError(f"{name}={value}: wanted {wanted} {bound}")
        if not all(0 <= beta < 1 for beta in self.optimiser.betas):
            raise ValueError(f"optimiser.betas={self.optimiser.betas}: wanted at least 0, less than 1")
        if self.loss.view_weight and self.data.views_per_image == 1:
            raise ValueError(
                f"loss.view_weight={self.loss.view_weight}: wanted 0, or data.views_per_image of 2 or more"
            )
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps={self.schedule.warmup_steps}: wanted fewer than steps={self.steps}"
            )

    def image_size(self, step: int) -> int:
        """Pixels of a training image's side at `step` (from 0)."""
        return [size for start, size in self.data.image_sizes if step >= round(start * self.steps)][-1]
