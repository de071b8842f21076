"""Build CLIP models by name or from a folder. All are open_clip models; ours are the files in `configs/`.

A file there is an open_clip model configuration, which open_clip then knows by its name, with `preprocess_cfg` where
its own differs. One whose text tower open_clip cannot build carries the key NOT_FOR_OPEN_CLIP.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import safetensors.torch
from open_clip.transform import ResizeKeepRatio
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import nn
from torchvision.transforms import InterpolationMode

from ssmclip.models.files.weights import CONFIG_NAME, WEIGHTS_NAME
from ssmclip.models.plugins import CONFIGS
from ssmclip.models.text_towers import KIND, TRANSFORMER, TextTower, text_tower_kind, text_tower_of
from ssmclip.registry import UnknownName

OPEN_CLIP = "open_clip:"

# open_clip has no place to add a text tower. To a key of a model's configuration that it does not know it answers
# "TypeError: ... got an unexpected keyword argument '<the key>'". So a configuration that needs one of our text towers
# carries this key, and open_clip's error tells its user what to call instead.
NOT_FOR_OPEN_CLIP = "made by ssmclip.load and ssmclip.create_clip, not by open_clip"

# Keys of configurations that count layers, and how many are taken for an error.
LAYERS = frozenset({"layers", "depth", "depths", "n_layer", "num_hidden_layers"})
MOST_LAYERS = 1000
MOST_PIXELS = 16_384  # of a side of the images that a model is given

# CLIP-Mamba's evaluation: shorter side to size, bilinear, centre crop, ImageNet statistics (not OpenAI's).
PREPROCESS = dict(
    mean=list(IMAGENET_DEFAULT_MEAN), std=list(IMAGENET_DEFAULT_STD), interpolation="bilinear", resize_mode="shortest"
)


def list_clips() -> list[str]:
    """Return the names of this package's CLIP models; any of open_clip's works too, as `open_clip:NAME`."""
    return sorted(path.stem for path in CONFIGS.glob("*.json"))


def clip_config(
    name: str, *, image_size: int | tuple[int, int] | None = None, drop_path_rate: float | None = None
) -> dict[str, Any]:
    """Return the configuration of a named CLIP: {"model_cfg": ..., "preprocess_cfg": ...} in open_clip's form.

    name: one of `list_clips()`, or `open_clip:NAME`; image_size: pixels, or (height, width), instead of the configured
    ones; drop_path_rate: of the image tower, where timm makes it. Raises UnknownName.
    """
    if name.startswith(OPEN_CLIP):
        model_cfg, preprocess_cfg = _open_clip_config(name.removeprefix(OPEN_CLIP)), {}
    elif name in list_clips():
        model_cfg = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
        preprocess_cfg = PREPROCESS | model_cfg.pop("preprocess_cfg", {})
    else:
        raise UnknownName("model", name, list_clips())
    return adjusted({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg}, name, image_size, drop_path_rate)


def adjusted(
    config: dict[str, Any],
    name: str,
    image_size: int | tuple[int, int] | None = None,
    drop_path_rate: float | None = None,
) -> dict[str, Any]:
    """Return a copy of a CLIP's configuration with another image size or drop path rate. Raises ValueError.

    name: the model's in messages; the others: as for `clip_config`.
    """
    config = copy.deepcopy(config)
    vision_cfg = config["model_cfg"]["vision_cfg"]
    if image_size is not None:
        vision_cfg["image_size"] = image_size
    if drop_path_rate is not None:
        if "timm_model_name" not in vision_cfg:
            raise ValueError(f"drop_path_rate must be left out for {name}, which has no timm image tower")
        vision_cfg["timm_drop_path"] = drop_path_rate
    return config


def _open_clip_config(name: str) -> dict[str, Any]:
    """Return open_clip's configuration of a model. Raises UnknownName, ValueError for one only ssmclip builds."""
    model_cfg = open_clip.get_model_config(name)
    if model_cfg is None:
        raise UnknownName("open_clip model", name, open_clip.list_models())
    if NOT_FOR_OPEN_CLIP in model_cfg:
        raise ValueError(f"open_clip cannot build the text tower of {name}: pass {name}, without {OPEN_CLIP}")
    return model_cfg


def create_clip(config: str | dict[str, Any], *, grad_checkpointing: bool = False) -> nn.Module:
    """Return a CLIP with random weights. config: a name, or what `clip_config` returned.

    The model's forward returns {"image_features": (B, E), "text_features": (B, E), "logit_scale": (), ...}.
    Raises UnknownName for a key that no configuration has, ValueError for open_clip's models that also write captions.
    """
    config = clip_config(config) if isinstance(config, str) else config
    model_cfg = copy.deepcopy(config["model_cfg"])
    _check_keys(model_cfg)
    _check_layers(model_cfg)
    model_cfg.pop(NOT_FOR_OPEN_CLIP, None)
    custom_text = model_cfg.pop("custom_text", False)
    text_cfg = model_cfg.get("text_cfg", {})
    tower = text_tower_of(text_cfg)
    text_cfg.pop(KIND, None)
    if tower.build is not None:
        model = _create_with_own_text(tower, **model_cfg)
    else:
        custom_text = custom_text or "hf_model_name" in text_cfg
        model = (open_clip.CustomTextCLIP if custom_text else open_clip.CLIP)(**model_cfg, output_dict=True)
    if grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def _check_keys(model_cfg: dict[str, Any]) -> None:
    if "multimodal_cfg" in model_cfg:
        raise ValueError(
            "a model with multimodal_cfg also writes captions, and only open_clip.create_model builds it: "
            "remove multimodal_cfg to get its two encoders, or choose another model"
        )
    known = {
        "": {*inspect.signature(open_clip.CustomTextCLIP).parameters, "custom_text", NOT_FOR_OPEN_CLIP}
        - {"output_dict"},
        "text_cfg": {*text_tower_of(model_cfg.get("text_cfg", {})).keys, KIND},
        "vision_cfg": {field.name for field in dataclasses.fields(open_clip.CLIPVisionCfg)},
    }
    for part, keys in known.items():
        for key in model_cfg.get(part, {}) if part else model_cfg:
            if key not in keys:
                raise UnknownName(f"key of {part or 'model_cfg'}", key, keys)


def _check_layers(group: dict[str, Any], name: str = "model_cfg") -> None:
    """Raise ValueError for more layers than any model has: building them one by one would take hours."""
    for key, value in group.items():
        if isinstance(value, dict):
            _check_layers(value, f"{name}.{key}")
        elif key in LAYERS:
            counts = value if isinstance(value, (list, tuple)) else [value]
            if any(isinstance(count, int) and not 0 <= count <= MOST_LAYERS for count in counts):
                raise ValueError(f"{name}.{key} must be at most {MOST_LAYERS} (got {value})")


def _create_with_own_text(
    tower: TextTower, embed_dim: int, text_cfg: dict[str, Any], **model_cfg: Any
) -> open_clip.CustomTextCLIP:
    # open_clip has no list of text towers to add one to: it makes its smallest, which ours replaces.
    smallest = {"context_length": 1, "vocab_size": 1, "width": 1, "heads": 1, "layers": 1}
    model = open_clip.CustomTextCLIP(embed_dim, text_cfg=smallest, output_dict=True, **model_cfg)
    model.text = tower.build(embed_dim, text_cfg)
    model.context_length, model.vocab_size = model.text.context_length, model.text.vocab_size
    return model


def save_model(model: nn.Module, config: dict[str, Any], folder: str | Path) -> None:
    """Write `open_clip_config.json` and `open_clip_model.safetensors`: a folder that open_clip and `load` read.

    config: {"model_cfg": ..., "preprocess_cfg": ...} in open_clip's form. If open_clip cannot build its text tower, the
    file says so, and open_clip refuses the folder with an error that names `load`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = {**config, "model_cfg": _for_open_clip(config["model_cfg"])}
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    state = {key: value.detach().contiguous() for key, value in model.state_dict().items()}
    safetensors.torch.save_file(state, folder / WEIGHTS_NAME)


def _for_open_clip(model_cfg: dict[str, Any]) -> dict[str, Any]:
    """Return a configuration that open_clip builds, or else refuses with a key that says why."""
    text_cfg = model_cfg.get("text_cfg", {})
    if text_tower_of(text_cfg).build is not None:
        return {NOT_FOR_OPEN_CLIP: True, **model_cfg}
    if text_tower_kind(text_cfg) == TRANSFORMER and KIND in text_cfg:
        return {**model_cfg, "text_cfg": {key: value for key, value in text_cfg.items() if key != KIND}}
    return model_cfg


def build_preprocess(config: dict[str, Any], image_size: int | tuple[int, int] | None = None):
    """Return the evaluation preprocessing, PIL image -> float (3, H, W).

    image_size: pixels, or (height, width), in place of the configured one. The rule is the model's at every size:
    "squash" both sides; "shortest", where both sides at least reach the size and the centre is cut out; "longest",
    where neither exceeds it and the rest is filled.
    """
    size = image_size or config["model_cfg"]["vision_cfg"].get("image_size", 224)
    return image_transform(**{**config.get("preprocess_cfg", {}), "size": size})


def image_transform(size: int | Sequence[int], interpolation: str | None = None, mode: str = "RGB", **how: Any):
    """Return open_clip's evaluation preprocessing, with the given interpolation at every size.

    size: pixels, or (height, width); interpolation: "bicubic" (also None) | "bilinear"; mode: "RGB" alone; how: mean,
    std, resize_mode and fill_color of `open_clip.image_transform`. Raises ValueError for a size that is none.
    """
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"the image size must be pixels, or (height, width) (got {size!r})")
    if max(sides) > MOST_PIXELS:
        raise ValueError(f"the image size must be at most {MOST_PIXELS} pixels (got {size!r})")
    one = sides[0] if sides[0] == sides[1] else sides
    transform = open_clip.image_transform(one, is_train=False, interpolation=interpolation, **how)
    resize = transform.transforms[0]
    if isinstance(resize, ResizeKeepRatio):  # open_clip does not tell it which where the sides differ
        resize.interpolation = InterpolationMode.BILINEAR if interpolation == "bilinear" else InterpolationMode.BICUBIC
    return transform


def build_tokenizer(config: dict[str, Any], folder: Path | None = None) -> Callable[..., Any]:
    """Return the tokenizer of a model's text tower, at its context length: n strings -> tokens (n, L).

    folder: where the model's files are; tokenizer files there are used instead of downloading those that
    `text_cfg.hf_tokenizer_name` names. Raises FileNotFoundError when a tokenizer is not on disk and cannot be
    downloaded.
    """
    text_cfg = config["model_cfg"]["text_cfg"]
    return text_tower_of(text_cfg).tokenizer(text_cfg, folder)


def save_tokenizer(config: dict[str, Any], folder: str | Path) -> None:
    """Save the files of a configuration's tokenizer next to the weights, where `load` looks first.

    CLIP's own byte pairs come with open_clip and need no files. Raises FileNotFoundError as `build_tokenizer`.
    """
    text_cfg = config["model_cfg"]["text_cfg"]
    text_tower_of(text_cfg).save_tokenizer(text_cfg, Path(folder))
