"""Find a model by its name: one grammar for every command and every function that takes a model.

    a CLIP of this package        CLIP-VMamba-S                      random weights
    a folder                      runs/first, checkpoints/step_10    a training run (its best checkpoint, else its
                                                                     last), or any folder that holds one checkpoint,
                                                                     such as timm's form of its hub
    a file                        checkpoint_best.pt                 read by its names and shapes
    open_clip's                   open_clip:ViT-B-32/openai          NAME, NAME/TAG or NAME/FILE
    timm's                        timm:resnet50.a1_in1k              NAME, NAME.TAG or NAME/FILE, also without timm:
    the hub's                     hf-hub:OWNER/NAME                  OWNER/NAME or OWNER/NAME/FILE, downloaded once

`find` returns the model itself, `source` what is known about it before weights are read.
"""

from __future__ import annotations

import difflib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import timm
import torch
from timm.layers import to_2tuple
from torch import nn

from ssmclip.models.classifier import classes_of, in_words, load_checkpoint
from ssmclip.models.clip import (
    OPEN_CLIP,
    build_preprocess,
    build_tokenizer,
    clip_config,
    create_clip,
    image_transform,
    list_clips,
)
from ssmclip.models.files.hub import HUB, choose_weights, download
from ssmclip.models.files.weights import (
    CONFIG_NAME,
    WEIGHTS_NAME,
    CheckpointError,
    described_by,
    load_config,
    load_into,
    load_state,
)
from ssmclip.models.precision import convert, resolve
from ssmclip.models.published.layout import Hints
from ssmclip.models.published.read import build, create_encoder, read_published
from ssmclip.models.text_towers import text_tower_of
from ssmclip.models.tokenizer import find_tokenizer
from ssmclip.models.towers import Size, as_size, image_dtype, is_clip, set_image_size
from ssmclip.registry import UnknownName
from ssmclip.rows.paper_tables import PUBLISHED
from ssmclip.rows.precision import FLOAT32

__all__ = [
    "RANDOM",
    "TIMM",
    "Model",
    "Source",
    "build_model",
    "build_model_on_meta",
    "find",
    "find_checkpoint",
    "load",
    "load_tokenizer",
    "own_size",
    "reads_text",
    "source",
]

log = logging.getLogger(__name__)

TIMM = "timm:"
RANDOM = "random weights"
POINTERS = ("best", "last")  # files of a run that name one of its checkpoints
TIMM_FILES = ("config.json", "model.safetensors")  # of a folder in the form of timm's hub


@dataclass(frozen=True, eq=False)
class Model:
    """A model that is ready to use, with the functions that turn images and texts into its inputs.

    network: a CLIP of open_clip's interface, or an image encoder; preprocess: PIL image -> (3, H, W);
    tokenizer: list of n strings -> (n, context_length), None if the network reads no text or none was requested;
    label: its name in rows; origin: the source of its weights, or RANDOM; classes: what the outputs of a classifier
    stand for, in their order: WordNet ids of ImageNet's, or the names it was trained with; () where that is not known.

    It unpacks as network, preprocess, tokenizer.
    """

    network: nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Callable[[list[str]], torch.Tensor] | None
    label: str = ""
    origin: str = ""
    classes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.preprocess, self.tokenizer))

    @property
    def model(self) -> nn.Module:
        """Return the network, under the name that open_clip's users expect."""
        return self.network

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return image_dtype(self.network)

    @property
    def outputs(self) -> int:
        """Return the number of a classifier's outputs, 0 for a network that is none."""
        return 0 if is_clip(self.network) else getattr(self.network, "num_classes", 0) or len(self.classes)

    @property
    def classifies(self) -> bool:
        """Return whether the network is a classifier: no CLIP, and with outputs that are classes."""
        return self.outputs > 0

    @property
    def class_names(self) -> tuple[str, ...]:
        """Return the classes in words, as in "tench, Tinca tinca" for n01440764; () where they are not known."""
        return in_words(self.classes, self.network)

    @property
    def parameters(self) -> dict[str, int]:
        """Return the number of parameters in the image tower, and in total."""
        visual = getattr(self.network, "visual", self.network)
        modules = (("image", visual), ("all", self.network))
        return {name: sum(p.numel() for p in module.parameters()) for name, module in modules}


@dataclass(frozen=True)
class Source:
    """A resolved name, before its weights are loaded into a network.

    name: the given name;
    config: a CLIP's in open_clip's form, {"model_cfg": ..., "preprocess_cfg": ...}, None for an image encoder;
    create: () -> the network with fresh weights; load: image size or None -> the network with its own weights;
    preprocess: (network, image size or None) -> its preprocessing; own_size: the (height, width) it is made for;
    origin: where its weights are, RANDOM for nowhere; trained: for RANDOM, what to pass for trained weights;
    folder: where its files are, a tokenizer's among them.
    """

    name: str
    config: dict[str, Any] | None
    create: Callable[[], nn.Module]
    load: Callable[[int | Size | None], nn.Module]
    preprocess: Callable[[nn.Module, int | Size | None], Callable[[Any], torch.Tensor]]
    own_size: Callable[[], Size]
    origin: str
    trained: str = ""
    folder: Path | None = None


def find(
    name: str | Path,
    *,
    label: str | None = None,
    device: str = "cpu",
    image_size: int | Size | None = None,
    text: bool = True,
    hints: Hints | None = None,
    precision: str = FLOAT32,
) -> Model:
    """Return the model of a name, with its weights, in evaluation mode, its preprocessing and tokenizer.

    name: see the head of this module; label: what its rows are called, the name where left out; image_size: pixels, or
    (height, width), in place of the model's own: preprocessing gives pictures of that size, and a ViT has its positions
    resampled to it as timm does; text: whether a tokenizer is needed; hints: what the shapes of a checkpoint without a
    configuration cannot tell; precision: "float32", "bfloat16" for weights and arithmetic in bfloat16, or "auto",
    whichever is faster on the device (see `ssmclip.models.precision`).

    For random weights, a warning in the log says what to pass for trained ones.
    Raises UnknownName, CheckpointError, FileNotFoundError, and ValueError for a size the model cannot take.
    """
    precision = resolve(precision, device)
    model = _built(source(name, hints), label or str(name), device, image_size, text)
    return replace(model, network=convert(model.network, precision))


def _built(known: Source, label: str, device: str, image_size: int | Size | None, text: bool) -> Model:
    if known.origin == RANDOM:
        log.warning("%s has random weights: pass %s", known.name, known.trained)
    network = known.load(image_size).to(device).eval()
    tokenizer = _tokenizer(known) if text and known.config is not None else None
    preprocess = known.preprocess(network, image_size)
    return Model(network, preprocess, tokenizer, label, known.origin, classes_of(network))


def load(name: str | Path, *, device: str = "cpu", image_size: int | Size | None = None) -> Model:
    """Return a CLIP ready to evaluate, with its preprocessing and tokenizer: `find` for models that read text.

    Raises what `find` raises, and ValueError for an image encoder.
    """
    return _built(_clip(source(name)), str(name), device, image_size, text=True)


def _clip(known: Source) -> Source:
    if known.config is None:
        raise ValueError(f"the model must be a CLIP (got {known.name}, an image encoder without a text tower)")
    return known


def source(name: str | Path, hints: Hints | None = None) -> Source:
    """Return the source of a name. hints: as for `find`. Raises UnknownName, CheckpointError, FileNotFoundError."""
    name = str(name)
    if name.startswith(OPEN_CLIP):
        return _of_open_clip(name)
    if name.startswith(TIMM):
        return _of_timm(name)
    path = download(name) if name.startswith(HUB) else Path(name)
    if path.is_dir():
        return _of_folder(name, path, hints)
    if path.is_file():
        return _of_published(name, path, hints)
    if name in list_clips():
        return _of_this_package(name)
    if timm.is_model(_bare(name)):
        return _of_timm(name)
    if "/" in name:
        raise FileNotFoundError(
            f"no such file or folder: {name}; pass a file, a folder, or one of: {', '.join(list_clips())}"
        )
    near = difflib.get_close_matches(name, timm.list_models(), n=5)
    raise UnknownName("model", name, [*list_clips(), *near])


# ---- CLIPs by their configurations


def _of_this_package(name: str) -> Source:
    where, _ = PUBLISHED.get(name, ("", ""))
    trained = f"{where} for the published ones" if where else "a run or checkpoint folder, or a file, for trained ones"
    config = clip_config(name)
    return _of_config(name, config, lambda: create_clip(config), RANDOM, trained=trained)


def _of_folder(name: str, folder: Path, hints: Hints | None) -> Source:
    if _is_run(folder) and not _is_model(folder):
        folder = find_checkpoint(folder)
    if not _is_clip(folder) and folder.is_dir():
        if choose_weights(sorted(file.name for file in folder.iterdir()), folder):
            return _of_published(name, folder, hints)
    folder = find_checkpoint(folder)
    config = load_config(folder)

    def create() -> nn.Module:
        with described_by(folder / CONFIG_NAME):
            return create_clip(config)

    def weighted() -> nn.Module:
        model = create()
        load_into(model, load_state(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
        return model

    def preprocess(network: nn.Module, image_size: int | Size | None) -> Any:
        with described_by(folder / CONFIG_NAME if image_size is None else None):
            return build_preprocess(config, image_size)

    def own_size() -> Size:
        with described_by(folder / CONFIG_NAME):
            return known.own_size()

    known = _of_config(name, config, weighted, str(folder), folder=folder)
    return replace(known, create=create, preprocess=preprocess, own_size=own_size)


def _of_published(name: str, path: Path, hints: Hints | None) -> Source:
    """Return the source of a checkpoint, or of a folder with one, from its weights alone. Raises CheckpointError."""
    architecture = read_published(path, hints=hints)
    weighted = partial(build, architecture, str(path))
    if architecture.kind == "clip":
        folder = path if path.is_dir() else path.parent
        return _of_config(name, architecture.config, weighted, str(path), folder=folder)
    if architecture.kind == "encoder":
        return _of_encoder(name, partial(create_encoder, replace(architecture, weights={})), weighted, str(path))
    raise CheckpointError(
        f"{path} contains only a {architecture.kind.replace('_', ' ')} tower, which cannot embed images: pass a CLIP"
    )


def _of_config(
    name: str,
    config: dict[str, Any],
    weighted: Callable[[], nn.Module],
    origin: str,
    *,
    trained: str = "",
    folder: Path | None = None,
) -> Source:
    """Return the source of a configured CLIP. weighted: () -> the network with its weights."""

    def load(image_size: int | Size | None) -> nn.Module:
        model = weighted()
        if image_size is not None and hasattr(model.visual, "set_input_size"):
            if getattr(model.visual.trunk, "dynamic_img_size", False):  # from its own positions, for every batch
                model.visual.image_size = to_2tuple(image_size)
            else:
                model.visual.set_input_size(image_size)
        return model

    return Source(
        name,
        config,
        create=lambda: create_clip(config),
        load=load,
        preprocess=lambda network, image_size: build_preprocess(config, image_size),
        own_size=lambda: as_size(config["model_cfg"]["vision_cfg"].get("image_size", 224)),
        origin=origin,
        trained=trained,
        folder=folder,
    )


def _of_open_clip(name: str) -> Source:
    architecture, _, pretrained = name.removeprefix(OPEN_CLIP).partition("/")
    config = clip_config(f"{OPEN_CLIP}{architecture}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)

    def load(image_size: int | Size | None) -> nn.Module:
        if pretrained and not open_clip.is_pretrained_cfg(architecture, pretrained) and not Path(pretrained).is_file():
            raise UnknownName(f"weights of {architecture}", pretrained, tags)
        how = dict(pretrained=pretrained or None, force_image_size=image_size, output_dict=True)
        try:
            return open_clip.create_model(architecture, **how)
        except RuntimeError as error:  # a download that failed, or a file of another model
            raise CheckpointError(f"{name} cannot be loaded: {error}") from error

    known = _of_config(name, config, lambda: create_clip(config), name if pretrained else RANDOM)
    return replace(
        known,
        load=load,
        preprocess=lambda network, _: image_transform(**open_clip.get_model_preprocess_cfg(network)),
        trained=f"{name}/{tags[0] if tags else 'FILE'} for trained ones",
    )


# ---- image encoders


def _of_timm(name: str) -> Source:
    tagged, _, file = name.removeprefix(TIMM).partition("/")
    bare, _, tag = tagged.partition(".")
    if not timm.is_model(bare):
        near = difflib.get_close_matches(bare, timm.list_models(), n=5)
        raise UnknownName("timm model", bare, near or timm.list_models()[:5])
    pretrained = bool(tag) and "=" not in tag and not file  # a list of fields is no name of weights
    create = partial(timm.create_model, tagged)
    return _of_encoder(
        name,
        create,
        partial(load_checkpoint, create, file) if file else partial(create, pretrained=pretrained),
        name if pretrained or file else RANDOM,
        trained=f"{TIMM}{bare}.TAG or {TIMM}{bare}/FILE for trained ones",
    )


def _bare(name: str) -> str:
    """Return the name of a timm model without its tag and file."""
    return name.partition("/")[0].partition(".")[0]


def _of_encoder(
    name: str, create: Callable[[], nn.Module], weighted: Callable[[], nn.Module], origin: str, trained: str = ""
) -> Source:
    def load(image_size: int | Size | None) -> nn.Module:
        model = weighted()
        if image_size is not None:
            set_image_size(model, as_size(image_size))
        return model

    def own_size() -> Size:
        with torch.device("meta"):
            return tuple(timm.data.resolve_data_config(model=create())["input_size"][1:])

    return Source(name, None, create, load, _encoder_preprocess, own_size, origin, trained)


def _encoder_preprocess(network: nn.Module, image_size: int | Size | None) -> Callable[[Any], torch.Tensor]:
    """Return preprocessing that keeps images of the network's size and resizes others, shorter side first."""
    config = timm.data.resolve_data_config(model=network) | {"crop_pct": 1.0}
    if image_size is not None:
        config |= {"input_size": (config["input_size"][0], *as_size(image_size))}
    return timm.data.create_transform(**config)


# ---- folders


def find_checkpoint(folder: Path) -> Path:
    """Return the folder of a model: itself, or a run's best checkpoint, else its last. Raises CheckpointError."""
    if _is_model(folder):
        return folder
    for pointer in POINTERS:
        file = folder / "checkpoints" / pointer
        if file.is_file():
            return folder / "checkpoints" / file.read_text(encoding="utf-8").strip()
    raise CheckpointError(
        f"{folder} contains neither {WEIGHTS_NAME} nor {TIMM_FILES[1]}, nor checkpoints/best or checkpoints/last"
    )


def _is_model(folder: Path) -> bool:
    """Return whether a folder holds weights and their configuration, in open_clip's form or in timm's."""
    return _is_clip(folder) or all((folder / file).is_file() for file in TIMM_FILES)


def _is_clip(folder: Path) -> bool:
    return (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file()


def _is_run(folder: Path) -> bool:
    return any((folder / "checkpoints" / pointer).is_file() for pointer in POINTERS)


# ---- what does not depend on weights


def load_tokenizer(name: str | Path, file: str | Path | None = None) -> Any:
    """Return the tokenizer of a CLIP, without loading its weights into a network.

    file: where its text tower is a language model, the `tokenizer.json` of that, or the folder that holds one, in
    place of the one that its configuration names.
    Raises UnknownName, CheckpointError, FileNotFoundError, and ValueError for an image encoder.
    """
    known = _clip(source(name))
    text_cfg = known.config["model_cfg"]["text_cfg"]
    if file is None or not text_tower_of(text_cfg).replaceable_tokenizer:
        return _tokenizer(known)
    changed = text_cfg | {"hf_tokenizer_name": str(find_tokenizer(str(file)))}
    return build_tokenizer(known.config | {"model_cfg": known.config["model_cfg"] | {"text_cfg": changed}})


def _tokenizer(known: Source) -> Any:
    with described_by(known.folder / CONFIG_NAME if known.folder is not None else None):
        return build_tokenizer(known.config, known.folder)


def reads_text(name: str | Path) -> bool:
    """Return whether a named model is a CLIP. Raises what `source` raises."""
    return source(name).config is not None


def own_size(name: str | Path) -> Size:
    """Return the image size (height, width) a named model is made for."""
    return source(name).own_size()


def build_model(name: str, image_size: int | Size | None = None, text_length: int | None = None) -> nn.Module:
    """Return a model with random weights, for uses that do not depend on them.

    name: see the head of this module; an image encoder has its classification head; image_size: pixels, or (height,
    width); text_length: tokens its text tower has positions for; None for the model's own.
    Raises what `source` raises, and ValueError for a size the model cannot take.
    """
    known, size = source(name), None if image_size is None else as_size(image_size)
    if known.config is None:
        model = known.create()
    else:
        model = _create_clip_at(name, known.config, size, text_length)
    if size:
        set_image_size(model, size)
    return model


def _create_clip_at(name: str, config: dict[str, Any], size: Size | None, text_length: int | None) -> nn.Module:
    model_cfg = config["model_cfg"]
    if size and "timm_model_name" not in model_cfg["vision_cfg"]:
        # open_clip's ResNets take one number alone.
        model_cfg["vision_cfg"]["image_size"] = size[0] if size[0] == size[1] else size
    if text_length is not None:
        model_cfg.get("text_cfg", {})["context_length"] = text_length
    try:
        return create_clip(config)
    except TypeError as error:
        at = f" for images of {size[0]} x {size[1]}" if size else ""
        square = ": take a square size" if size and size[0] != size[1] else ""
        raise ValueError(f"{name} cannot be built{at}{square} ({error})") from error


def build_model_on_meta(name: str, image_size: int | Size | None = None, text_length: int | None = None) -> nn.Module:
    """Return what `build_model` returns, in evaluation mode and without memory."""
    with torch.device("meta"):
        return build_model(name, image_size, text_length).eval()
