"""Zero-shot classification: a class is the mean direction of its prompts, an image belongs to the nearest class.

n images · c classes · d embedding dimensions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ssmclip.evaluate.classification import ByScores
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_texts
from ssmclip.evaluate.judge import JUDGES, names_of
from ssmclip.models.names import Model
from ssmclip.models.towers import logit_scale


def class_embeddings(
    encode: Callable[[list[str]], Tensor], classnames: Sequence[str | Sequence[str]], templates: Sequence[str]
) -> Float[Tensor, "c d"]:
    """Return class embeddings: embed every template with every class name, normalise, average, normalise.

    encode: texts -> unit vectors (m, d). A class may have several names (synonyms). Raises ValueError for no classes,
    no templates, and templates without a {} for the name.
    """
    if not classnames or not templates:
        raise ValueError(
            f"zero-shot needs at least one class and one template (got {len(classnames)} and {len(templates)})"
        )
    if without := [template for template in templates if "{}" not in template]:
        raise ValueError(f"every template needs {{}} for the class name (got {without})")
    prompts = [
        [template.replace("{}", name) for name in names_of(names) for template in templates] for names in classnames
    ]
    features = encode([prompt for of_class in prompts for prompt in of_class])
    means = [part.mean(dim=0) for part in features.split([len(of_class) for of_class in prompts])]
    return normalize(torch.stack(means), dim=-1)


@JUDGES.register("zero-shot")
class ZeroShot(ByScores):
    """Zero-shot classification by the nearest class prompts (Radford et al. 2021, section 3.1). Rows: see `ByScores`.

    Raises ValueError for a test set without class names or prompts, and for labels without a class.
    """

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        return model.tokenizer is not None

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.classes = class_embeddings(
            lambda texts: embed_texts(clip, texts, settings), test_set.classnames, test_set.templates
        )

    def scores(self, seen: ImageEmbeddings) -> Float[Tensor, "n c"]:
        return seen.features @ self.classes.T

    def logits(self, scores: Float[Tensor, "n c"]) -> Float[Tensor, "n c"]:
        return logit_scale(self.clip.network) * scores

    def about(self, seen: ImageEmbeddings) -> dict[str, Any]:
        return {"prompts": getattr(self.test_set, "prompts", ""), "parameters": self.clip.parameters}
