"""Eidolons (Koenderink et al. 2017, J. Vision 17(2):7), as the experiments made them: partially coherent disarray.

A picture is cut into 12 bands (differences of Gaussians, sigma 0.71 to 32), each band's pixels are fetched from
displaced places, and the bands are added up again. The displacements are blurred noise: one field per band, of grain
10 (incoherent), or the sum over this and all coarser bands of noise blurred as the band is (coherent), or a mix.

The published code blurs 512 x 512 arrays, the mirrored picture and white noise alike, by transforms. Here the picture
is filtered where it is seen. So is fine noise; noise blurred by sigma >= 4 is A W A': W white on a grid as coarse as
sigma, A the Gaussian between its places and the pixels, which has the same covariance to 1e-4. (The shear that
`blur_sheared` tells of is left out there: it is too small to be seen.) The bands are the published ones to rounding,
the displacements have the published distribution.
"""

from __future__ import annotations

import math
from functools import lru_cache
from statistics import NormalDist

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from ssmclip.data.distortions.kernels import SLACK, blur_sheared
from ssmclip.ops.simd import entry_point

SIDE = 256  # pixels of the longer side; larger and smaller pictures are resized and resized back
MAX_SIGMA = 64
SIGMAS = tuple(math.sqrt(2) ** i / math.sqrt(2) for i in range(12))
GRAIN = 10.0
TRUNCATE = 4.5  # sigmas
COARSE_SIGMA = 4.0


def disarray(
    image: UInt8[np.ndarray, "h w 3"], reach: float, coherence: float, seed: int, grain: float = GRAIN
) -> UInt8[np.ndarray, "h w 3"]:
    """Return the picture, grey and disarrayed. reach: pixels of displacement per field unit; coherence in [0, 1]."""
    height, width = image.shape[:2]
    scale = SIDE / max(height, width)
    size = (max(round(width * scale), 1), max(round(height * scale), 1))
    resized = Image.fromarray(image).resize(size, Image.Resampling.LANCZOS).convert("L")
    bands = split(np.asarray(resized))
    rows, columns = displacements(bands.shape[1:], coherence, grain, np.random.default_rng(seed))
    grey = gather(bands, rows, columns, np.float32(reach), margin(size[1]), margin(size[0]))
    out = Image.fromarray(grey).resize((width, height), Image.Resampling.LANCZOS)
    return np.repeat(np.asarray(out)[..., None], 3, axis=2)


def margin(side: int) -> int:
    """Return the width of the mirrored margin: up to the next power of two of 1.5 sides."""
    return (2 ** math.ceil(math.log2(1.5 * side)) - side) // 2


def split(grey: UInt8[np.ndarray, "h w"]) -> Float32[np.ndarray, "bands h w"]:
    """Return the picture's bands, fine to coarse. They add up to the picture blurred by 0.71 pixels."""
    border = len(_half_kernel(SIGMAS[-1]))
    padded = np.pad(grey.astype(np.float32), border, mode="symmetric")
    padded = np.pad(padded, ((0, 0), (0, SLACK)))
    bands = np.stack([blur_sheared(padded, border, _half_kernel(sigma)) for sigma in SIGMAS])
    bands[:-1] -= bands[1:]
    return bands


def _half_kernel(sigma: float) -> np.ndarray:
    return _gaussian(np.arange(math.ceil(TRUNCATE * sigma) + 1), sigma).astype(np.float32)


def _gaussian(x: np.ndarray, sigma: float) -> np.ndarray:
    return np.exp(-(x**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)


def displacements(
    shape: tuple[int, int], coherence: float, grain: float, rng: np.random.Generator
) -> Float32[np.ndarray, "2 bands h w"]:
    """Return displacements of each band along rows and along columns, for a reach of 1 pixel."""
    fields = np.zeros((2, len(SIGMAS), *shape), np.float32)
    if coherence > 0:
        for k, sigma in enumerate(SIGMAS):
            fields[:, k] = noise(2, shape, sigma, rng) * np.float32(coherence * sigma / MAX_SIGMA)
        for k in range(len(SIGMAS) - 2, -1, -1):
            fields[:, k] += fields[:, k + 1]
    if coherence < 1:
        incoherent = noise(2 * len(SIGMAS), shape, grain, rng).reshape(fields.shape)
        incoherent *= np.float32(1 - coherence)
        fields += incoherent
    return fields


def noise(
    count: int, shape: tuple[int, int], sigma: float, rng: np.random.Generator
) -> Float32[np.ndarray, "count h w"]:
    """Return independent fields of white noise of the published amplitude, blurred.

    The published noise is N(0, 1) over the mirrored picture times 127.5 / its largest absolute value. Its mean over its
    standard deviation, both after the blur, is subtracted; so it says, and it hardly matters.
    """
    coarse = sigma >= COARSE_SIGMA
    kernel = _half_kernel(sigma)
    step = sigma if coarse else 1.0
    if coarse:
        places = [_spread(side, sigma).shape[1] for side in shape]
    else:
        places = [shape[0] + 2 * len(kernel), shape[1] + 2 * len(kernel) + SLACK]
    white = rng.standard_normal((count, *places), dtype=np.float32)
    pixels = math.prod(side + 2 * margin(side) for side in shape)
    seen = min(step**2 * white[0].size / pixels, 1)
    mean = math.sqrt(seen / white[0].size) * white.sum(axis=(1, 2)) + math.sqrt(1 - seen) * rng.standard_normal(count)
    largest = [NormalDist().inv_cdf((1 + u ** (1 / pixels)) / 2) for u in rng.random(count)]
    white *= (127.5 / np.array(largest, np.float32))[:, None, None]
    if coarse:
        fields = np.matmul(np.matmul(_spread(shape[0], sigma), white), _spread(shape[1], sigma).T)
    else:
        fields = np.stack([blur_sheared(plane, len(kernel), kernel) for plane in white])
    offset = 2 * math.sqrt(math.pi) * sigma / math.sqrt(pixels) * mean
    fields -= offset.astype(np.float32)[:, None, None]
    return fields


@lru_cache(maxsize=64)
def _spread(side: int, sigma: float) -> Float32[np.ndarray, "side places"]:
    """Return the Gaussian from white noise at places that are sigma apart to pixels."""
    places = sigma * np.arange(-4, math.ceil((side - 1) / sigma) + 5)
    return (_gaussian(np.arange(side)[:, None] - places, sigma) * math.sqrt(sigma)).astype(np.float32)


@entry_point
def gather(bands, rows, columns, reach, row_margin, column_margin):
    """Return the sum of the bands, each fetched from displaced places, as uint8 (truncated). Margins mirror it.

    bands, rows, columns: float32 (K, H, W). Places are clipped to the margins and rounded down.
    """
    count, height, width = bands.shape
    total = np.zeros((height, width), np.float32)
    for k in range(count):
        for y in range(height):
            for x in range(width):
                row = min(max(y + row_margin + reach * rows[k, y, x], 0), height + 2 * row_margin - 1)
                column = min(max(x + column_margin + reach * columns[k, y, x], 0), width + 2 * column_margin - 1)
                i, j = int(row) - row_margin, int(column) - column_margin
                i = -1 - i if i < 0 else (2 * height - 1 - i if i >= height else i)
                j = -1 - j if j < 0 else (2 * width - 1 - j if j >= width else j)
                total[y, x] += bands[k, i, j]
    out = np.empty((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            out[y, x] = np.uint8(min(max(total[y, x], 0), 255))
    return out
