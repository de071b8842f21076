"""A classifier judged by its own logits.

n images · c classes
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ssmclip.evaluate.classification import ByScores
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_images
from ssmclip.evaluate.judge import JUDGES
from ssmclip.evaluate.outputs import match
from ssmclip.models.names import Model

NAME = "classifier"


def logits(model: Model, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k"]:
    """Return a classifier's logits of preprocessed images, float32, on the CPU."""
    return model.network(images.to(model.device, model.dtype)).float().cpu()


@JUDGES.register(NAME)
class Classifier(ByScores):
    """A classifier, judged by the logits of the test set's classes: of all its outputs, or of some (ImageNet-A, -R).

    Rows: see `ByScores`, then negative log-likelihood and expected calibration error of the softmax over these classes.
    The first row's `extra` also has the size of the pictures, the images per second that the network took, and what is
    not certain about the classes. Raises ValueError for classes that do not match (see `match`).
    """

    more_metrics = ("nll", "ece")

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        return model.classifies and not getattr(test_set.card, "inliers", "")

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.outputs = match(clip.classes, clip.outputs, test_set, clip.label)

    def see(self, pictures: Any) -> ImageEmbeddings:
        return embed_images(self.clip, pictures, self.settings, logits)

    def scores(self, seen: ImageEmbeddings) -> Float[Tensor, "n c"]:
        return seen.features[:, self.outputs.places]

    def shown(self, scores: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return scores.softmax(dim=1)

    def _extra(self, seen: ImageEmbeddings, scores: Tensor, target: Tensor, metric: str) -> dict[str, Any]:
        extra = super()._extra(seen, scores, target, metric)
        # Two classes of one name are two outputs, and there is no text that an image could be similar to.
        return {key: value for key, value in extra.items() if key not in ("same_names", "similarity")}

    def about(self, seen: ImageEmbeddings) -> dict[str, Any]:
        places, note = self.outputs
        said = "; ".join(filter(None, (getattr(self.test_set, "said", ""), note)))
        outputs = {"outputs": {"used": len(places), "of": self.clip.outputs}}
        return measured(self.clip, seen) | outputs | ({"said": said} if said else {})


def measured(model: Model, seen: ImageEmbeddings) -> dict[str, Any]:
    """Return what rows keep of a classifier: its judge, size of pictures, parameters and images per second."""
    known = {"judge": NAME, "image_size": list(image_size(model)), "parameters": model.parameters}
    return known | ({"images_per_s": seen.images_per_s} if seen.images_per_s else {})


def image_size(model: Model) -> tuple[int, int]:
    """Return the (height, width) that a model's preprocessing gives pictures, in pixels."""
    height, width = model.preprocess(Image.new("RGB", (64, 64))).shape[-2:]
    return height, width
