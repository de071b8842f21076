"""Loops over pixels. Each sum is in the order of the published NumPy and SciPy code, so that it rounds to the same bit.

Greys are float64 (N, H, W) in [0, 1]; pictures uint8 (N, H, W, 3).
"""

from __future__ import annotations

import logging

import numpy as np

from ssmclip.ops.simd import compiled

GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # skimage.color.rgb2gray
log = logging.getLogger(__name__)


def kernel(function):
    """Compiled without fused or reordered arithmetic, kept on disk where that is allowed."""
    try:
        return compiled(nogil=True, cache=True)(function)
    except RuntimeError as error:
        log.warning("distortions are compiled again in every process: %s", error)
        return compiled(nogil=True)(function)


@kernel
def to_grey(images):
    """0.2125 R + 0.7154 G + 0.0721 B of values / 255, float64."""
    red, green, blue = np.empty(256), np.empty(256), np.empty(256)
    for value in range(256):
        red[value] = GREY_WEIGHTS[0] * (value / 255.0)
        green[value] = GREY_WEIGHTS[1] * (value / 255.0)
        blue[value] = GREY_WEIGHTS[2] * (value / 255.0)
    n, height, width, _ = images.shape
    out = np.empty((n, height, width))
    for i in range(n):
        for y in range(height):
            for x in range(width):
                out[i, y, x] = red[images[i, y, x, 0]] + green[images[i, y, x, 1]] + blue[images[i, y, x, 2]]
    return out


@kernel
def to_pictures(greys):
    """floor(255 x + 0.5) of x clipped to [0, 1], in all three channels, as scipy.misc.toimage rounded."""
    n, height, width = greys.shape
    out = np.empty((n, height, width, 3), np.uint8)
    for i in range(n):
        for y in range(height):
            for x in range(width):
                value = np.uint8(min(max(greys[i, y, x], 0.0), 1.0) * 255.0 + 0.5)
                out[i, y, x, 0] = value
                out[i, y, x, 1] = value
                out[i, y, x, 2] = value
    return out


@kernel
def scaled(greys, factor, offset):
    """offset + factor x, in place."""
    flat = greys.reshape(-1)
    for i in range(flat.size):
        flat[i] = offset + flat[i] * factor
    return greys


@kernel
def add_noise(grey, noise, width):
    """x + U[-width, width), in place; noise: U[0, 1) of the same shape (H, W)."""
    flat, unit = grey.reshape(-1), noise.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] + (-width + (width + width) * unit[i])


@kernel
def blur(greys, weights, padding):
    """scipy.ndimage.correlate1d along y, then x, mode "constant"; weights: the symmetric kernel from its centre out."""
    n, height, width = greys.shape
    radius = weights.size - 1
    out = np.empty((n, height, width))
    rows = np.full((height + 2 * radius, width), padding)
    row = np.full(width + 2 * radius, padding)
    total = np.empty(width)
    for i in range(n):
        rows[radius : radius + height] = greys[i]
        for y in range(height):
            for x in range(width):
                total[x] = rows[radius + y, x] * weights[0]
            for k in range(radius, 0, -1):
                above, below = rows[radius + y - k], rows[radius + y + k]
                for x in range(width):
                    total[x] += (above[x] + below[x]) * weights[k]
            row[radius : radius + width] = total
            for x in range(width):
                total[x] = row[radius + x] * weights[0]
            for k in range(radius, 0, -1):
                left, right = row[radius - k : radius - k + width], row[radius + k : radius + k + width]
                for x in range(width):
                    total[x] += (left[x] + right[x]) * weights[k]
            out[i, y] = total
    return out


@kernel
def mix_channels(images, light, matrix, offset, starts, middles):
    """Every pixel's light through a 3x3 matrix, back to the nearest of 256 values.

    light: what the screen emits per value (256,); middles: halfway between neighbours (255,);
    starts: for each of len(starts) - 1 equal steps of light, how many middles lie below its beginning.
    """
    n, height, width, _ = images.shape
    out = np.empty_like(images)
    steps = starts.size - 1
    for i in range(n):
        for y in range(height):
            for x in range(width):
                red, green, blue = light[images[i, y, x, 0]], light[images[i, y, x, 1]], light[images[i, y, x, 2]]
                for c in range(3):
                    value = matrix[c, 0] * red + matrix[c, 1] * green + matrix[c, 2] * blue + offset[c]
                    value = min(max(value, 0.0), 1.0)
                    nearest = starts[int(value * steps)]
                    while nearest < 255 and middles[nearest] < value:
                        nearest += 1
                    out[i, y, x, c] = nearest
    return out
