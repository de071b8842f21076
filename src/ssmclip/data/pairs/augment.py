"""Training transforms: a random crop, resized and normalised. All random numbers come from the given generator."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import auto_augment
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import functional as tv

from ssmclip.data.pairs.reinforced import Augmentation

CROP_ATTEMPTS = 10
NUM_DRAWS = 2 * CROP_ATTEMPTS + 2 + 1 + 3  # areas and ratios, the place, the mirror, the colours
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels
Size = int | tuple[int, int]  # pixels of a square's side, or (height, width)

NUM_SHARE_DRAWS = 6  # whether the colours are jittered, hue, grey, whether it is blurred, how much, solarised


@dataclass(frozen=True)
class TrainTransform:
    """`transform(picture, generator)` is a float tensor (3, height, width).

    image_size: pixels of a square's side, or (height, width).
    scale: range of the crop's share of the area; ratio: range of its width / height, over that of image_size, so that
    pictures are distorted as little in any shape.
    flip: mirror half of the pictures; off by default, as captions say "on the left".
    color_jitter: strength of random brightness, contrast and saturation, or of each and of hue (in turns of the colour
    circle, at most 0.5), applied in this order; 0 is none.
    color_jitter_prob, gray_scale_prob, gaussian_blur_prob, solarize_prob: shares of the pictures whose colours are
    jittered, which lose their colours, are blurred (sigma 0.1 to 2 pixels), have values from 128 on inverted: SimCLR's
    and BYOL's augmentations (arXiv:2002.05709, appendix A; arXiv:2006.07733, appendix B), in this order.
    interpolation: of the resized crop, "bicubic" or "bilinear"; color_order: in which colours are jittered, "fixed" as
    above, or "random", drawn for each picture as torchvision's ColorJitter does.
    further: the transforms of further views, which `views` makes of each picture at this one's size; window: whether it
    ends with a view of a random window around the crops.
    """

    image_size: Size
    mean: tuple[float, ...]
    std: tuple[float, ...]
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    color_jitter: float | tuple[float, float, float, float] = 0.0
    color_jitter_prob: float = 1.0
    gray_scale_prob: float = 0.0
    gaussian_blur_prob: float = 0.0
    solarize_prob: float = 0.0
    interpolation: str = "bicubic"
    color_order: str = "fixed"
    further: tuple[TrainTransform, ...] = ()
    window: bool = False

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        return self.normalise([self.pixels(np.array(image), generator)])[0]

    def pixels(self, image: np.ndarray, generator: torch.Generator) -> torch.Tensor:
        """Apply the random part: uint8 (height, width, 3) to uint8 (3, *image_size).

        Only the crop is touched, by torch's resize for 8-bit pixels: three times as fast as Pillow's, and equal to
        within 1.
        """
        return self._view(image, generator)[0]

    def _view(self, image: np.ndarray, generator: torch.Generator) -> tuple[torch.Tensor, Box, bool]:
        """Return a view's pixels, its crop, and whether it is mirrored."""
        draws = torch.rand(NUM_DRAWS, generator=generator, dtype=torch.float64).tolist()
        height, width, _ = image.shape
        shape = self.sides[1] / self.sides[0]
        box = crop_box(width, height, self.scale, (self.ratio[0] * shape, self.ratio[1] * shape), draws)
        out = self._resized(image, box)
        mirrored = self.flip and draws[-4] < 0.5
        if mirrored:
            out = out.flip(-1)
        # Drawn apart and by every picture of a stream or none, so that what comes before is as it is without them.
        more = torch.rand(NUM_SHARE_DRAWS, generator=generator, dtype=torch.float64).tolist() if self._shares else []
        if self.color_jitter and (not more or more[0] < self.color_jitter_prob):
            order = torch.randperm(4, generator=generator).tolist() if self.color_order == "random" else range(4)
            out = jitter_colors(out, self.color_jitter, [*draws[-3:], *more[1:2]], order)
        return self._treat(out, *more[2:]) if more else out, box, mirrored

    def _resized(self, image: np.ndarray, box: Box) -> torch.Tensor:
        left, top, right, bottom = box
        crop = torch.from_numpy(image[top:bottom, left:right]).permute(2, 0, 1)
        return interpolate(crop[None], size=self.sides, mode=self.interpolation, antialias=True)[0]

    def views(
        self, image: np.ndarray, generator: torch.Generator, count: int
    ) -> tuple[list[torch.Tensor], torch.Tensor | None]:
        """Return `count` views of a picture, then its further ones and its window; and the places of the views in it.

        Views are as `pixels` makes them, the window is only resized. The places are None without one, else float
        (count, 5): left, top, right, bottom as shares of the window's sides, and 1 for a mirrored view.
        """
        made = [self._view(image, generator) for _ in range(count)]
        views = [view for view, _, _ in made]
        views += [replace(each, image_size=self.image_size).pixels(image, generator) for each in self.further]
        if not self.window:
            return views, None
        draws = torch.rand(4, generator=generator, dtype=torch.float64).tolist()
        window = window_around([box for _, box, _ in made], image.shape[1], image.shape[0], draws)
        places = [[*_within(box, window), float(mirrored)] for _, box, mirrored in made]
        return [*views, self._resized(image, window)], torch.tensor(places)

    def repeated(self, image: np.ndarray, augmentation: Augmentation) -> torch.Tensor:
        """Apply an augmentation whose draws are given instead: uint8 (height, width, 3) to uint8 (3, *image_size).

        Raises ValueError for a crop that is not within the image.
        """
        top, left, height, width = augmentation.crop or (0, 0, *image.shape[:2])
        if not (top >= 0 and left >= 0 and height > 0 and width > 0) or (
            top + height > image.shape[0] or left + width > image.shape[1]
        ):
            size = f"{image.shape[0]} x {image.shape[1]} pixels"
            raise ValueError(f"the crop must lie within the image of {size} (got {augmentation.crop})")
        return augmentation.finish(self._resized(image, (left, top, left + width, top + height)))

    @property
    def sides(self) -> tuple[int, int]:
        """Return height and width of the transformed images."""
        return self.image_size if isinstance(self.image_size, tuple) else (self.image_size, self.image_size)

    @property
    def _shares(self) -> bool:
        """Return whether some pictures are treated differently, or hue is jittered."""
        shares = self.gray_scale_prob + self.gaussian_blur_prob + self.solarize_prob
        return bool(shares or self.color_jitter_prob < 1 or isinstance(self.color_jitter, tuple))

    def _treat(self, out: torch.Tensor, gray: float, blur: float, sigma: float, solarize: float) -> torch.Tensor:
        if gray < self.gray_scale_prob:
            out = tv.rgb_to_grayscale(out, num_output_channels=3)
        if blur < self.gaussian_blur_prob:
            out = gaussian_blur(out, _between(sigma, 0.1, 2.0))
        return tv.solarize(out, 128) if solarize < self.solarize_prob else out

    def normalise(self, pixels: Sequence[torch.Tensor]) -> torch.Tensor:
        """Turn uint8 pictures (3, H, W) into one float batch (B, 3, H, W), cheaper than one by one."""
        mean, std = (255 * torch.tensor(v).view(3, 1, 1) for v in (self.mean, self.std))
        return torch.stack(list(pixels)).float().contiguous().sub_(mean).div_(std)


def train_transform(
    image_size: Size,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    scale: tuple[float, float] = (0.5, 1.0),
    **augment: Any,
) -> TrainTransform:
    """Return the transform for `open_pairs`. mean, std: per channel, in [0, 1]; augment: TrainTransform's fields."""
    return TrainTransform(image_size, tuple(mean), tuple(std), scale=tuple(scale), **augment)


@dataclass(frozen=True)
class TimmTransform:
    """timm's transform for training: `transform(picture, generator)` is a float tensor (3, image_size, image_size).

    arguments: of `timm.data.create_transform`. Its draws come from three global generators, which are seeded from the
    given one and restored.
    """

    arguments: dict[str, Any]

    def __call__(self, image: Image.Image, generator: torch.Generator) -> torch.Tensor:
        with seeded(int(torch.randint(2**31, (), generator=generator))):
            return self._transform(image)

    @cached_property
    def _transform(self) -> Any:
        made = timm.data.create_transform(is_training=True, **self.arguments)
        for operation in _augment_operations(made):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
        return made


def posterize(image: Image.Image, bits_to_keep: int, **_: Any) -> Image.Image:
    """Keep the highest bits of each channel. No bits make a black picture, as they did when the recipes were published.

    timm asks for no bits at the highest magnitude (`rand-m9-mstd0.5-inc1` in one of 300 pictures); Pillow 13 refuses.
    """
    return Image.new(image.mode, image.size) if bits_to_keep < 1 else auto_augment.posterize(image, bits_to_keep)


def _augment_operations(transform: Any) -> Iterator[auto_augment.AugmentOp]:
    """Yield the operations inside a timm transform: of RandAugment, AutoAugment, AugMix, 3-Augment."""
    if isinstance(transform, auto_augment.AugmentOp):
        yield transform
    parts = transform if isinstance(transform, list | tuple) else _held(transform)
    for part in parts:
        yield from _augment_operations(part)


def _held(transform: Any) -> list[Any]:
    return [getattr(transform, name) for name in ("transforms", "ops", "policy") if hasattr(transform, name)]


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch (CPU) for what runs inside, and restore them after it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def jitter_colors(
    image: torch.Tensor, strength: float | Sequence[float], draws: Sequence[float], order: Sequence[int] = range(4)
) -> torch.Tensor:
    """Change brightness, contrast, saturation (and hue, if its strength is given) of uint8 (3, H, W) at random.

    draws: uniform in [0, 1), one for each; order: in which they change, by their places in the list above.
    """
    strengths = [strength] * 3 if isinstance(strength, float | int) else strength
    adjusts = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    changes = list(zip(adjusts, (1, 1, 1, 0), strengths, draws, strict=False))
    for adjust, middle, s, draw in (changes[i] for i in order if i < len(changes)):
        image = adjust(image, middle + s * (2 * draw - 1))
    return image


def gaussian_blur(image: torch.Tensor, sigma: float) -> torch.Tensor:
    """Blur uint8 (3, H, W) with a Gaussian of `sigma` pixels, truncated at three sigma or the image's border."""
    radius = min(math.ceil(3 * sigma), min(image.shape[-2:]) - 1)
    return tv.gaussian_blur(image, [2 * radius + 1] * 2, [sigma] * 2)


def crop_box(width: int, height: int, scale: Sequence[float], ratio: Sequence[float], draws: Sequence[float]) -> Box:
    """Return left, top, right, bottom of a random crop, chosen as in torchvision's RandomResizedCrop.

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


def window_around(boxes: Sequence[Box], width: int, height: int, draws: Sequence[float]) -> Box:
    """Return a random box around boxes in a picture: each side lies anywhere between theirs and the picture's.

    draws: 4, uniform in [0, 1).
    """
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    left, top = (int(draw * (min(sides) + 1)) for draw, sides in zip(draws, (lefts, tops), strict=False))
    room = zip(draws[2:], (rights, bottoms), (width, height), strict=True)
    right, bottom = (max(sides) + int(draw * (limit - max(sides) + 1)) for draw, sides, limit in room)
    return left, top, right, bottom


def _within(box: Box, window: Box) -> list[float]:
    """Return a box's sides as shares of those of the window that it lies in."""
    start, size = window[:2], (window[2] - window[0], window[3] - window[1])
    return [(box[i] - start[i % 2]) / size[i % 2] for i in range(4)]


def _between(draw: float, low: float, high: float) -> float:
    return low + draw * (high - low)
