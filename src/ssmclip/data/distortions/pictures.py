"""Crop pictures before they are distorted, and derive their seeds."""

from __future__ import annotations

import zlib

from PIL import Image

SIDE = 224  # pixels, of all published stimuli


RESIZE = 256 / 224  # of the short side over the crop's


def crop(image: Image.Image, side: int) -> Image.Image:
    """Resize the short side to 256 / 224 of `side` and cut out the middle, as torchvision's Resize and CenterCrop."""
    scale = RESIZE * side / min(image.size)
    width, height = (max(int(s * scale), side) for s in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def picture_seed(seed: int, *names: str) -> int:
    """Return a picture's seed, which depends only on its name and is the same at every level."""
    return zlib.crc32("/".join([str(seed), *names]).encode())
