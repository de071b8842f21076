"""Distort pictures, in arrays or files; the list of distortions can be extended.

@distortion("darkness", levels={"half": 0.5, "most": 0.9}, meaning="the share of light removed", allowed=(0, 1))
def darkness(images, level, seeds):
    return (images * (1 - level)).astype("uint8")

distort(image, "darkness", 0.7)
"""

from ssmclip.data.distortions.apply import distort
from ssmclip.data.distortions.geirhos import GEIRHOS
from ssmclip.data.distortions.imagenet_c import IMAGENET_C
from ssmclip.data.distortions.registry import DISTORTIONS, UNDISTORTED, Distortion, distortion

__all__ = ["DISTORTIONS", "GEIRHOS", "IMAGENET_C", "UNDISTORTED", "Distortion", "distort", "distortion"]
