"""The training transform: a random crop, resized, normalised. Every draw comes from the generator it is given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import interpolate
from torchvision.transforms.v2.functional import adjust_brightness, adjust_contrast, adjust_saturation

CROP_ATTEMPTS = 10
NUM_DRAWS = 2 * CROP_ATTEMPTS + 2 + 1 + 3  # areas and ratios, the place, the mirror, the colours


@dataclass(frozen=True)
class TrainTransform:
    """`transform(picture, generator)` is a float tensor (3, image_size, image_size).

    scale: range of the crop's share of the area; ratio: range of its width / height.
    flip: mirror half of the pictures; off by default, as captions say "on the left".
    color_jitter: strength of random brightness, contrast and saturation; 0 is none.
    """

    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    color_jitter: float = 0.0

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        return self.normalise([self.pixels(np.array(image), generator)])[0]

    def pixels(self, image: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        """The random part: uint8 (height, width, 3) to uint8 (3, image_size, image_size).

        Only the crop is touched, by torch's resize for 8-bit pixels: three times as fast as Pillow's, and equal to
        within 1.
        """
        draws = torch.rand(NUM_DRAWS, generator=generator, dtype=torch.float64).tolist()
        height, width, _ = image.shape
        left, top, right, bottom = crop_box(width, height, self.scale, self.ratio, draws)
        crop = torch.from_numpy(image[top:bottom, left:right]).permute(2, 0, 1)
        size = (self.image_size, self.image_size)
        out = interpolate(crop[None], size=size, mode="bicubic", antialias=True)[0]
        if self.flip and draws[-4] < 0.5:
            out = out.flip(-1)
        if self.color_jitter:
            for adjust, draw in zip((adjust_brightness, adjust_contrast, adjust_saturation), draws[-3:], strict=True):
                out = adjust(out, 1 + self.color_jitter * (2 * draw - 1))
        return out

    def normalise(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """uint8 pictures (3, H, W) as one float batch (B, 3, H, W): once per batch is cheaper than once per picture."""
        mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return torch.stack(list(pixels)).float().contiguous().sub_(mean).div_(std)


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
