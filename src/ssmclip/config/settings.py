"""The settings of a training run: frozen dataclasses, each of which checks the ranges of its fields.

A recipe (a Python file with one public function) returns a TrainConfig, `--set` changes it, and the run's folder keeps
it as JSON. Needs no torch.

>>> from ssmclip.config import apply_overrides, from_dict, to_dict
>>> config = apply_overrides(TrainConfig(), ["lr=3e-4", "model.drop_path_rate=0.1", "image_sizes=[[0, 32], [0.5, 64]]"])
>>> config.optimiser.lr, config.model.drop_path_rate, config.data.image_sizes
(0.0003, 0.1, ((0.0, 32), (0.5, 64)))
>>> from_dict(to_dict(config)) == config
True
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ssmclip.config.bounds import Settings, bounded

ImageSize = int | tuple[int, int]  # pixels of a square's side, or (height, width)


@dataclass(frozen=True)
class ModelConfig(Settings, group="model"):
    """The network: a CLIP, or an image classifier where `loss.kind` is "classification"."""

    # One of `ssmclip models`, or open_clip:NAME; of a classifier an image encoder's, such as timm:mambaout_tiny. "":
    # a CLIP as `weights` has it.
    name: str = "CLIP-VMamba-Nano"
    # Weights to start from, of the whole model: any name, file or folder that `ssmclip.find` takes. A classifier of
    # other classes has a new head; a ViT's positions are resampled to the image size.
    weights: str = ""
    # Weights of a tower, in place of those of `weights`. Of the image tower: an image encoder's, without its head, or
    # those of a CLIP's. Of the text tower: a CLIP's, or a language model's in Hugging Face's form (a folder, or a name
    # on its hub): a Mamba, or the one that text_cfg.hf_model_name names.
    image_weights: str = ""
    text_weights: str = ""
    # Which of the weights a file has: those that were trained, or their average (see `ssmclip.load_published`).
    weights_form: Literal["online", "ema", "ema_online_bn"] = "online"
    # A frozen tower keeps the weights it starts with, and the statistics of its batch norms, without dropout and
    # stochastic depth. Groups of layers, counted from the last, that learn all the same: of the image tower timm's, or
    # of open_clip's own ViT the projection, then blocks; of the text tower the projection, then blocks. The
    # projection behind a timm tower, and a classifier's head, always learn.
    freeze_image: bool = False
    unlocked_image_groups: int = bounded(0, at_least=0)
    freeze_text: bool = False
    unlocked_text_groups: int = bounded(1, at_least=0)
    head_init_scale: float = bounded(1.0, above=0)  # a classifier's new head starts with weights this much smaller
    # Stochastic depth at the deepest block; None: the model's own.
    drop_path_rate: float | None = bounded(None, at_least=0, below=1)
    # Share of the patches that a vision transformer does not see in training (FLIP); None: the model's own.
    patch_drop_rate: float | None = bounded(None, at_least=0, below=1)
    grad_checkpointing: bool = False  # recompute activations in the backward pass: less memory, more time
    compile: bool = False  # torch.compile the forward pass
    # Merged into the model's configuration: of a CLIP open_clip's, of a classifier the arguments of timm.create_model.
    changes: dict[str, Any] = field(default_factory=dict)
    # Merged into the preprocessing that is saved with the model: of a CLIP open_clip's preprocess_cfg, of a classifier
    # timm's pretrained_cfg (crop_pct, interpolation, mean, std, test_input_size ...).
    preprocess: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        if not (self.name or self.weights):
            self._refuse("name", "must name a model, or model.weights one that has weights")
        if self.unlocked_image_groups and not self.freeze_image:
            self._refuse("unlocked_image_groups", "needs model.freeze_image=true")
        if self.unlocked_text_groups != 1 and not self.freeze_text:
            self._refuse("unlocked_text_groups", "needs model.freeze_text=true")

    @property
    def label(self) -> str:
        """Return what the model is called in messages and rows."""
        return self.name or self.weights


@dataclass(frozen=True)
class AugmentConfig(Settings, group="data.augment"):
    """How training images are augmented.

    library: "own", fast: the fields are the arguments of `ssmclip.data.pairs.augment.train_transform`; "timm": those of
    timm.data.create_transform, which the published recipes of classifiers use.
    """

    scale: tuple[float, float] = (0.5, 1.0)  # share of the image's area that a random crop keeps
    flip: bool = False  # mirror half of the images; wrong wherever captions say left and right, or show digits
    # Strength of random brightness, contrast and saturation; or of each of them, and of hue (in turns).
    color_jitter: float | tuple[float, float, float, float] = 0.0
    # Shares of the images to which each is applied.
    color_jitter_prob: float = bounded(1.0, at_least=0, at_most=1)
    gray_scale_prob: float = bounded(0.0, at_least=0, at_most=1)
    gaussian_blur_prob: float = bounded(0.0, at_least=0, at_most=1)  # sigma 0.1 to 2 pixels
    solarize_prob: float = bounded(0.0, at_least=0, at_most=1)  # values of 128 and above are inverted
    colors: bool = True  # false: none of the five above, whatever they are; crop and flip stay
    interpolation: Literal["bicubic", "bilinear", "random"] = "bicubic"  # of the crop; random: of timm alone
    # In which brightness, contrast, saturation and hue change; random: drawn for each image, as torchvision does.
    color_order: Literal["fixed", "random"] = "fixed"
    library: Literal["own", "timm"] = "own"
    # Of timm alone: RandAugment and the like, such as "rand-m9-mstd0.5-inc1", in place of the color jitter; random
    # erasing.
    auto_augment: str = ""
    erase_prob: float = bounded(0.0, at_least=0, at_most=1)
    erase_mode: Literal["const", "rand", "pixel"] = "pixel"
    erase_count: int = bounded(1, at_least=1)

    def __post_init__(self):
        super().__post_init__()
        self._check_library()
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            self._refuse("scale", "must be two shares above 0, the smaller one first")
        strengths = self.color_jitter if isinstance(self.color_jitter, tuple) else (self.color_jitter,)
        if not (min(strengths) >= 0 and max(strengths[3:], default=0) <= 0.5):
            self._refuse("color_jitter", "must be at least 0, and of the hue at most 0.5")

    def _check_library(self) -> None:
        if self.library == "timm" and self.solarize_prob:
            self._refuse("solarize_prob", "must be 0 for library=timm, which has solarize in auto_augment alone")
        if self.auto_augment and not self.colors:
            self._refuse("colors", "must be true for auto_augment, most of whose operations change colors")
        for name in ("auto_augment", "erase_prob") if self.library == "own" else ():
            if getattr(self, name):
                self._refuse(name, "needs data.augment.library=timm")
        if self.library == "own" and self.interpolation == "random":
            self._refuse("interpolation", "must be bicubic or bilinear for library=own")


@dataclass(frozen=True)
class DataConfig(Settings, group="data"):
    """The source of the training pairs, and how they are batched."""

    # Shards, a csv, tsv or parquet file, or synthetic:NAME, see ssmclip.data.pairs.loader; ssmclip.config.places says
    # where a relative path is looked for.
    source: str = "synthetic:quickstart"
    # Several sources in place of `source`: (source, its share of the samples, over the sum of all shares).
    sources: tuple[tuple[str, float], ...] = ()
    resample: bool = False  # shards, or a table's rows, are drawn with replacement
    # (from this share of the steps on, pixels) or (from this share on, height, width); the first at 0
    image_sizes: tuple[tuple[float, int] | tuple[float, int, int], ...] = ((0.0, 64),)
    # (height, width): one is drawn for each batch, in place of the one size of image_sizes, the model's in validation.
    multi_sizes: tuple[tuple[int, int], ...] = ()
    augment: AugmentConfig = AugmentConfig()
    workers: int = bounded(0, at_least=0)  # processes that decode images, for each that trains; 0: that one itself
    shuffle_buffer: int = bounded(2048, at_least=1)  # samples of a shard stream that are shuffled together
    # No pair is in a batch twice, across passes and processes too: one that its batch has already waits for the next.
    distinct: bool = False
    # How many captions are drawn, and how many views augmented, each time an image is seen; the loss is their mean.
    captions_per_image: int = bounded(1, at_least=1)
    views_per_image: int = bounded(1, at_least=1)
    # Probability of each caption field: columns of a table; of shards, keys of the .json and suffixes such as txt. What
    # a sample lacks is left out, and the others' probabilities are scaled up. {}: the captions that are there, alike.
    captions: dict[str, float] = field(default_factory=dict)
    # How many batches are filled together and then divided by the length of their texts; padding beyond a batch's
    # longest text is cut. Needs a text tower that ignores padding, as Mamba's do. 0: batches as they come, all padding.
    length_buckets: int = bounded(0, at_least=0)
    # Features of a teacher that shards store, in DataCompDR's form, with images augmented as the teacher saw them.
    stored_teacher: Literal["none", "datacompdr"] = "none"
    cache_dir: str = ""  # folder in which remote shards are kept; "": none
    cache_gib: float | None = bounded(None, above=0)  # its size at most, least recently used shards first; None: any
    retries: int = bounded(4, at_least=0)  # how often a failed read of a remote shard is repeated
    image_column: str = ""  # of a table; "": the first known name, see ssmclip.data.pairs.tables
    caption_column: str = ""  # of a classifier's labels as well
    # Of a classifier: a file with the name of a class on each line, or their number; "": those that the data have.
    classes: str = ""
    encoding: str = "utf-8"  # of a csv or tsv file
    separator: str = ""  # of a csv or tsv file: a character or tab, semicolon ...; "": the one its header shows

    def __post_init__(self):
        super().__post_init__()
        starts = [start for start, *_ in self.image_sizes]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1:
            rule = "must be pairs (share, pixels) whose shares start at 0.0, rise, and stay under 1"
            self._refuse("image_sizes", f"{rule}, such as ((0.0, 48), (0.6, 64))")
        for name, sizes in {
            "image_sizes": [size for _, *size in self.image_sizes],
            "multi_sizes": self.multi_sizes,
        }.items():
            if any(side < 1 for size in sizes for side in size):
                self._refuse(name, "must have sizes of at least 1 pixel")
        if self.multi_sizes and len(self.image_sizes) > 1:
            self._refuse("multi_sizes", "must be () when data.image_sizes has several")
        self._check_sources()
        self._check_captions()

    def _check_sources(self) -> None:
        weights = [weight for _, weight in self.sources]
        if not all(weight >= 0 and math.isfinite(weight) for weight in weights):
            self._refuse("sources", "must have weights of at least 0")
        if self.sources and not sum(weights) > 0:
            self._refuse("sources", "must have a weight above 0")
        if len({name for name, _ in self.sources}) < len(self.sources) or not all(name for name, _ in self.sources):
            self._refuse("sources", "must name each source once")
        if self.resample and self.distinct:
            self._refuse("resample", "must be false when data.distinct is true, as it may draw a sample twice")

    def _check_captions(self) -> None:
        for name, share in self.captions.items():
            if not (share > 0 and math.isfinite(share)):
                self._refuse("captions", f"must have a probability above 0 for {name!r}")

    def sizes(self) -> list[ImageSize]:
        """Return every size that images are brought to."""
        return [_as_size(sides) for sides in (self.multi_sizes or [sides for _, *sides in self.image_sizes])]


@dataclass(frozen=True)
class OptimiserConfig(Settings, group="optimiser"):
    """The optimiser. See train/optimiser.py."""

    algorithm: str = "adamw"  # or any other name in timm.optim.list_optimizers(), such as lamb
    args: dict[str, Any] = field(
        default_factory=dict
    )  # further arguments of timm's optimiser, such as {"momentum": 0.9}
    lr: float = bounded(1e-3, above=0)  # at the end of the warm-up
    block_lr_scale: float = bounded(1.0, at_least=0)  # the learning rate of the image tower's residual blocks, over lr
    image_lr_scale: float = bounded(1.0, at_least=0)  # the image tower's learning rate, its projection's apart, over lr
    text_lr_scale: float = bounded(1.0, at_least=0)  # the text tower's learning rate, its projection's apart, over lr
    # The image tower's learning rate falls by this factor from each layer to the one before it; None: it does not.
    layer_decay: float | None = bounded(None, above=0, at_most=1)
    text_layer_decay: float | None = bounded(None, above=0, at_most=1)  # the same of the text tower
    # What a layer of a timm tower is: a block of the tower, or a stage; as timm groups them (`group_matcher`).
    layer_groups: Literal["block", "stage"] = "block"
    betas: tuple[float, float] = bounded((0.9, 0.98), at_least=0, below=1)
    eps: float = bounded(1e-8, above=0)
    weight_decay: float = bounded(0.1, at_least=0)
    decay_rule: Literal["ssm", "original"] = "ssm"  # which parameters it applies to; see train/optimiser.py
    clip_norm: float | None = bounded(1.0, above=0)  # gradients are scaled down to this norm; None: never


@dataclass(frozen=True)
class ScheduleConfig(Settings, group="schedule"):
    """The learning rate: linear warm-up, then half a cosine, or one of timm's schedules. See train/schedule.py."""

    warmup_steps: int = bounded(100, at_least=0)
    start_lr: float = bounded(1e-6, at_least=0)  # at the first step
    end_lr: float = bounded(1e-5, at_least=0)  # approached at the last
    shape: str = "cosine"  # or timm:NAME, of timm.scheduler.create_scheduler_v2: timm:cosine, timm:step, timm:poly ...
    # Of timm's schedules: steps for which the rate is held, an epoch's in recipes that change it by epoch; steps at
    # the end of the run at end_lr; further arguments of create_scheduler_v2, such as {"decay_rate": 0.1}.
    hold_steps: int = bounded(1, at_least=1)
    cooldown_steps: int = bounded(0, at_least=0)
    args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        super().__post_init__()
        timm_only = {"hold_steps": self.hold_steps > 1, "cooldown_steps": self.cooldown_steps, "args": self.args}
        if self.shape == "cosine" and (given := [name for name, value in timm_only.items() if value]):
            self._refuse(given[0], "needs a schedule of timm, such as schedule.shape=timm:cosine")


@dataclass(frozen=True)
class MixConfig(Settings, group="loss.mix"):
    """Mixing of a classifier's images and labels in pairs (timm.data.Mixup): mixup and CutMix."""

    mixup: float = bounded(0.0, at_least=0)  # alpha of the Beta distribution that shares are drawn from; 0: no mixup
    cutmix: float = bounded(0.0, at_least=0)  # alpha of CutMix; 0: no CutMix
    prob: float = bounded(1.0, at_least=0, at_most=1)  # share of the batches (or images, see mode) that are mixed
    switch_prob: float = bounded(0.5, at_least=0, at_most=1)  # share of CutMix where both are on
    mode: Literal["batch", "pair", "elem"] = "batch"  # one share for a micro-batch, for a pair, for an image

    @property
    def on(self) -> bool:
        return bool((self.mixup or self.cutmix) and self.prob)


@dataclass(frozen=True)
class DistillConfig(Settings, group="loss.distill"):
    """Distillation from a teacher CLIP, of loss.kind=distill."""

    # Any name, file or folder of a CLIP with trained weights and the model's tokenizer and context length. "": the
    # data store its features.
    teacher: str = ""
    teacher_scale: float = bounded(100.0, above=0)  # logit scale of stored features, which have none; OpenAI's is 100
    weight: float = bounded(1.0, at_least=0)
    contrastive_weight: float = bounded(1.0, at_least=0)  # of CLIP's own loss

    def __post_init__(self):
        super().__post_init__()
        if not (self.weight or self.contrastive_weight):
            self._refuse("weight", "must be above 0 when loss.distill.contrastive_weight is 0")


@dataclass(frozen=True)
class SslConfig(Settings, group="loss.ssl"):
    """The self-supervised losses between views of an image, and the heads that they train: of slip and a-clip.

    The defaults are the published ones: SimCLR's head of width 4096 has 21 million weights for a tower of width 768.
    """

    weight: float = bounded(1.0, at_least=0)  # of NT-Xent between two views (SimCLR)
    temperature: float = bounded(0.1, above=0)
    # Of a-clip: weight of the distance between predictions from the views and the averaged model's projection (BYOL).
    ema_weight: float = bounded(2.0, at_least=0)
    head_width: int = bounded(4096, at_least=1)
    head_features: int = bounded(256, at_least=1)  # that the heads end in
    # Of a-clip: NT-Xent compares the first view with itself, as the published code does.
    as_published: bool = False
    # Of slip: changes to SLIP's augmentation of these views, as JSON: fields of data.augment, such as {"flip": false}
    # where images show letters. The views that are shown with the texts have data.augment.
    augment: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class MaskConfig(Settings, group="loss.mask"):
    """Masked views, of loss.kind=a-clip: each loses the blocks of the image that matter least to the averaged model.

    choice: which blocks stay: "attentive", those that matter most; "inverse", least; "random"; or "all" of them.
    """

    choice: Literal["attentive", "inverse", "random", "all"] = "attentive"
    keep_rate: float = bounded(0.5, above=0, at_most=1)  # share of the blocks that stay, their number rounded up
    block: int = bounded(32, at_least=1)  # side of a block in pixels; of a vision transformer, a multiple of its patch


@dataclass(frozen=True)
class LossConfig(Settings, group="loss"):
    """The objective."""

    kind: str = "clip"  # a name in ssmclip.train.objective.OBJECTIVES, looked up when training starts
    # Pairs that a process embeds at a time (GradCache); of a classifier, images whose gradients are accumulated. None:
    # the whole batch.
    micro_batch: int | None = bounded(None, at_least=1)
    # Weight of the loss between two views of an image, which is added (SLIP); needs views_per_image > 1.
    view_weight: float = bounded(0.0, at_least=0)
    # Whether the gradient of clip's loss passes through the features that were gathered from other processes. False: as
    # codes that gather without, such as SLIP's: a feature gets the gradient of the softmax over its own candidates
    # alone. One process gives the gradient that several would.
    gather_with_grad: bool = True
    max_logit_scale: float = bounded(100.0, above=1)  # logit_scale is clamped to [0, ln of this] after every step
    # Of classification: share of the label that all classes get; binary cross-entropy for each class in place of a
    # softmax; mixing of images.
    label_smoothing: float = bounded(0.0, at_least=0, below=1)
    binary: bool = False
    mix: MixConfig = MixConfig()
    distill: DistillConfig = DistillConfig()
    ssl: SslConfig = SslConfig()
    mask: MaskConfig = MaskConfig()


@dataclass(frozen=True)
class EmaConfig(Settings, group="ema"):
    """A moving average of weights and buffers. If enabled, the average is validated and saved for use."""

    decay: float | None = bounded(None, at_least=0, below=1)  # per step, such as 0.999; None: no average
    # warmup: low at first, so that the random weights are soon forgotten; cosine: from decay towards 1 at the last step
    schedule: Literal["constant", "warmup", "cosine"] = "constant"


@dataclass(frozen=True)
class ValidationConfig(Settings, group="validation"):
    """The measurements made during training."""

    every: int = bounded(0, at_least=0)  # steps; 0: never
    tasks: tuple[str, ...] = ()  # names that `ssmclip evaluate --tasks` takes
    root: str = ""  # folder of the evaluation data; looked for as data.source is
    best: str = ""  # "task/metric" whose highest value marks the best checkpoint; "": none is marked


@dataclass(frozen=True)
class CheckpointConfig(Settings, group="checkpoint"):
    """The interval between checkpoints, and how many are kept."""

    every: int = bounded(1000, at_least=1)  # steps; the last step is always saved
    keep: int = bounded(2, at_least=1)  # newest checkpoints kept (the best one is kept as well)


@dataclass(frozen=True)
class LoggingConfig(Settings, group="logging"):
    """The progress reported during training."""

    every: int = bounded(10, at_least=1)  # steps between rows in rows.jsonl and in the trackers
    tensorboard: bool = True  # event files in the run's folder; the same as its name among `trackers`
    # Experiment trackers that get the rows as well, by Accelerate's names: trackio, wandb, mlflow ... Where they send
    # them is set by their own environment variables, such as WANDB_API_KEY and MLFLOW_TRACKING_URI.
    trackers: tuple[str, ...] = ()
    project: str = "ssmclip"  # name of the project, or experiment, in trackers; the run has the name of its folder
    progress: bool = True  # the progress bar


@dataclass(frozen=True)
class TrainConfig(Settings):
    """A training run: general settings, and a group of settings for each part.

    `--set` names a nested field with a dot (optimiser.lr), or by its last name if that is unique (lr).
    """

    steps: int = bounded(1000, at_least=1)  # optimiser steps
    batch_size: int = bounded(128, at_least=1)  # pairs per step, over all processes
    seed: int = bounded(0, at_least=0, below=2**63)
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
        super().__post_init__()
        if self.loss.view_weight and self.data.views_per_image == 1:
            raise ValueError(
                f"loss.view_weight must be 0 when data.views_per_image is 1 (got {self.loss.view_weight}): "
                "it weights the loss between two views of an image"
            )
        if self.data.cache_gib is not None and not self.data.cache_dir:
            raise ValueError(f"data.cache_gib must be none without data.cache_dir (got {self.data.cache_gib})")
        if self.schedule.warmup_steps >= self.steps:
            raise ValueError(
                f"schedule.warmup_steps must be less than steps={self.steps} (got {self.schedule.warmup_steps})"
            )

    def image_size(self, step: int) -> ImageSize:
        """Return the side of a training image in pixels at `step` (from 0), or its (height, width)."""
        return [_as_size(size) for start, *size in self.data.image_sizes if step >= round(start * self.steps)][-1]


def _as_size(sides: Sequence[int]) -> ImageSize:
    """Return one or two sides as a size: a square has one.

    >>> _as_size([64]), _as_size([64, 64]), _as_size([48, 64])
    (64, 64, (48, 64))
    """
    height, width = sides[0], sides[-1]
    return height if height == width else (height, width)
