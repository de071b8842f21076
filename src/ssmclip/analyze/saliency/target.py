"""What a model is asked about: a text, for a CLIP, or a class, for an image classifier."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import normalize

from ssmclip.models.names import Model
from ssmclip.models.towers import encode_image, is_clip, logit_scale
from ssmclip.registry import UnknownName

__all__ = ["Target", "target_of"]


@dataclass(frozen=True)
class Target:
    """text: its name; texts: unit vectors of it and of what it competes with, None for a classifier, whose class stands
    at `place`.

    `score` is the cosine similarity, or the logit; `probability` the softmax over the texts, or over all classes: of a
    text without competitors, which is the only choice, it is the score again.
    """

    text: str
    network: nn.Module
    texts: Float[Tensor, "t d"] | None = None
    place: int = 0

    @property
    def has_probability(self) -> bool:
        return self.texts is None or len(self.texts) > 1

    @property
    def unit(self) -> str:
        """Return what the curves of `curves` are of."""
        return "probability" if self.has_probability else "cosine similarity"

    def of(self, outputs: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Return the score of a tower's outputs: embeddings, or logits."""
        return self._scores(outputs)[:, self.place]

    def score(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        return self.of(encode_image(self.network, images))

    def probability(self, images: Float[Tensor, "n 3 h w"]) -> Float[Tensor, " n"]:
        scores = self._scores(encode_image(self.network, images))
        if not self.has_probability:
            return scores[:, self.place]
        scale = 1.0 if self.texts is None else logit_scale(self.network)
        return (scale * scores).softmax(dim=-1)[:, self.place]

    def _scores(self, outputs: Tensor) -> Tensor:
        return outputs if self.texts is None else normalize(outputs, dim=-1) @ self.texts.T


def target_of(model: Model, text: str | None, against: Sequence[str] = (), pixels: Tensor | None = None) -> Target:
    """Return the target for a text, or for the class of this name or number.

    against: other texts, among which a CLIP chooses; pixels: a picture (1, 3, h, w), whose most probable class is
    meant where a classifier is asked about nothing. Raises ValueError for an empty text or none, UnknownName for a
    class.
    """
    if is_clip(model.network):
        return _of_text(model, text, against)
    if text is None and pixels is not None:
        with torch.no_grad():
            place = int(model.network(pixels).argmax())
    elif text is None:
        raise ValueError(f"{model.label} needs a class to look for: give its name or number")
    else:
        place = _class_of(model, text)
    names = model.class_names
    return Target(names[place] if names else f"class {place}", model.network, place=place)


def _of_text(model: Model, text: str | None, against: Sequence[str]) -> Target:
    texts = [text or "", *against]
    if not all(one.strip() for one in texts):
        raise ValueError(f"{model.label} needs a text to look for, and no empty ones (got {texts})")
    if len(set(texts)) < len(texts):
        raise ValueError(f"the texts must differ (got {texts})")
    with torch.no_grad():
        features = model.network.encode_text(model.tokenizer(texts).to(model.device))
    return Target(texts[0], model.network, normalize(features, dim=-1))


def _class_of(model: Model, text: str) -> int:
    """The class with this name, one of its synonyms, or this number."""
    if text.isdigit() and int(text) < model.outputs:
        return int(text)
    wanted = text.strip().lower()
    names = [[name.lower(), *(part.strip().lower() for part in name.split(","))] for name in model.class_names]
    # Where a synonym of one class is the name of another, that name is meant.
    for same in (lambda parts: wanted == parts[0], lambda parts: wanted in parts):
        if places := [place for place, parts in enumerate(names) if same(parts)]:
            return places[0]
    raise UnknownName(f"class of {model.label}", text, model.class_names or [f"0 to {model.outputs - 1}"])
