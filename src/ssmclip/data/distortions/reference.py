"""The definitions of the distortions in plain NumPy, SciPy and Pillow, one picture at a time, as they were published.

    REFERENCE[name](image uint8 (H, W, 3), level, RandomState, tables) -> uint8 (H, W, 3)

Nothing here is used by `distort`; tests and benchmarks compare with it. Levels are those of `parse_level`, and tables
are a dict with the arrays "amplitude" and "gamma".
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter


def grey(image):
    """Convert to grey as scikit-image did in 2018. Its matrix product now rounds some exact halves the other way."""
    x = image / 255.0
    return 0.2125 * x[..., 0] + 0.7154 * x[..., 1] + 0.0721 * x[..., 2]


def picture(x):
    """Return 8 bits of a grey (H, W) or colour (H, W, 3) in [0, 1]."""
    if x.ndim == 2:
        x = np.dstack([x, x, x])
    return np.floor(255 * np.clip(x, 0, 1) + 0.5).astype(np.uint8)


def colour(image, level, rng, tables):
    return picture(grey(image)) if level else image


def contrast(image, level, rng, tables):
    return picture((1 - level) / 2 + grey(image) * level)


def uniform_noise(image, level, rng, tables):
    x = (1 - 0.3) / 2 + grey(image) * 0.3
    return picture(x + rng.uniform(-level, level, size=x.shape))


def low_pass(image, level, rng, tables):
    return picture(gaussian_filter(grey(image), level, mode="constant", cval=0.4423))


def high_pass(image, level, rng, tables):
    x = grey(image)
    if math.isinf(level):
        return picture(x)
    x = x - gaussian_filter(x, level, mode="constant", cval=0.4423)
    return picture(x + (0.4423 - x.mean()))


def phase_scrambling(image, level, rng, tables):
    if not level:  # there and back, exact halves would be rounded by chance
        return picture(grey(image))
    f = np.fft.fftshift(np.fft.fft2(grey(image)))
    amplitude, phase = np.abs(f), np.angle(f)
    flat = phase[1:, 1:].flatten()
    shifts = (rng.random_sample(flat.size // 2) - 0.5) * 2 * level / 180 * np.pi
    flat[: flat.size // 2] += shifts
    flat[flat.size // 2 + 1 :] -= shifts
    phase[1:, 1:] = flat.reshape(phase[1:, 1:].shape)
    return picture(np.fft.ifft2(np.fft.ifftshift(amplitude * np.exp(1j * phase))).real)


def power_equalisation(image, level, rng, tables):
    if not level:
        return picture(grey(image))
    phase = np.angle(np.fft.fftshift(np.fft.fft2(grey(image))))
    return picture(np.fft.ifft2(np.fft.ifftshift(tables["amplitude"] * np.exp(1j * phase))).real)


def rotation(image, level, rng, tables):
    x = grey(image)
    turned = {0: x, 90: x.T[::-1], 180: x[::-1, ::-1], 270: x[::-1].T}
    return picture(turned[level])


def false_colour(image, level, rng, tables):
    if not level:
        return image
    gamma = np.ravel(tables["gamma"])
    cones = np.array(
        [
            [0.1619982647, 0.208049264, 0.0389347448],
            [0.0330275785, 0.2496504557, 0.0618343518],
            [0.0015524055, 0.0198861001, 0.1890224274],
        ]
    )
    white = np.array([0.20449114, 0.17225619, 0.10523047])
    opponent = np.array(
        [
            [9.27590805, 9.27590805, 0],
            [7.86421647, -9.33587662, 0],
            [-3.39709047, -3.39709047, 12.16230246],
        ]
    )
    response = np.einsum("ij,klj->kli", cones, gamma[image]) - white
    channels = np.einsum("ij,klj->kli", opponent, response)
    channels[..., 1:] *= -1
    response = np.einsum("ij,klj->kli", np.linalg.inv(opponent), channels) + white
    light = np.clip(np.einsum("ij,klj->kli", np.linalg.inv(cones), response), 0, 1)
    nearest = np.vectorize(lambda value: np.abs(gamma - value).argmin())
    return picture(nearest(light) / 255)


# ---- eidolons --------------------------------------------------------------------------------------------------------

SIGMAS = [math.sqrt(2) ** i / math.sqrt(2) for i in range(12)]


def blurred(plane, sigma):
    """The convolution of the flattened plane with a flattened Gaussian of its size."""
    kernel = np.ones(plane.shape)
    for axis, side in enumerate(plane.shape):
        x = np.fft.fftfreq(side, 1 / side)
        gaussian = np.exp(-(x**2) / (2 * sigma**2)) / (math.sqrt(2 * math.pi) * sigma)
        kernel = kernel * np.expand_dims(gaussian, 1 - axis)
    spectrum = np.fft.rfft(plane.ravel()) * np.fft.rfft(kernel.ravel())
    return np.fft.irfft(spectrum).reshape(plane.shape)


def blurred_noise(shape, sigma, rng):
    plane = rng.normal(size=shape)
    plane = np.clip(127.5 * plane / np.abs(plane).max(), -127, 127)
    plane = blurred(plane, sigma)
    return plane - plane.mean() / plane.std()


def displacements(shape, coherence, grain, rng):
    """(12, h, w): displacements of every band along one axis."""
    coherent = [blurred_noise(shape, sigma, rng) * sigma / 64 for sigma in SIGMAS]
    coherent = np.cumsum(coherent[::-1], axis=0)[::-1]
    incoherent = np.array([blurred_noise(shape, grain, rng) for _ in SIGMAS])
    return (1 - coherence) * incoherent + coherence * coherent


def eidolon(image, reach, coherence, rng, grain=10.0):
    """Square pictures."""
    grey = np.asarray(Image.fromarray(image).resize((256, 256), Image.Resampling.LANCZOS).convert("L"))
    plane = np.pad(grey, 128, mode="symmetric").astype(float)
    levels = [blurred(plane, sigma) for sigma in SIGMAS]
    bands = [fine - coarse for fine, coarse in pairwise(levels)] + levels[-1:]
    rows, columns = (displacements(plane.shape, coherence, grain, rng) for _ in range(2))
    y, x = np.indices(plane.shape)
    total = np.zeros(plane.shape)
    for band, row, column in zip(bands, rows, columns, strict=True):
        total += band[np.clip(y + reach * row, 0, 511).astype(int), np.clip(x + reach * column, 0, 511).astype(int)]
    out = Image.fromarray(np.clip(total[128:384, 128:384], 0, 255).astype(np.uint8))
    out = np.asarray(out.resize(image.shape[1::-1], Image.Resampling.LANCZOS))
    return np.dstack([out, out, out])


REFERENCE = {
    "colour": colour,
    "contrast": contrast,
    "high-pass": high_pass,
    "low-pass": low_pass,
    "phase-scrambling": phase_scrambling,
    "power-equalisation": power_equalisation,
    "false-colour": false_colour,
    "rotation": rotation,
    "uniform-noise": uniform_noise,
    "eidolonI": lambda image, level, rng, tables: eidolon(image, level, 1.0, rng),
    "eidolonII": lambda image, level, rng, tables: eidolon(image, level, 0.3, rng),
    "eidolonIII": lambda image, level, rng, tables: eidolon(image, level, 0.0, rng),
}
