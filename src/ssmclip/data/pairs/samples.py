"""One raw sample on its way to a batch, before anything is decoded, and the random numbers that belong to it."""

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
    """key names it in reports. image: encoded bytes, a file, a function that makes the picture, or the picture.

    captions: one is drawn each time the sample is seen. problem: why it can't be used; "": nothing known against it.
    Not frozen: a source that stays in memory keeps its pictures decoded.
    """

    key: str
    image: bytes | Path | Callable[[], Image.Image] | Image.Image | np.ndarray | None
    captions: list[str]
    problem: str = ""
    detail: str = ""


def draw_seed(*parts: object) -> int:
    """63 bits from anything printable, the same in every process and on every machine."""
    text = "\x1f".join(map(str, parts))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator_for(*parts: object) -> torch.Generator:
    """A generator of its own for these parts, such as (seed, pass, key)."""
    return torch.Generator().manual_seed(draw_seed(*parts))


def permutation(length: int, *parts: object) -> np.ndarray:
    """0 .. length - 1 in an order that depends on `parts` only."""
    low, high = draw_seed(*parts) & 0xFFFFFFFF, draw_seed(*parts) >> 32
    return np.random.RandomState([low, high]).permutation(length)  # the one generator whose draws NumPy keeps for ever
