"""Models by name, at an image size of one's choosing: CLIPs, and image encoders by themselves."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import timm
import torch
from timm.layers import to_2tuple
from torch import Tensor, nn

from ssmclip.models import clip_config, create_clip, list_clips
from ssmclip.models.clip import OPEN_CLIP, build_preprocess, build_tokenizer, image_transform, open_clip_config
from ssmclip.models.files.hub import HUB, download
from ssmclip.models.files.weights import CONFIG_NAME, WEIGHTS_NAME, CheckpointError, load_config, load_into, load_state
from ssmclip.models.tokenizer import find_tokenizer
from ssmclip.registry import UnknownName

Size = tuple[int, int]  # height, width in pixels


def as_size(image_size: int | Size) -> Size:
    """(height, width). Raises ValueError for a side that is not a positive whole number of pixels."""
    sides = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"image_size {image_size!r}: pixels, or (height, width), all above 0")
    return sides


def build_model(name: str, image_size: int | Size | None = None, text_length: int | None = None) -> nn.Module:
    """A model with fresh weights, for what does not depend on them.

    name: a CLIP (one of `list_clips()`, `open_clip:NAME`, a run or checkpoint folder) or a timm model, with its
    classification head; image_size: pixels, or (height, width); text_length: tokens its text tower has positions for;
    None for the model's own.
    Raises UnknownName, and ValueError for a size the model cannot take.
    """
    config, size = _clip_config(name), None if image_size is None else as_size(image_size)
    if config is not None:
        if size and "timm_model_name" not in config["model_cfg"]["vision_cfg"]:
            # open_clip's ResNets take one number alone.
            config["model_cfg"]["vision_cfg"]["image_size"] = size[0] if size[0] == size[1] else size
        if text_length is not None:
            config["model_cfg"].get("text_cfg", {})["context_length"] = text_length
        try:
            model = create_clip(config)
        except TypeError as error:
            at = f" for images of {size[0]} x {size[1]}" if size else ""
            square = ": take a square size" if size and size[0] != size[1] else ""
            raise ValueError(f"{name} cannot be built{at}{square} ({error})") from error
    elif timm.is_model(name.split(".")[0]):
        model = timm.create_model(name)
    else:
        near = difflib.get_close_matches(name, timm.list_models(), n=5)
        raise UnknownName("model", name, [*list_clips(), *near])
    if size:
        set_image_size(model, size)
    return model


def _clip_config(name: str) -> dict[str, Any] | None:
    """A CLIP's configuration, None for the name of anything else."""
    if name.startswith(OPEN_CLIP) or name in list_clips():
        return clip_config(name)
    return load_config(find_checkpoint(Path(name))) if Path(name).is_dir() else None


def reads_text(name: str) -> bool:
    """Whether a named model is a CLIP. Raises UnknownName when there is none of that name."""
    if _clip_config(name) is None:
        build_model_on_meta(name)
        return False
    return True


def build_model_on_meta(name: str, image_size: int | Size | None = None, text_length: int | None = None) -> nn.Module:
    """`build_model` without memory."""
    with torch.device("meta"):
        return build_model(name, image_size, text_length).eval()


def own_size(name: str) -> Size:
    """The image size (height, width) a named model is made for."""
    config = _clip_config(name)
    if config is not None:
        return as_size(config["model_cfg"]["vision_cfg"].get("image_size", 224))
    return tuple(timm.get_pretrained_cfg(name).input_size[1:])


def set_image_size(model: nn.Module, size: Size) -> None:
    """Make a model take images of this size, where it has anything that depends on it (positions, windows).

    Raises ValueError for a size that its patches do not divide.
    """
    tower = image_tower(model)
    if patch := patch_size(tower):
        wrong = [side for side, step in zip(size, patch, strict=True) if side % step]
        if wrong:
            near = [step * (side // step + more) for side, step in zip(size, patch, strict=True) for more in (0, 1)]
            near = ", ".join(map(str, sorted({side for side in near if side})))
            raise ValueError(f"image size {size[0]} x {size[1]} is no multiple of the patch, {patch[0]}: take {near}")
    target = tower if hasattr(tower, "set_input_size") else getattr(model, "visual", model)
    if hasattr(target, "set_input_size"):
        try:
            target.set_input_size(size)
        except (AssertionError, RuntimeError, TypeError) as error:
            raise ValueError(f"{type(tower).__name__} cannot take images of {size[0]} x {size[1]}: {error}") from error


def image_tower(model: nn.Module) -> nn.Module:
    """The image encoder of a CLIP (timm's own where it is one), any other model itself."""
    visual = getattr(model, "visual", model)
    return getattr(visual, "trunk", visual)


def patch_size(tower: nn.Module) -> Size | None:
    """(height, width) of the patches of a transformer over patches, None for an encoder of another kind."""
    if not has_attention(tower):
        return None
    patch = getattr(getattr(tower, "patch_embed", None), "patch_size", getattr(tower, "patch_size", None))
    return patch if patch is None else as_size(patch if isinstance(patch, int) else tuple(patch))


def has_attention(module: nn.Module) -> bool:
    """Whether some layer of it attends: known by the names that timm, open_clip and PyTorch give such layers."""
    return any("attention" in type(child).__name__.lower() for child in module.modules())


def encode_image(model: nn.Module, images: Tensor) -> Tensor:
    """A CLIP's image features, any other model's output."""
    return model.encode_image(images) if hasattr(model, "encode_image") else model(images)


def tower_parameters(model: nn.Module, kind: str) -> list[nn.Parameter]:
    """Of the image tower ("image") or of all the rest but the logits' scale and bias ("text"); of no CLIP, all."""
    if not is_clip(model):
        return list(model.parameters())
    image = {id(p) for p in model.visual.parameters()}
    logits = {id(getattr(model, name, None)) for name in ("logit_scale", "logit_bias")}
    return [p for p in model.parameters() if (id(p) in image) == (kind == "image") and id(p) not in logits]


def is_clip(model: nn.Module) -> bool:
    return hasattr(model, "encode_image") and hasattr(model, "encode_text")


def tokens_of(model: nn.Module, batch: int, length: int, device: torch.device | str) -> Tensor:
    """Texts of `length` tokens, (batch, length), the last of each the highest: where CLIP's text towers look.

    Raises ValueError for a length the text tower has no positions for, for 0, and for a model that does not say how
    many tokens it knows, such as CoCa.
    """
    if length < 1:
        raise ValueError(f"texts of {length} tokens: a text has at least 1")
    if (vocabulary := getattr(model, "vocab_size", None)) is None:
        raise ValueError(
            f"{type(model).__name__} has no vocab_size, texts for it cannot be made; leave text_length out"
        )
    tokens = torch.arange(length, device=device) % (vocabulary - 2) + 1
    tokens[-1] = vocabulary - 1
    return tokens.expand(batch, length).contiguous()


class Loaded(NamedTuple):
    """What `load` returns. preprocess: PIL image -> (3, H, W); tokenizer: list of n strings -> (n, context_length)."""

    model: nn.Module
    preprocess: Any
    tokenizer: Any


def load(name: str | Path, *, device: str = "cpu", image_size: int | tuple[int, int] | None = None) -> Loaded:
    """A model ready to evaluate, with its preprocessing and tokenizer.

    name: one of `list_clips()` (fresh weights); `open_clip:NAME` or `open_clip:NAME/PRETRAINED`, PRETRAINED a tag
    open_clip knows or a file; a run folder that `ssmclip train` wrote (its best checkpoint, else its last);
    a folder with `open_clip_config.json` and weights; or `hf-hub:OWNER/NAME`, such a folder on the Hugging Face hub,
    downloaded once. image_size: pixels, or (height, width), in place of the model's own: preprocessing gives pictures
    of that size, and a ViT has its positions resampled to it as timm does.
    Raises UnknownName, CheckpointError, FileNotFoundError.
    """
    name = str(name)
    if name.startswith(OPEN_CLIP):
        return _load_open_clip(name, device, image_size)
    config, folder = _configured(name)
    model = create_clip(config)
    if folder is not None:
        load_into(model, load_state(folder / WEIGHTS_NAME), folder / WEIGHTS_NAME)
    if image_size is not None and hasattr(model.visual, "set_input_size"):
        if getattr(model.visual.trunk, "dynamic_img_size", False):  # from its own positions, for every batch
            model.visual.image_size = to_2tuple(image_size)
        else:
            model.visual.set_input_size(image_size)
    return Loaded(model.to(device).eval(), build_preprocess(config, image_size), build_tokenizer(config, folder))


def load_tokenizer(name: str | Path, file: str | Path | None = None) -> Any:
    """The tokenizer of what `load` takes, without the weights.

    file: where its text tower is a Mamba language model, the `tokenizer.json` of that, or the folder that holds one, in
    place of the one its configuration names. Raises UnknownName, CheckpointError, FileNotFoundError.
    """
    name = str(name)
    if name.startswith(OPEN_CLIP):
        return build_tokenizer(clip_config(name.partition("/")[0]))
    config, folder = _configured(name)
    text_cfg = config["model_cfg"]["text_cfg"]
    if file is None or "mamba" not in text_cfg:
        return build_tokenizer(config, folder)
    changed = text_cfg | {"hf_tokenizer_name": str(find_tokenizer(str(file)))}
    return build_tokenizer(config | {"model_cfg": config["model_cfg"] | {"text_cfg": changed}})


def _configured(name: str) -> tuple[dict[str, Any], Path | None]:
    """The configuration of what `load` takes, and the folder its weights are in (None: fresh ones)."""
    if name.startswith(HUB):
        name = str(download(name))
    if Path(name).is_dir():
        folder = find_checkpoint(Path(name))
        return load_config(folder), folder
    if "/" in name:
        raise FileNotFoundError(f"no folder {name}; a model is a folder or one of: {', '.join(list_clips())}")
    return clip_config(name), None


def find_checkpoint(folder: Path) -> Path:
    """The model folder in `folder`: itself, or a run's best checkpoint, else its last. Raises CheckpointError."""
    if (folder / CONFIG_NAME).is_file() and (folder / WEIGHTS_NAME).is_file():
        return folder
    for pointer in ("best", "last"):
        file = folder / "checkpoints" / pointer
        if file.is_file():
            return folder / "checkpoints" / file.read_text(encoding="utf-8").strip()
    raise CheckpointError(f"{folder} holds neither {WEIGHTS_NAME} nor checkpoints/best or checkpoints/last")


def _load_open_clip(name: str, device: str, image_size: int | tuple[int, int] | None) -> Loaded:
    asked, (name, _, pretrained) = name, name.removeprefix(OPEN_CLIP).partition("/")
    open_clip_config(name)
    if pretrained and not open_clip.is_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
        raise UnknownName(f"weights of {name}", pretrained, open_clip.list_pretrained_tags_by_model(name))
    try:
        model = open_clip.create_model(
            name, pretrained=pretrained or None, device=device, force_image_size=image_size, output_dict=True
        )
    except RuntimeError as error:  # a download that failed, or a file of another model
        raise CheckpointError(f"{asked} can't be loaded: {error}") from error
    preprocess = image_transform(**open_clip.get_model_preprocess_cfg(model))
    return Loaded(model.eval(), preprocess, build_tokenizer({"model_cfg": open_clip_config(name)}))
