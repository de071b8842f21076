"""What a run trains, a CLIP or an image classifier: how it is built, fed, saved and read again."""

from __future__ import annotations

import copy
import json
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from open_clip import OPENAI_DATASET_MEAN, OPENAI_DATASET_STD
from torch import nn

from ssmclip import models
from ssmclip.config import TrainConfig
from ssmclip.config.settings import ImageSize
from ssmclip.data.pairs.labelled import ClassIndex
from ssmclip.models import classifier_files
from ssmclip.models.clip import adjusted
from ssmclip.models.files import weights
from ssmclip.models.names import source
from ssmclip.models.tokenizer import FILE_NAME as TOKENIZER
from ssmclip.train.checkpoint import write_text
from ssmclip.train.objective import OBJECTIVES

Tokenize = Callable[[list[str]], torch.Tensor]


class Blueprint(ABC):
    """The model of a run. config: its configuration, as it is saved with the weights.

    weights_name: the file of a checkpoint's weights; labelled: whether its data are images with labels.
    """

    weights_name: ClassVar[str]
    labelled: ClassVar[bool]

    def __init__(self, config: dict[str, Any]):
        self.config = config

    @property
    def classes(self) -> tuple[str, ...]:
        """Return the names of a classifier's classes, () for a CLIP."""
        return ()

    @abstractmethod
    def create(self, grad_checkpointing: bool = False) -> nn.Module:
        """Return the network with random weights. Raises ValueError."""

    @abstractmethod
    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Return the means and standard deviations of the three channels that images are normalised with."""

    @abstractmethod
    def texts(self) -> Tokenize:
        """Return the function from the texts of a batch to int64 targets: (n, context) tokens or (n,) classes."""

    @abstractmethod
    def ready(self, network: nn.Module, size: ImageSize, label: str) -> models.Model:
        """Return a network to evaluate, with its preprocessing at an image size."""

    @abstractmethod
    def save(self, network: nn.Module, folder: Path) -> None:
        """Write the files of a model that `ssmclip.models.find` reads."""

    def encode(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        """Return what the network makes of images."""
        return network.encode_image(images) if hasattr(network, "encode_image") else network(images)

    def plain(self, state: dict[str, torch.Tensor]) -> nn.Module:
        """Return an unwrapped network that holds `state` itself, not a copy, without drawing random numbers."""
        with torch.device("meta"):
            network = self.create()
        network.load_state_dict(state, assign=True)
        return network

    def load_checkpoint(self, network: nn.Module, checkpoint: Path) -> None:
        """Load the weights of a run's checkpoint. Raises CheckpointError for those of another model."""
        try:
            weights.load_into(network, models.load_state(checkpoint / self.weights_name), checkpoint)
        except models.CheckpointError as error:
            raise models.CheckpointError(
                f"{error}. If an older version of this package began the run, delete {checkpoint.parents[1]} or choose "
                "another --out"
            ) from error

    @abstractmethod
    def describe(self, run: Path) -> None:
        """Write the configuration to the run's folder, unless another file there has its name."""


class Clip(Blueprint):
    """A CLIP, in open_clip's form."""

    weights_name = weights.WEIGHTS_NAME
    labelled = False

    def create(self, grad_checkpointing: bool = False) -> nn.Module:
        return models.create_clip(self.config, grad_checkpointing=grad_checkpointing)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        preprocess = self.config["preprocess_cfg"]
        return tuple(preprocess.get("mean", OPENAI_DATASET_MEAN)), tuple(preprocess.get("std", OPENAI_DATASET_STD))

    def texts(self) -> Tokenize:
        return models.build_tokenizer(self.config)

    def ready(self, network: nn.Module, size: ImageSize, label: str) -> models.Model:
        return models.Model(network, models.build_preprocess(self.config, size), self.texts(), label)

    def save(self, network: nn.Module, folder: Path) -> None:
        models.save_model(network, self.config, folder)
        models.save_tokenizer(self.config, folder)

    def describe(self, run: Path) -> None:
        write_text(run / weights.CONFIG_NAME, json.dumps(self.config, indent=2) + "\n")


class Classifier(Blueprint):
    """An image classifier, in timm's form."""

    weights_name = classifier_files.WEIGHTS
    labelled = True

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.config["label_names"])

    def create(self, grad_checkpointing: bool = False) -> nn.Module:
        return classifier_files.create_classifier(self.config, grad_checkpointing=grad_checkpointing)

    def statistics(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        return tuple(self.config["pretrained_cfg"]["mean"]), tuple(self.config["pretrained_cfg"]["std"])

    def texts(self) -> Tokenize:
        return ClassIndex(self.classes)

    def ready(self, network: nn.Module, size: ImageSize, label: str) -> models.Model:
        transform = classifier_files.classifier_transform(self.config["pretrained_cfg"], size)
        return models.Model(network, transform, None, label, classes=self.classes)

    def save(self, network: nn.Module, folder: Path) -> None:
        classifier_files.save_classifier(network, self.config, folder)

    def describe(self, run: Path) -> None:
        """Write nothing: config.json has the run's settings there."""


def blueprint(config: TrainConfig, classes: tuple[str, ...] = ()) -> Blueprint:
    """Return the blueprint of a run's model, at the final image size of the training.

    classes: of a classifier. Raises UnknownName for a model or an objective that nobody registered.
    """
    objective, model = OBJECTIVES[config.loss.kind], config.model
    size = config.image_size(config.steps)
    if objective.labelled:
        return Classifier(
            classifier_files.classifier_config(
                model.name,
                classes,
                image_size=size,
                drop_path_rate=model.drop_path_rate,
                changes=model.changes,
                preprocess=model.preprocess,
            )
        )
    if model.name:
        made = models.clip_config(model.name, image_size=size, drop_path_rate=model.drop_path_rate)
    else:
        made = adjusted(_config_of(model.weights), model.weights, size, model.drop_path_rate)
    start = merge(made["model_cfg"], dict(objective.start))
    return Clip(
        {
            **made,
            "model_cfg": _without_downloads(merge(start, model.changes)),
            "preprocess_cfg": merge(made["preprocess_cfg"], model.preprocess),
        }
    )


def _config_of(weights: str) -> dict[str, Any]:
    """Return the configuration of a CLIP, its tokenizer's files being where its weights are.

    Raises ValueError for an image encoder, UnknownName, CheckpointError, FileNotFoundError.
    """
    known = source(weights)
    if known.config is None:
        raise ValueError(f"model.name must be set for {weights}, which is no CLIP")
    config = copy.deepcopy(known.config)
    if known.folder is not None and (known.folder / TOKENIZER).is_file():
        config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = str(known.folder)
    return config


def _without_downloads(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a CLIP's configuration whose towers are built with random weights: those they start with are settings."""
    vision_cfg, text_cfg = model_cfg["vision_cfg"], model_cfg["text_cfg"]
    if vision_cfg.get("timm_model_pretrained"):
        vision_cfg["timm_model_pretrained"] = False
    if text_cfg.get("hf_model_name"):
        text_cfg["hf_model_pretrained"] = False  # open_clip takes it as true where it is left out
    return model_cfg


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of nested dictionaries with changes."""
    merged = copy.deepcopy(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = merge(merged[key], value) if both else value
    return merged
