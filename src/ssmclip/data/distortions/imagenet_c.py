"""The corruptions of ImageNet-C (Hendrycks and Dietterich 2019, arXiv:1903.12261), through `imagecorruptions`.

bethgelab's package of that name has not been released since 2020 and fails with NumPy 2; `imagecorruptions-imaug` is
its maintained continuation under the same import name. It takes seconds to import and is imported when a corruption is
first used. It draws from NumPy's global generator, which is seeded for each picture here and put back.
"""

from __future__ import annotations

import inspect
from types import ModuleType

import numpy as np

from ssmclip.data.distortions.registry import Pictures, distortion

SMALLEST = 32  # pixels of a side
SEVERITIES = (1, 2, 3, 4, 5)
CORRUPTIONS = (  # the 15 of the benchmark, then the 4 held out for validation
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog brightness "
    "contrast elastic_transform pixelate jpeg_compression "
    "speckle_noise gaussian_blur spatter saturate"
).split()
IMAGENET_C = tuple(f"imagenet-c/{corruption}" for corruption in CORRUPTIONS)


def imported() -> ModuleType:
    """Return the package. Raises ImportError when it is missing, with what to install."""
    try:
        import imagecorruptions
    except ImportError as error:
        raise ImportError(
            f"the corruptions of ImageNet-C need imagecorruptions: pip install 'ssmclip[corruptions]' ({error})"
        ) from error
    return imagecorruptions


def _add(corruption: str, name: str) -> None:
    def corrupt(images: Pictures, level: float, seeds: list[int]) -> Pictures:
        if min(images.shape[1:3]) < SMALLEST:
            raise ValueError(f"{name} needs pictures of at least {SMALLEST} x {SMALLEST} (got {images.shape[1:3]})")
        package = imported()
        takes_seed = "seed" in inspect.signature(package.corruption_dict[corruption]).parameters
        before = np.random.get_state()
        try:
            out = []
            for image, seed in zip(images, seeds, strict=True):
                np.random.seed(seed)
                options = {"seed": seed} if takes_seed else {}
                out.append(package.corrupt(image, int(level), corruption, **options))
            return np.stack(out)
        finally:
            np.random.set_state(before)

    levels = {str(severity): severity for severity in SEVERITIES}
    distortion(name, levels=levels, meaning="a severity", check=imported)(corrupt)


for _corruption, _name in zip(CORRUPTIONS, IMAGENET_C, strict=True):
    _add(_corruption, _name)
