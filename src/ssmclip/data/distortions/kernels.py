"""Loops over pixels. Sums are in the order of the published NumPy and SciPy code, so that it rounds to the same bit.

Greys are float64 (N, H, W) in [0, 1]; pictures uint8 (N, H, W, 3).
"""

from __future__ import annotations

import numpy as np

from ssmclip.ops.simd import REGISTER_BYTES, broadcast, compiled, entry_point, load, size_of, store

GREY_WEIGHTS = (0.2125, 0.7154, 0.0721)  # skimage.color.rgb2gray
BLOCK = 4 * REGISTER_BYTES  # bytes of a row that `correlate` works on at a time: rows need that much beyond their end
SLACK = BLOCK // 4  # float32 columns


@entry_point
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


@entry_point
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


@entry_point
def scaled(greys, factor, offset):
    """offset + factor x, in place."""
    flat = greys.reshape(-1)
    for i in range(flat.size):
        flat[i] = offset + flat[i] * factor
    return greys


@entry_point
def add_noise(grey, noise, width):
    """x + U[-width, width), in place; noise: U[0, 1) of the same shape (H, W)."""
    flat, unit = grey.reshape(-1), noise.reshape(-1)
    for i in range(flat.size):
        flat[i] = flat[i] + (-width + (width + width) * unit[i])


@compiled()
def correlate(target, centre, left, right, step, weights, width):
    """target[x] = centre[x] weights[0] + sum over k of (left[x - k step] + right[x + k step]) weights[k], far k first.

    target, centre, left, right: addresses; step: in bytes; weights: the symmetric kernel from its centre out, of the
    pictures' type. Rounded as scipy.ndimage.correlate1d rounds: sums in its order, products and sums apart.
    """
    like = weights[0]
    for x in range(0, width * size_of(like), BLOCK):
        w = broadcast(like)
        a0 = load(centre + x, like) * w
        a1 = load(centre + x + REGISTER_BYTES, like) * w
        a2 = load(centre + x + 2 * REGISTER_BYTES, like) * w
        a3 = load(centre + x + 3 * REGISTER_BYTES, like) * w
        for k in range(weights.size - 1, 0, -1):
            w = broadcast(weights[k])
            before, after = left + x - k * step, right + x + k * step
            a0 = a0 + (load(before, like) + load(after, like)) * w
            a1 = a1 + (load(before + REGISTER_BYTES, like) + load(after + REGISTER_BYTES, like)) * w
            a2 = a2 + (load(before + 2 * REGISTER_BYTES, like) + load(after + 2 * REGISTER_BYTES, like)) * w
            a3 = a3 + (load(before + 3 * REGISTER_BYTES, like) + load(after + 3 * REGISTER_BYTES, like)) * w
        store(target + x, a0)
        store(target + x + REGISTER_BYTES, a1)
        store(target + x + 2 * REGISTER_BYTES, a2)
        store(target + x + 3 * REGISTER_BYTES, a3)


def blur(greys, weights, padding):
    """scipy.ndimage.correlate1d along y, then x, mode "constant"; weights: the symmetric kernel from its centre out."""
    _, height, width = greys.shape
    radius = weights.size - 1
    wide = width + BLOCK // 8
    rows = np.full((height + 2 * radius, wide), padding)
    row = np.full(wide + 2 * radius, padding)
    out = np.empty(greys.shape)
    _blur(greys, weights, rows, row, np.empty(wide), out)
    return out


@entry_point
def _blur(greys, weights, rows, row, total, out):
    n, height, width = greys.shape
    radius = weights.size - 1
    first, line, size = row.ctypes.data + radius * 8, rows.strides[0], 8
    for i in range(n):
        rows[radius : radius + height, :width] = greys[i]
        for y in range(height):
            centre = rows.ctypes.data + (radius + y) * line
            correlate(total.ctypes.data, centre, centre, centre, line, weights, width)
            row[radius : radius + width] = total[:width]
            correlate(total.ctypes.data, first, first, first, size, weights, width)
            out[i, y] = total[:width]


def blur_sheared(source, margin, weights):
    """A Gaussian blur of which the part from pixels on the right comes from one row above, as the eidolons' is.

    (It convolves flattened arrays, where one column to the left of the first is the last of the row above.)
    source: float32, the picture with `margin` >= weights.size pixels around it, and SLACK more columns on the right;
    weights: float32, the symmetric kernel from its centre out.
    """
    height, width = source.shape[0] - 2 * margin, source.shape[1] - 2 * margin - SLACK
    wide = width + 2 * weights.size + SLACK
    rows = np.empty((height + 1, wide), np.float32)
    out = np.empty((height, width), np.float32)
    _blur_sheared(source, margin, weights, rows, np.empty(wide, np.float32), out)
    return out


@entry_point
def _blur_sheared(source, margin, weights, rows, total, out):
    height, width = out.shape
    border, line, step, size = weights.size, source.strides[0], rows.strides[0], 4
    corner = source.ctypes.data + (margin - 1) * line + (margin - border) * size
    for y in range(height + 1):  # blurred along y, from row -1
        centre = corner + y * line
        correlate(rows.ctypes.data + y * step, centre, centre, centre, line, weights, width + 2 * border)
    for y in range(height):
        above = rows.ctypes.data + y * step + border * size
        centre = above + step
        correlate(total.ctypes.data, centre, centre, above, size, weights, width)
        out[y] = total[:width]


@entry_point
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
