"""Raw samples, before decoding, and their random numbers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image


@dataclass
class Sample:
    """A raw sample. key names it in reports. image: encoded bytes, a file, the picture, or a function that makes it.

    captions: one is drawn each time the sample is seen. problem: why it cannot be used, "" if it can.
    Not frozen: a source that stays in memory keeps its pictures decoded.
    """

    key: str
    image: bytes | Path | Callable[[], Image.Image] | Image.Image | np.ndarray | None
    captions: list[str]
    problem: str = ""
    detail: str = ""


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
