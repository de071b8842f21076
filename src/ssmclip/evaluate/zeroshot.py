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

from ssmclip.evaluate import pictures
from ssmclip.evaluate.embed import Clip, ImageEmbeddings, Settings, embed_images, embed_texts
from ssmclip.evaluate.metrics import METRICS, bootstrap_interval
from ssmclip.results import Result

MAX_CONFUSION = 30  # classes; a larger matrix can't be read
SHOWN = 3  # best classes kept of an example


def class_embeddings(
    encode: Callable[[list[str]], Tensor], classnames: Sequence[str | Sequence[str]], templates: Sequence[str]
) -> Float[Tensor, "c d"]:
    """Every template with every name of a class: normalise each, mean, normalise.

    encode: texts -> unit vectors (m, d). A class may have several names (synonyms). Raises ValueError for no classes,
    no templates, and templates without a {} for the name.
    """
    if not classnames or not templates:
        raise ValueError(f"zero-shot takes classes and templates; got {len(classnames)} and {len(templates)}")
    if without := [template for template in templates if "{}" not in template]:
        raise ValueError(f"templates without {{}}, where the class's name goes: {without}")
    prompts = [
        [template.replace("{}", name) for name in _names(names) for template in templates] for names in classnames
    ]
    features = encode([prompt for of_class in prompts for prompt in of_class])
    means = [part.mean(dim=0) for part in features.split([len(of_class) for of_class in prompts])]
    return normalize(torch.stack(means), dim=-1)


def zero_shot(clip: Clip, dataset: Any, card: Any, task: str, settings: Settings) -> list[Result]:
    """Rows of one classification task: the card's metric first, then top1, mean_per_class and (above 5 classes) top5.

    The first row's `extra` has the classes' accuracies, the confusion matrix and examples.
    """
    images = embed_images(clip, dataset, settings)
    classes = class_embeddings(lambda texts: embed_texts(clip, texts, settings), dataset.classnames, dataset.templates)
    scores, target = images.features @ classes.T, images.labels
    names = [_names(name)[0] for name in dataset.classnames]
    if not (0 <= target.min() and target.max() < len(names)):
        raise ValueError(f"{task}: labels {target.min()} to {target.max()} for {len(names)} classes")
    metrics = dict.fromkeys([card.metric, "top1", "mean_per_class", *(["top5"] if len(names) > 5 else [])])
    n = len(target)
    extra = {
        "title": card.title,
        "kind": "classification",
        "chance": _chance(card.metric, len(names)),
        **coverage(images, card, dataset),
        "per_class": _per_class(scores, target, names),
        **_confusion(scores, target, names),
        **_examples(images, scores, names, dataset, settings),
    }
    rows = []
    for metric in metrics:
        function = METRICS[metric].function
        value = function(scores, target).item()
        low, high = bootstrap_interval(lambda w, f=function: f(scores, target, w), n, seed=settings.seed)
        rows.append(Result(clip.name, task, "", metric, value, low, high, n, {} if rows else extra))
    return rows


def coverage(images: ImageEmbeddings, card: Any, dataset: Any) -> dict[str, Any]:
    """What part of the data set was measured, said only where it is not all of it."""
    extra: dict[str, Any] = {}
    whole = card.test_size or len(dataset)
    if len(images.index) < whole:
        extra["partial"] = {"used": len(images.index), "of": whole}
    if images.unreadable:
        extra["unreadable"] = len(images.unreadable)
    return extra


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _chance(metric: str, classes: int) -> float:
    return {"top5": 5 / classes, "roc_auc": 0.5}.get(metric, 1 / classes)


def _per_class(scores: Tensor, target: Tensor, names: list[str]) -> list[dict[str, Any]]:
    right = scores.argmax(dim=1) == target
    of_class = [right[target == i] for i in range(len(names))]
    return [
        {"name": name, "accuracy": hits.double().mean().item(), "n": len(hits)}
        for name, hits in zip(names, of_class, strict=True)
        if len(hits)
    ]


def _confusion(scores: Tensor, target: Tensor, names: list[str]) -> dict[str, Any]:
    if len(names) > MAX_CONFUSION:
        return {}
    cells = target * len(names) + scores.argmax(dim=1)
    counts = torch.bincount(cells, minlength=len(names) ** 2).reshape(len(names), -1)
    return {"confusion": {"names": names, "counts": counts.tolist()}}  # rows: the truth


def _examples(
    images: ImageEmbeddings, scores: Tensor, names: list[str], dataset: Any, settings: Settings
) -> dict[str, Any]:
    rows = pictures.draw(len(scores), settings.examples, settings.seed)
    if not rows:
        return {}
    places, labels = [str(place) for place in images.index.tolist()], images.labels.tolist()
    classes = sorted(pictures.draw(len(names), 2 * settings.examples, settings.seed))
    first = {label: labels.index(label) for label in classes if label in labels}  # one image of each class
    drawn = list(first.values())
    return {
        "thumbnails": pictures.thumbnails(dataset, [int(places[row]) for row in rows + drawn]),
        "image_to_text": [
            {
                "image": places[row],
                "truth": [names[labels[row]]],
                "found": pictures.found(scores[row], names, {labels[row]}, SHOWN),
            }
            for row in rows
        ],
        "similarity": {
            "images": [places[row] for row in drawn],
            "texts": [names[label] for label in first],
            "scores": pictures.matrix(scores[drawn][:, list(first)]),
        },
    }
