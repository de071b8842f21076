"""Any distortion of the list, applied to arrays of pictures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ssmclip.data.distortions.registry import DISTORTIONS, Number, Table, load_table, parse_level


def distort(
    images: np.ndarray,
    name: str,
    level: Number | str | None = None,
    *,
    seed: int | Sequence[int] = 0,
    amplitude: Table = None,
    gamma: Table = None,
) -> np.ndarray:
    """The picture or pictures, distorted.

    images: uint8, RGB, (H, W, 3) or (N, H, W, 3).
    name: one of DISTORTIONS, or "imagenet-c/NAME" for a corruption of ImageNet-C (needs the extra `corruptions`).
    level: a number, or a label of the human data ("c30", "8-3-10", "pow"); may be left out where only one distorts.
    seed: of a picture; picture i of a batch has seed + i, so that a batch equals its pictures one by one.
    amplitude: for power-equalisation, the mean of abs(fftshift(fft2(grey))) over images, float (H, W), .npy or array.
    gamma: for false-colour, the light a screen emits for each of 256 values, in [0, 1] and rising, .npy or array.

    Raises UnknownName for a name nobody registered, ValueError for pictures, levels and tables that don't fit.
    """
    batch, single = _as_batch(images)
    seeds = _seeds(seed, len(batch))
    if name.startswith("imagenet-c/"):
        from ssmclip.data.distortions.imagenet_c import corrupt

        out = corrupt(batch, name, level, seeds)
    else:
        chosen = DISTORTIONS[name]
        given = {"amplitude": amplitude, "gamma": gamma}
        tables = {key: load_table(key, given[key], name) for key in chosen.tables}
        out = chosen.function(batch, parse_level(name, level), seeds, **tables)
    return out[0] if single else out


def _as_batch(images: np.ndarray) -> tuple[np.ndarray, bool]:
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim not in (3, 4) or images.shape[-1] != 3 or not images.size:
        raise ValueError(
            f"pictures are uint8 (height, width, 3) or (n, height, width, 3), and this is {images.dtype} {images.shape}"
        )
    return (images[None] if images.ndim == 3 else images), images.ndim == 3


def _seeds(seed: int | Sequence[int], count: int) -> list[int]:
    seeds = [int(seed) + i for i in range(count)] if np.ndim(seed) == 0 else [int(s) for s in seed]
    if len(seeds) != count or not all(0 <= s < 2**32 for s in seeds):
        raise ValueError(f"{count} pictures take {count} seeds in 0 ... 2**32 - 1, or one, and got {seed!r}")
    return seeds
