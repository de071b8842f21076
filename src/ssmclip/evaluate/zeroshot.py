"""Zero-shot classification: a class is the mean direction of its prompts, an image belongs to the nearest class.

n images · c classes · d embedding dimensions
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import normalize

from ssmclip.evaluate import pictures
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_images, embed_texts
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.metrics import METRICS, bootstrap_interval
from ssmclip.models.names import Model
from ssmclip.rows import Result

MAX_CONFUSION = 30  # classes; a larger matrix can't be read
SHOWN = 3  # best classes kept of an example
NAMED = 20  # unreadable images named in a row


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


def zero_shot(clip: Model, dataset: Any, card: Any, task: str, settings: Settings) -> list[Result]:
    """Rows of one classification task: the card's metric first, then top1, mean_per_class and (above 5 classes) top5;
    where the data set has groups, worst_group and average_group.

    The first row's `extra` has the classes' accuracies, the confusion matrix and examples; that of top1 which images
    were right, for paired tests.
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
        "prompts": getattr(dataset, "prompts", ""),
        "parameters": clip.parameters,
        "per_class": _per_class(scores, target, names),
        **_confusion(scores, target, names),
        **_examples(images, scores, names, dataset, settings),
    }
    rows = []
    for metric in metrics:
        function = METRICS[metric].function
        value = function(scores, target).item()
        low, high = bootstrap_interval(lambda w, f=function: f(scores, target, w), n, seed=settings.seed)
        more = {} if rows else extra
        if metric == "top1":
            more = more | paired.marked(_right(scores, target), [dataset.keys[i] for i in images.index.tolist()])
        rows.append(Result(clip.label, task, metric, value, low, high, n, extra=more))
    return rows + _group_rows(clip.label, task, _right(scores, target), images, dataset, settings)


def _right(scores: Tensor, target: Tensor) -> Tensor:
    return scores.argmax(dim=1) == target


def _group_rows(
    model: str, task: str, right: Tensor, images: ImageEmbeddings, dataset: Any, settings: Settings
) -> list[Result]:
    """Accuracy in the group where it is lowest, and the mean of the groups' (Sagawa et al. 2020, section 3)."""
    if not (groups := getattr(dataset, "groups", None)):
        return []
    names = [groups[i] for i in images.index.tolist()]
    known = sorted(set(names))
    member = torch.tensor([[name == group for group in known] for name in names]).double()
    hits = right.double()[:, None] * member

    def accuracies(weights: Tensor) -> Tensor:
        return (weights @ hits) / (weights @ member)

    whole = accuracies(torch.ones(1, len(hits), dtype=torch.float64))[0]
    groups_extra = [
        {"name": group, "accuracy": value, "n": int(count)}
        for group, value, count in zip(known, whole.tolist(), member.sum(0).tolist(), strict=True)
    ]
    rows = []
    # A group that a resample misses has no accuracy there: NaN, which the interval leaves out.
    for metric, over in (("worst_group", lambda a: a.amin(-1)), ("average_group", lambda a: a.mean(-1))):
        low, high = bootstrap_interval(lambda w, over=over: over(accuracies(w)), len(hits), seed=settings.seed)
        more = {"groups": groups_extra} if metric == "worst_group" else {}
        rows.append(Result(model, task, metric, over(whole).item(), low, high, len(hits), extra=more))
    return rows


def coverage(images: ImageEmbeddings, card: Any, dataset: Any) -> dict[str, Any]:
    """What part of the data set was measured, said only where it is not all of it."""
    extra: dict[str, Any] = {}
    whole = card.test_size or len(dataset)
    if len(images.index) != whole:
        extra["partial"] = {"used": len(images.index), "of": whole}
    if images.unreadable:
        extra["unreadable"] = len(images.unreadable)
        extra["unreadable_first"] = [f"{dataset.keys[i]}: {why}" for i, why in list(images.unreadable.items())[:NAMED]]
    if said := getattr(dataset, "said", ""):
        extra["said"] = said
    names = Counter(name for names in getattr(dataset, "classnames", ()) for name in _names(names))
    if same := [name for name, count in names.items() if count > 1]:
        extra["same_names"] = same
    return extra


def _names(names: str | Sequence[str]) -> list[str]:
    return [names] if isinstance(names, str) else list(names)


def _chance(metric: str, classes: int) -> float:
    return {"top5": 5 / classes, "roc_auc": 0.5}.get(metric, 1 / classes)


def _per_class(scores: Tensor, target: Tensor, names: list[str]) -> list[dict[str, Any]]:
    right = _right(scores, target)
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
