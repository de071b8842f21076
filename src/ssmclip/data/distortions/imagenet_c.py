"""The corruptions of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), through `imagecorruptions`.

bethgelab's package of that name has not been released since 2020 and fails with NumPy 2; `imagecorruptions-imaug` is
its maintained continuation under the same import name. It draws from NumPy's global generator, which is seeded for each
picture here and put back.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence

import numpy as np

from ssmclip.registry import UnknownName

PREFIX = "imagenet-c/"
SMALLEST = 32  # pixels of a side


def corrupt(images: np.ndarray, name: str, level: float | int | str | None, seeds: Sequence[int]) -> np.ndarray:
    """uint8 (N, H, W, 3) in and out. name: "imagenet-c/fog"; level: the severity, 1 to 5.

    Raises ImportError without the package, UnknownName, and ValueError for other severities and pictures too small.
    """
    try:
        import imagecorruptions
    except ImportError as error:
        raise ImportError(f"{name} needs imagecorruptions: pip install 'ssmclip[corruptions]' ({error})") from error
    known = imagecorruptions.corruption_dict
    if name.removeprefix(PREFIX) not in known:
        raise UnknownName("distortion", name, [PREFIX + other for other in known])
    if str(level) not in {*"12345", *(f"{severity}.0" for severity in "12345")}:
        raise ValueError(f"{name} at level {level!r}: it takes a severity, 1, 2, 3, 4 or 5")
    if min(images.shape[1:3]) < SMALLEST:
        raise ValueError(f"{name} takes pictures of {SMALLEST} x {SMALLEST} or more, not {images.shape[1:3]}")
    function = known[name.removeprefix(PREFIX)]
    own_seed = "seed" in inspect.signature(function).parameters
    before = np.random.get_state()
    try:
        out = []
        for image, seed in zip(images, seeds, strict=True):
            np.random.seed(seed)
            options = {"seed": seed} if own_seed else {}
            out.append(imagecorruptions.corrupt(image, int(float(level)), name.removeprefix(PREFIX), **options))
        return np.stack(out)
    finally:
        np.random.set_state(before)
