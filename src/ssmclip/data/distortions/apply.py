"""Apply any registered distortion to arrays of pictures."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from ssmclip.data.distortions.pictures import SIDE
from ssmclip.data.distortions.registry import DISTORTIONS, Number, Table, parse_level, prepare


def distort(
    images: np.ndarray,
    name: str,
    level: Number | str | None = None,
    *,
    seed: int | Sequence[int] = 0,
    amplitude: Table = None,
    gamma: Table = None,
) -> np.ndarray:
    """Return the picture or pictures, distorted.

    images: uint8, RGB, (H, W, 3) or (N, H, W, 3).
    name: one of DISTORTIONS: the 12 of Geirhos et al., "imagenet-c/fog" and the other corruptions of ImageNet-C (which
        need the extra `corruptions`), and those that were added with the decorator `distortion`.
    level: a number, or the label of a level ("c30", "8-3-10", "pow"); may be left out where only one level distorts.
    seed: of a picture; picture i of a batch has seed + i, so that a batch equals its pictures one by one.
    amplitude: for power-equalisation, the mean of abs(fftshift(fft2(grey))) over images, float (H, W), .npy or array.
    gamma: for false-colour, the light a screen emits for each of 256 values, in [0, 1] and rising, .npy or array.

    Raises UnknownName for a name nobody registered, ValueError for pictures, levels and tables that don't fit,
    ImportError for a distortion whose package is missing.
    """
    batch, single = _as_batch(images)
    seeds = _seeds(seed, len(batch))
    tables = prepare(name, {"amplitude": amplitude, "gamma": gamma})
    number = parse_level(name, level)
    out = batch.copy() if number is None else DISTORTIONS[name].function(batch, number, seeds, **tables)
    if not (out.dtype == np.uint8 and out.ndim == 4 and len(out) == len(batch) and out.shape[-1] == 3):
        raise ValueError(
            f"{name} must return uint8 pictures ({len(batch)}, height, width, 3) (got {out.dtype} {out.shape})"
        )
    return out[0] if single else out


def fingerprint(name: str, level: Number | str, tables: Mapping[str, Table]) -> str:
    """Return a hash of the distortion's output for a fixed noise picture; it changes when the code changes."""
    probe = np.random.RandomState(0).randint(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    return hashlib.blake2b(distort(probe, name, level, **tables).tobytes(), digest_size=16).hexdigest()


def _as_batch(images: np.ndarray) -> tuple[np.ndarray, bool]:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3 or not images.size:
        raise ValueError(
            f"pictures must be uint8 (height, width, 3) or (n, height, width, 3) (got {images.dtype} {images.shape})"
        )
    return (images[None] if images.ndim == 3 else images), images.ndim == 3


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [int(seed) + i for i in range(count)] if np.ndim(seed) == 0 else [int(s) for s in seed]
    if len(seeds) != count or not all(0 <= s < 2**32 for s in seeds):
        raise ValueError(f"{count} pictures need {count} seeds in 0 ... 2**32 - 1, or one (got {seed!r})")
    return seeds
