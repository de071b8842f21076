"""A teacher's stored features in shards of DataCompDR's format (MobileCLIP, arXiv:2311.17049, section 3).

Next to a sample's image and .txt are

    syn.json           {"syn_text": [caption, ...]}: captions a model wrote
    paug.json          {"param_aug": [[crop, operations], ...]}: the random draws of A augmented views
    npz, or pth.gz     image_emb (A, E) of these views; text_emb of the captions, then of the synthetic ones;
                       or syn_text_emb apart

A view is made again from its draws: a crop (top, left, height, width), resized; then RandAugment's operations, each
[number, magnitude]. Files are only ever read as data: arrays without pickles, torch's with `weights_only`.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import pickle
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as tv

from ssmclip.data.pairs.samples import Stored

SYNTHETIC_CAPTIONS = "syn_text"
MOST_BYTES = 2**28  # of one sample's features when unpacked: 30 views and 10 captions of 1,536 numbers take 250 kB

# By their numbers in param_aug: torchvision's RandAugment, in its order.
OPERATIONS = (
    "Identity ShearX ShearY TranslateX TranslateY Rotate Brightness Color Contrast Sharpness Posterize Solarize "
    "AutoContrast Equalize"
).split()


@dataclass(frozen=True)
class Augmentation:
    """The draws of one augmented view. crop: top, left, height, width in the image's pixels; None: all of it."""

    crop: tuple[int, int, int, int] | None
    operations: tuple[tuple[str, float], ...] = ()
    mirrored: bool = False

    def finish(self, image: torch.Tensor) -> torch.Tensor:
        """Apply what comes after the crop to uint8 (3, H, W)."""
        image = image.flip(-1) if self.mirrored else image
        for name, magnitude in self.operations:
            image = _apply(image, name, magnitude)
        return image


def read_augmentation(draws: Sequence[Any]) -> Augmentation:
    """Return one entry of param_aug: a crop of four numbers, a mirror (true, false), a list of operations; null: none.

    Raises ValueError for anything else, such as a mixture of two images.
    """
    crop, mirrored, operations = None, False, ()
    for draw in draws:
        if draw is None:
            continue
        if isinstance(draw, bool):
            mirrored = draw
        elif _is_crop(draw):
            crop = tuple(draw)
        elif _are_operations(draw):
            operations = tuple((OPERATIONS[number], float(magnitude)) for number, magnitude in draw)
        else:
            raise ValueError(f"param_aug must be crops of 4 numbers and lists of operations (got {str(draw)[:80]})")
    return Augmentation(crop, operations, mirrored)


def read_stored(files: Mapping[str, bytes], written: int, synthetic: int) -> Stored:
    """Return a sample's augmentations and features. files: suffix -> bytes; written, synthetic: numbers of captions.

    Raises ValueError that names what is missing, damaged or does not fit.
    """
    arrays = _read_arrays(files)
    images, texts = _floats(arrays, "image_emb"), _floats(arrays, "text_emb")
    if len(texts) < written + synthetic and f"{SYNTHETIC_CAPTIONS}_emb" in arrays:
        texts = torch.cat([texts[:written], _floats(arrays, f"{SYNTHETIC_CAPTIONS}_emb")])
    augmentations = [read_augmentation(draws) for draws in _read_draws(files)]
    if len(images) != len(augmentations) or not augmentations:
        raise ValueError(
            f"image_emb must have a row for each of {len(augmentations)} augmentations (got {len(images)})"
        )
    if len(texts) != written + synthetic:
        raise ValueError(f"text_emb must have a row for each of {written + synthetic} captions (got {len(texts)})")
    return Stored(augmentations, images, texts)


def _read_draws(files: Mapping[str, bytes]) -> Sequence[Any]:
    if "paug.json" not in files:
        raise ValueError("paug.json is missing")
    draws = json.loads(files["paug.json"].decode("utf-8-sig"))
    draws = draws.get("param_aug") if isinstance(draws, dict) else None
    draws = json.loads(draws) if isinstance(draws, str) else draws
    if not isinstance(draws, list) or not all(isinstance(each, list) for each in draws):
        raise ValueError("paug.json must be {'param_aug': [[crop, operations], ...]}")
    return draws


def _read_arrays(files: Mapping[str, bytes]) -> Mapping[str, Any]:
    readers: dict[str, Callable[[bytes], Any]] = {"npz": _read_npz, "pth.gz": _read_pth_gz}  # float32 before bfloat16
    for suffix, read in readers.items():
        if suffix in files:
            try:
                arrays = read(files[suffix])
            except (OSError, EOFError, KeyError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile) as error:
                raise ValueError(f".{suffix} cannot be read: {str(error).splitlines()[0][:200]}") from error
            except zlib.error as error:
                raise ValueError(f".{suffix} is damaged: {error}") from error
            if not isinstance(arrays, Mapping):
                raise ValueError(f".{suffix} must hold arrays by name (got {type(arrays).__name__})")
            return arrays
    raise ValueError(f"the features are missing: neither .{' nor .'.join(readers)} is in the shard")


def _read_npz(data: bytes) -> Mapping[str, Any]:
    with zipfile.ZipFile(io.BytesIO(data)) as members:
        _check_size(sum(member.file_size for member in members.infolist()))
    with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
        return dict(arrays)


def _read_pth_gz(data: bytes) -> Mapping[str, Any]:
    with gzip.open(io.BytesIO(data)) as packed:
        content = packed.read(MOST_BYTES + 1)
    _check_size(len(content))
    return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


def _check_size(size: int) -> None:
    if size > MOST_BYTES:
        raise ValueError(f"a sample's features must take at most {MOST_BYTES:,} bytes (got {size:,} or more)")


def _floats(arrays: Mapping[str, Any], name: str) -> torch.Tensor:
    """Return an array, tensor, list of rows or list of tensors as float32 (n, E). Raises ValueError."""
    if name not in arrays:
        raise ValueError(f"{name} is missing, only {', '.join(map(str, arrays))} are there")
    try:
        rows = arrays[name]
        is_list = isinstance(rows, list | tuple) and rows and isinstance(rows[0], torch.Tensor)
        values = torch.stack(list(rows)) if is_list else torch.as_tensor(rows)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name} must be numbers, a row for each view or caption ({error})") from error
    if values.ndim != 2 or not values.float().isfinite().all():
        raise ValueError(f"{name} must be finite numbers of shape (rows, features) (got {tuple(values.shape)})")
    return values.float()


def _is_crop(draw: Any) -> bool:
    return isinstance(draw, list) and len(draw) == 4 and all(type(number) is int for number in draw)


def _are_operations(draw: Any) -> bool:
    return isinstance(draw, list) and all(_is_operation(each) for each in draw)


def _is_operation(pair: Any) -> bool:
    if not (isinstance(pair, list) and len(pair) == 2 and type(pair[0]) is int and isinstance(pair[1], int | float)):
        return False
    return 0 <= pair[0] < len(OPERATIONS) and math.isfinite(pair[1])


def _apply(image: torch.Tensor, name: str, magnitude: float) -> torch.Tensor:
    """Apply one of RandAugment's operations, as torchvision does: nearest neighbours, black outside the image."""
    moves: dict[str, Callable[[], torch.Tensor]] = {
        "Identity": lambda: image,
        "ShearX": lambda: _affine(image, shear=[math.degrees(math.atan(magnitude)), 0.0], center=[0, 0]),
        "ShearY": lambda: _affine(image, shear=[0.0, math.degrees(math.atan(magnitude))], center=[0, 0]),
        "TranslateX": lambda: _affine(image, translate=[int(magnitude), 0]),
        "TranslateY": lambda: _affine(image, translate=[0, int(magnitude)]),
        "Rotate": lambda: tv.rotate(image, magnitude),
        "Brightness": lambda: tv.adjust_brightness(image, 1 + magnitude),
        "Color": lambda: tv.adjust_saturation(image, 1 + magnitude),
        "Contrast": lambda: tv.adjust_contrast(image, 1 + magnitude),
        "Sharpness": lambda: tv.adjust_sharpness(image, 1 + magnitude),
        "Posterize": lambda: tv.posterize(image, int(magnitude)),
        "Solarize": lambda: tv.solarize(image, magnitude),
        "AutoContrast": lambda: tv.autocontrast(image),
        "Equalize": lambda: tv.equalize(image),
    }
    return moves[name]()


def _affine(image: torch.Tensor, **changes: Any) -> torch.Tensor:
    unchanged = {"angle": 0.0, "translate": [0, 0], "scale": 1.0, "shear": [0.0, 0.0]}
    return tv.affine(image, **{**unchanged, **changes}, interpolation=InterpolationMode.NEAREST)
