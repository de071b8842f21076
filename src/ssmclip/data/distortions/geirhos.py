"""The 12 parametric distortions of Geirhos et al. 2018 and 2021 (arXiv:1808.08750, 2106.07411).

    distort(image, "high-pass", level=3.0)        uint8 (H, W, 3) or (N, H, W, 3) in, the same out

A distortion is a function of pictures, a level and a seed per picture. Deterministic ones give the published stimuli's
pixels exactly: grey is skimage's, arithmetic is float64, and 8 bits are floor(255 x + 0.5). Random ones draw from
numpy.random.RandomState in the published code's order. The pictures are expected as the experiments had them, cropped
to 224 x 224: sigmas and reaches are in pixels. The labels of levels are those of the published human data. Not counted,
as published, are the levels that do not distort and those that people get right in less than 20 % of trials.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float64, UInt8

from ssmclip.data.distortions import kernels
from ssmclip.data.distortions.eidolon import GRAIN, disarray
from ssmclip.data.distortions.registry import Pictures, distortion

GEIRHOS = (
    "colour",
    "contrast",
    "false-colour",
    "low-pass",
    "high-pass",
    "phase-scrambling",
    "power-equalisation",
    "rotation",
    "uniform-noise",
    "eidolonI",
    "eidolonII",
    "eidolonIII",
)
PADDING = 0.4423  # the mean grey of the experiments' images: what lies around an image, and a high-pass image's mean
NOISE_CONTRAST = 0.3  # noise is added to pictures of 30 % contrast


# ---- colours ---------------------------------------------------------------------------------------------------------


@distortion("colour", levels={"cr": 0, "bw": 1}, undistorted="cr", meaning="the share of grey", allowed=(0, 1))
def colour(images: Pictures, level: float, seeds: list[int]) -> Pictures:
    """Grey at level 1; in between, a mix of the picture and its grey."""
    if level == 0:
        return images.copy()
    grey = kernels.to_grey(images)
    if level == 1:
        return kernels.to_pictures(grey)
    mixed = (1 - level) * (images / 255.0) + level * grey[..., None]
    return np.floor(255 * mixed + 0.5).astype(np.uint8)


@distortion(
    "contrast",
    levels={"c100": 1, "c50": 0.5, "c30": 0.3, "c15": 0.15, "c10": 0.1, "c05": 0.05, "c03": 0.03, "c01": 0.01},
    undistorted="c100",
    counted=("c50", "c30", "c15", "c10", "c05"),
    meaning="the contrast, as a fraction",
    allowed=(0, 1),
)
def contrast(images: Pictures, level: float, seeds: list[int]) -> Pictures:
    """Grey, towards 0.5 (not towards the image's mean)."""
    return kernels.to_pictures(kernels.scaled(kernels.to_grey(images), level, (1 - level) / 2))


# RGB light -> responses of the L, M, S cones; those less CONES_WHITE -> luminance, L - M and S - luminance.
# Measured on the experiments' screen (generalisation-humans-DNNs, get_opponent_colours).
CONES = np.array(
    [
        [0.1619982647, 0.208049264, 0.0389347448],
        [0.0330275785, 0.2496504557, 0.0618343518],
        [0.0015524055, 0.0198861001, 0.1890224274],
    ]
)
CONES_WHITE = np.array([0.20449114, 0.17225619, 0.10523047])
OPPONENT = np.array(
    [
        [9.27590805, 9.27590805, 0],
        [7.86421647, -9.33587662, 0],
        [-3.39709047, -3.39709047, 12.16230246],
    ]
)


@distortion(
    "false-colour",
    levels={"True": 0, "False": 1},
    undistorted="True",
    meaning="how far the colours turn to their opponents",
    allowed=(0, 1),
    tables=("gamma",),
)
def false_colour(images: Pictures, level: float, seeds: list[int], gamma: np.ndarray) -> Pictures:
    """L - M and S - luminance times 1 - 2 level, luminance kept: at 1 the opponent colours, at 0.5 no colour."""
    if level == 0:
        return images.copy()
    to_opponent = OPPONENT @ CONES
    turn = np.diag([1, 1 - 2 * level, 1 - 2 * level])
    matrix = np.linalg.inv(to_opponent) @ turn @ to_opponent
    white = np.linalg.inv(CONES) @ CONES_WHITE
    middles = (gamma[1:] + gamma[:-1]) / 2
    starts = np.searchsorted(middles, np.linspace(0, 1, 4097))
    return kernels.mix_channels(images, gamma, matrix, white - matrix @ white, starts, middles)


# ---- filters ---------------------------------------------------------------------------------------------------------


def gaussian(greys: Float64[np.ndarray, "n h w"], sigma: float) -> Float64[np.ndarray, "n h w"]:
    """scipy.ndimage.gaussian_filter with mode "constant", cval PADDING, truncate 4. sigma in pixels."""
    radius = int(4 * sigma + 0.5)
    x = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 / (sigma * sigma) * x**2) if radius else np.ones(1)
    return kernels.blur(greys, (weights / weights.sum())[radius:], PADDING)


@distortion(
    "low-pass",
    levels={"0": 0, "1": 1, "3": 3, "5": 5, "7": 7, "10": 10, "15": 15, "40": 40},
    undistorted="0",
    counted=("1", "3", "5", "7", "10"),
    meaning="the Gaussian's standard deviation in pixels",
    allowed=(0, 1e4),
)
def low_pass(images: Pictures, level: float, seeds: list[int]) -> Pictures:
    """Grey, blurred."""
    return kernels.to_pictures(gaussian(kernels.to_grey(images), level))


@distortion(
    "high-pass",
    levels={"inf": math.inf, "3.0": 3, "1.5": 1.5, "1.0": 1, "0.7": 0.7, "0.55": 0.55, "0.45": 0.45, "0.4": 0.4},
    undistorted="inf",
    counted=("3.0", "1.5", "1.0", "0.7"),
    meaning="the Gaussian's standard deviation in pixels",
    allowed=(0, 1e4),
)
def high_pass(images: Pictures, level: float, seeds: list[int]) -> Pictures:
    """Grey less its blurred self, moved to a mean of PADDING. At infinity, grey."""
    grey = kernels.to_grey(images)
    if math.isinf(level):
        return kernels.to_pictures(grey)
    rest = grey - gaussian(grey, level)
    return kernels.to_pictures(rest + (PADDING - rest.mean(axis=(1, 2), keepdims=True)))


# ---- spectra ---------------------------------------------------------------------------------------------------------


@distortion(
    "phase-scrambling",
    levels={"0": 0, "30": 30, "60": 60, "90": 90, "120": 120, "150": 150, "180": 180},
    undistorted="0",
    counted=("30", "60", "90", "120"),
    meaning="the widest shift in degrees",
    allowed=(0, 180),
)
def phase_scrambling(images: Pictures, level: float, seeds: list[int]) -> Pictures:
    """Grey, the phase of every frequency shifted by U[-level, level).

    As in the published stimuli, the two frequencies of a conjugate pair do not get opposite shifts: those of the
    second half of the spectrum get the first half's shifts negated in the same order, not mirrored. The inverse
    transform is complex, its real part is kept, and power is lost (30 % at 90 degrees, before clipping). The zero
    frequency and, for even sides, the row and column of the highest have no partner and stay.
    """
    grey = kernels.to_grey(images)
    if level == 0:
        return kernels.to_pictures(grey)
    height, width = grey.shape[1:]
    inner = (height - 1 + height % 2, width - 1 + width % 2)
    half = inner[0] * inner[1] // 2
    for i, seed in enumerate(seeds):
        shifts = (np.random.RandomState(seed).random_sample(half) - 0.5) * 2 * level / 180 * np.pi
        # Taking the real part leaves each frequency the mean of its own factor and its partner's, conjugated.
        turned = np.exp(1j * shifts)
        factors = (turned + turned[::-1]) / 2
        spectrum = np.ones((height, width), complex)
        flat = np.concatenate([factors, [1], factors.conj()])
        spectrum[height - inner[0] :, width - inner[1] :] = flat.reshape(inner)
        spectrum = np.fft.ifftshift(spectrum)[:, : width // 2 + 1]
        grey[i] = np.fft.irfft2(np.fft.rfft2(grey[i]) * spectrum, s=(height, width))
    return kernels.to_pictures(grey)


@distortion(
    "power-equalisation",
    levels={"0": 0, "pow": 1},
    undistorted="0",
    meaning="the share of the mean amplitudes",
    allowed=(0, 1),
    tables=("amplitude",),
)
def power_equalisation(images: Pictures, level: float, seeds: list[int], amplitude: np.ndarray) -> Pictures:
    """Grey, its amplitudes replaced by `amplitude` (at level 1; in between, a mix), its phases kept."""
    grey = kernels.to_grey(images)
    if level == 0:
        return kernels.to_pictures(grey)
    if amplitude.shape != grey.shape[1:]:
        raise ValueError(f"amplitude must have the images' size {grey.shape[1:]} (got {amplitude.shape})")
    table = np.fft.ifftshift(amplitude)
    table = (table + np.roll(np.flip(table), 1, axis=(0, 1))) / 2  # of a pair's two, the real part has the mean
    table = table[:, : grey.shape[2] // 2 + 1]
    spectrum = np.fft.rfft2(grey)
    own = np.abs(spectrum)
    silent = own == 0
    own[silent] = 1
    spectrum[silent] = 1  # the phase of nothing is 0
    spectrum *= ((1 - level) * np.where(silent, 0, own) + level * table) / own
    return kernels.to_pictures(np.fft.irfft2(spectrum, s=grey.shape[1:]))


# ---- places ----------------------------------------------------------------------------------------------------------


@distortion(
    "rotation",
    levels={"0": 0, "90": 90, "180": 180, "270": 270},
    undistorted="0",
    meaning="the angle in degrees, counter-clockwise",
    allowed=(-360, 360),
)
def rotation(images: Pictures, level: float, seeds: list[int]) -> UInt8[np.ndarray, "n height width 3"]:
    """Grey, turned. Quarter turns move pixels (a side by another where the picture is no square); other angles are
    interpolated linearly and filled with PADDING."""
    grey = kernels.to_grey(images)
    if level % 90:
        from scipy.ndimage import rotate

        grey = rotate(grey, level, axes=(2, 1), reshape=False, order=1, mode="constant", cval=PADDING)
    else:
        grey = np.ascontiguousarray(np.rot90(grey, int(level // 90), axes=(1, 2)))
    return kernels.to_pictures(grey)


# ---- noise -----------------------------------------------------------------------------------------------------------


@distortion(
    "uniform-noise",
    levels={"0.0": 0, "0.03": 0.03, "0.05": 0.05, "0.1": 0.1, "0.2": 0.2, "0.35": 0.35, "0.6": 0.6, "0.9": 0.9},
    undistorted="0.0",
    counted=("0.03", "0.05", "0.1", "0.2", "0.35"),
    meaning="half the noise's width",
    allowed=(0, math.inf),
)
def uniform_noise(images: Pictures, level: float, seeds: list[int]) -> Pictures:
    """Grey at 30 % contrast, plus U[-level, level) per pixel, the same in all channels."""
    grey = kernels.scaled(kernels.to_grey(images), NOISE_CONTRAST, (1 - NOISE_CONTRAST) / 2)
    for i, seed in enumerate(seeds):
        kernels.add_noise(grey[i], np.random.RandomState(seed).random_sample(grey.shape[1:]), level)
    return kernels.to_pictures(grey)


# ---- eidolons --------------------------------------------------------------------------------------------------------


def _add_eidolon(name: str, coherence: float, counted: tuple[int, ...]) -> None:
    def partially_coherent_disarray(images: Pictures, level: float, seeds: list[int]) -> Pictures:
        pairs = zip(images, seeds, strict=True)
        return np.stack([disarray(image, level, coherence, seed) for image, seed in pairs])

    def label(reach: int) -> str:
        return f"{reach}-{10 * coherence:g}-{GRAIN:g}"

    distortion(
        name,
        levels={label(2**i): 2**i for i in range(8)},
        undistorted=label(1),
        counted=[label(reach) for reach in counted],
        meaning="the reach in pixels, of 256 on the longer side",
        allowed=(0, 1e4),
    )(partially_coherent_disarray)


_add_eidolon("eidolonI", coherence=1.0, counted=(2, 4, 8, 16, 32))
_add_eidolon("eidolonII", coherence=0.3, counted=(2, 4, 8, 16))
_add_eidolon("eidolonIII", coherence=0.0, counted=(2, 4, 8))
