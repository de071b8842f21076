"""Pictures to labels, with probabilities: zero-shot with a CLIP, or the classes of an image encoder's head.

n pictures · c labels
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from ssmclip.data.images import BadImage
from ssmclip.data.sources import Picture, Pictures, named_pictures, read_picture
from ssmclip.evaluate.embeddings.embed import Settings, embed_texts, encode_batch, inference, require_finite
from ssmclip.evaluate.zeroshot import class_embeddings
from ssmclip.models.names import Model, find
from ssmclip.models.towers import is_clip, logit_scale

__all__ = ["Guess", "Prediction", "classify"]

log = logging.getLogger(__name__)

AS_IT_IS = ("{}",)
MANY = 1000  # prompts that take long enough to say so


@dataclass(frozen=True)
class Guess:
    """A label, its probability among all labels, and what that is the softmax of: a cosine similarity, or a logit."""

    label: str
    probability: float
    score: float


@dataclass(frozen=True)
class Prediction:
    """A model's most probable labels of a picture, best first; or why the picture is unreadable."""

    model: str
    picture: str
    guesses: tuple[Guess, ...] = ()
    unreadable: str = ""


def classify(
    model: Model | str | Path,
    pictures: Pictures,
    labels: Sequence[str] | None = None,
    templates: Sequence[str] = AS_IT_IS,
    k: int = 5,
    *,
    batch_size: int = 32,
    max_labels: int | None = None,
) -> Iterator[Prediction]:
    """Yield a prediction for every picture, in their order; one that cannot be read is a prediction that says why.

    model: what `ssmclip.find` takes, or what it returned; pictures: paths, addresses, encoded bytes or PIL images, or a
    mapping from names to such; labels: what to choose from, None for the classes of an image encoder's head; templates:
    texts with {} for the label, whose embeddings are averaged; k: labels kept; max_labels: more are refused.

    The probability is the softmax of a CLIP's cosine similarities times its scale, or of a head's logits.
    Everything but the pictures is checked at once. Raises ValueError for no or repeated labels, too many of them,
    labels for a model that reads no text, none for one that does, and for embeddings that are not finite.
    """
    if k < 1 or batch_size < 1:
        raise ValueError(f"k and batch_size must be at least 1 (got {k} and {batch_size})")
    model = model if isinstance(model, Model) else find(model)
    scorer = _zero_shot(model, labels, templates, max_labels) if is_clip(model.network) else _head(model, labels)
    return _predictions(model, scorer, named_pictures(pictures), k, batch_size)


@dataclass(frozen=True)
class _Scorer:
    """labels: what is chosen from; scores: preprocessed images -> (n, c); scale: what scores are multiplied by."""

    labels: tuple[str, ...]
    scores: Callable[[Float[Tensor, "n 3 h w"]], Float[Tensor, "n c"]]
    scale: float = 1.0


def _zero_shot(model: Model, labels: Sequence[str] | None, templates: Sequence[str], max_labels: int | None) -> _Scorer:
    if labels is None:
        raise ValueError(f"{model.label} is a CLIP, which knows no classes of its own: give the labels to choose from")
    labels = _checked(labels, max_labels)
    if (prompts := len(labels) * len(templates)) > MANY:
        log.info(
            "embedding %s prompts (%s labels, %s templates) before the first picture",
            *(f"{n:,}" for n in (prompts, len(labels), len(templates))),
        )
    classes = class_embeddings(lambda texts: embed_texts(model, texts, Settings()), labels, templates)
    return _Scorer(tuple(labels), lambda images: encode_batch(model, images) @ classes.T, logit_scale(model.network))


def _checked(labels: Sequence[str], max_labels: int | None) -> list[str]:
    labels = [label.strip() for label in labels]
    if not any(labels):
        raise ValueError("no labels given: name at least one to choose from")
    if not all(labels):
        raise ValueError(f"label {labels.index('') + 1} of {len(labels)} is empty: remove it")
    if repeated := [label for label, count in Counter(labels).items() if count > 1]:
        shown = ", ".join(map(repr, repeated[:5])) + (" ..." if len(repeated) > 5 else "")
        raise ValueError(f"every label must be given once (given more than once: {shown})")
    if max_labels is not None and len(labels) > max_labels:
        raise ValueError(f"there must be at most {max_labels:,} labels (got {len(labels):,}): choose fewer")
    return labels


def _head(model: Model, labels: Sequence[str] | None) -> _Scorer:
    if labels is not None:
        raise ValueError(f"{model.label} reads no text and knows its own classes: leave the labels out, or take a CLIP")
    if not model.classifies:
        raise ValueError(f"{model.label} is an image encoder without a head, which has no classes: take a CLIP")
    names = model.class_names or tuple(f"class {i}" for i in range(model.outputs))
    return _Scorer(names, lambda images: model.network(images.to(model.device, model.dtype)).float().cpu())


def _predictions(
    model: Model, scorer: _Scorer, pictures: Iterator[tuple[str, Picture]], k: int, batch_size: int
) -> Iterator[Prediction]:
    while batch := list(islice(pictures, batch_size)):
        read = {place: _prepared(model, picture) for place, (_, picture) in enumerate(batch)}
        images = {place: image for place, image in read.items() if isinstance(image, Tensor)}
        guesses: dict[int, tuple[Guess, ...]] = {}
        if images:
            with inference(model.network):
                scores = scorer.scores(torch.stack(list(images.values())))
            require_finite(scores, "picture", [batch[place][0] for place in images])
            guesses = dict(zip(images, _best(scorer, scores, k), strict=True))
        for place, (name, _) in enumerate(batch):
            reason = "" if place in guesses else str(read[place])
            yield Prediction(model.label, name, guesses.get(place, ()), reason)


def _prepared(model: Model, picture: Picture) -> Tensor | BadImage:
    try:
        return model.preprocess(read_picture(picture))
    except BadImage as error:
        return error


def _best(scorer: _Scorer, scores: Float[Tensor, "n c"], k: int) -> list[tuple[Guess, ...]]:
    probabilities = (scorer.scale * scores.double()).softmax(dim=-1)
    best = probabilities.topk(min(k, len(scorer.labels)), dim=-1)
    return [
        tuple(
            Guess(scorer.labels[place], probability, score)
            for place, probability, score in zip(places, kept, line[places].tolist(), strict=True)
        )
        for places, kept, line in zip(best.indices.tolist(), best.values.tolist(), scores, strict=True)
    ]
