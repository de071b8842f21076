"""Raw samples, before decoding, and their random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image


@dataclass
class Sample:
    """A raw sample. key names it in reports. image: encoded bytes, a file, the picture, or a function that makes it.

    captions: one is drawn each time the sample is seen. problem: why it cannot be used, "" if it can.
    fields: for each caption the field it is from, where fields are drawn by probability; else empty.
    stored: reads a teacher's stored features of this sample; None where the source has none. Raises ValueError.
    Not frozen: a source that stays in memory keeps its pictures decoded.
    """

    key: str
    image: bytes | Path | Callable[[], Image.Image] | Image.Image | np.ndarray | None
    captions: list[str]
    problem: str = ""
    detail: str = ""
    fields: Sequence[str] = ()
    stored: Callable[[], Stored] | None = None


@dataclass(frozen=True)
class Stored:
    """What a teacher said of a sample (DataCompDR, arXiv:2311.17049): its features of augmented views and of captions.

    augmentations: of each of the A views, a crop and what is done to it, see `reinforced.Augmentation`.
    images: float32 (A, E), in their order; texts: float32 (captions, E), in the order of `Sample.captions`.
    """

    augmentations: Sequence[Any]
    images: torch.Tensor
    texts: torch.Tensor


def draw_seed(*parts: object) -> int:
    """Return 63 bits from anything printable, the same in every process and on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """Return a separate generator for these parts, such as (seed, pass, key)."""
    return torch.Generator().manual_seed(draw_seed(*parts))


def permutation(length: int, *parts: object) -> np.ndarray:
    """Return 0 .. length - 1 in an order that depends only on `parts`."""
    low, high = draw_seed(*parts) & 0xFFFFFFFF, draw_seed(*parts) >> 32
    return np.random.RandomState([low, high]).permutation(length)  # the one generator whose draws NumPy keeps for ever


def with_replacement(length: int, count: int, *parts: object) -> np.ndarray:
    """Return `count` numbers from 0 to length - 1, each drawn from all of them, that depend only on `parts`."""
    low, high = draw_seed(*parts) & 0xFFFFFFFF, draw_seed(*parts) >> 32
    return np.random.RandomState([low, high]).randint(length, size=count)
