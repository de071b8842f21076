"""What a picture is cut to before it is distorted, and the seed it gets."""

from __future__ import annotations

import zlib

from PIL import Image

SIDE = 224  # pixels, of all published stimuli


RESIZE = 256 / 224  # of the short side over the crop's


def crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square after the short side is resized to 256 / 224 of `side`, as torchvision's Resize, CenterCrop."""
    scale = RESIZE * side / min(image.size)
    width, height = (max(int(s * scale), side) for s in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def picture_seed(seed: int, *names: str) -> int:
    """A picture's own seed, by its name: the same whatever else there is, and at every level."""
    return zlib.crc32("/".join([str(seed), *names]).encode())
