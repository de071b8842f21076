"""The training transform: a random crop, resized, as a normalised tensor. Every draw comes from the generator it is
given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageEnhance

CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class TrainTransform:
    """`transform(picture, generator)` is a float tensor (3, image_size, image_size).

    scale: range of the crop's share of the area; ratio: range of its width / height; flip: mirror half of the pictures
    (off by default: captions say "on the left"); color_jitter: strength of random brightness, contrast and saturation,
    0 is none.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    color_jitter: float = 0.0

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        return self.normalise([self.pixels(image, generator)])[0]

    def pixels(self, image: Image.Image, generator: torch.Generator) -> np.ndarray:
        """The random part: uint8 (image_size, image_size, 3). Cropping and resizing are one step; only the crop is
        touched."""
        draws = torch.rand(2 * CROP_ATTEMPTS + 2 + 1 + 3, generator=generator, dtype=torch.float64).tolist()
        box = crop_box(image.width, image.height, self.scale, self.ratio, draws)
        size = (self.image_size, self.image_size)
        image = image.resize(size, Image.Resampling.BICUBIC, box=box)
        if self.flip and draws[-4] < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.color_jitter:
            for enhance, draw in zip(
                (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), draws[-3:], strict=True
            ):
                image = enhance(image).enhance(1 + self.color_jitter * (2 * draw - 1))
        return np.asarray(image)

    def normalise(self, pixels: Sequence[np.ndarray]) -> torch.Tensor:
        """uint8 pictures (H, W, 3) as one float batch (B, 3, H, W): once per batch is much cheaper than once per
        picture."""
        batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) * 255 for v in (self.mean, self.std))
        return ((batch - mean) / std).contiguous()


def train_transform(
    image_size: int,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    flip: bool = False,
    color_jitter: float = 0.0,
) -> TrainTransform:
    """The transform for `open_pairs`. mean, std: per channel, of values in [0, 1]."""
    return TrainTransform(image_size, tuple(mean), tuple(std), scale=tuple(scale), flip=flip, color_jitter=color_jitter)


def crop_box(
    width: int, height: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]
) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of a random crop, as torchvision's RandomResizedCrop chooses it.

    draws: uniform in [0, 1), at least 2 per attempt and 2 for the place. When no attempt fits, the largest central crop
    with a ratio in range.
    """
    for attempt in range(CROP_ATTEMPTS):
        area = width * height * _between(draws[2 * attempt], *scale)
        shape = math.exp(_between(draws[2 * attempt + 1], *map(math.log, ratio)))
        w, h = round(math.sqrt(area * shape)), round(math.sqrt(area / shape))
        if 0 < w <= width and 0 < h <= height:
            left = int(draws[2 * CROP_ATTEMPTS] * (width - w + 1))
            top = int(draws[2 * CROP_ATTEMPTS + 1] * (height - h + 1))
            return left, top, left + w, top + h
    w = max(min(width, round(height * ratio[1])), 1)
    h = max(min(height, round(width / ratio[0])), 1)
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _between(draw: float, low: float, high: float) -> float:
    return low + draw * (high - low)
