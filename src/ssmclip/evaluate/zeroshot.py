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
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_texts
from ssmclip.evaluate.judge import JUDGES, Judge, Right, coverage, names_of
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.metrics import METRICS, bootstrap_interval
from ssmclip.models.names import Model
from ssmclip.rows import Result
from ssmclip.rows.payloads import ClassAccuracy, Confusion, GroupAccuracy, ImageExample, Similarity

MAX_CONFUSION = 30  # classes; a larger matrix can't be read
SHOWN = 3  # best classes kept of an example


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
class ZeroShot(Judge):
    """Zero-shot classification by the nearest class prompts (Radford et al. 2021, section 3.1).

    Rows: the card's metric first, then top1, mean_per_class and (above 5 classes) top5; where the test set has groups,
    worst_group and average_group. The first row's `extra` has the classes' accuracies, the confusion matrix and
    examples; that of top1 which images were right, for paired tests.
    Raises ValueError for a test set without class names or prompts, and for labels without a class.
    """

    kind = "classification"
    headline = "top1"

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.names = [names_of(name)[0] for name in test_set.classnames]
        self.classes = class_embeddings(
            lambda texts: embed_texts(clip, texts, settings), test_set.classnames, test_set.templates
        )

    def right(self, seen: ImageEmbeddings) -> Right:
        return Right(_right(seen.features @ self.classes.T, seen.labels), 1 / len(self.classes))

    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        card, settings, names = self.test_set.card, self.settings, self.names
        scores, target = seen.features @ self.classes.T, seen.labels
        if not (0 <= target.min() and target.max() < len(names)):
            raise ValueError(
                f"{task}: labels range from {target.min()} to {target.max()}, but there are {len(names)} classes"
            )
        usual = (card.metric, "top1", "mean_per_class", *(["top5"] if len(names) > 5 else []))
        metrics = tuple(dict.fromkeys(metrics or usual))
        n = len(target)
        extra = {
            "title": card.title,
            "kind": self.kind,
            "chance": METRICS[metrics[0]].chance(len(names)),
            **coverage(seen, self.test_set),
            "prompts": getattr(self.test_set, "prompts", ""),
            "parameters": self.clip.parameters,
            "per_class": _per_class(scores, target, names),
            **_confusion(scores, target, names),
            **_examples(seen, scores, names, self.test_set, settings),
        }
        rows = []
        for metric in metrics:
            function = METRICS[metric].function
            value = function(scores, target).item()
            low, high = bootstrap_interval(lambda w, f=function: f(scores, target, w), n, seed=settings.seed)
            more = {} if rows else extra
            if metric == "top1":
                more = more | paired.marked(
                    _right(scores, target), [self.test_set.keys[i] for i in seen.index.tolist()]
                )
            rows.append(Result(self.clip.label, task, metric, value, low, high, n, extra=more))
        return rows + _group_rows(self.clip.label, task, _right(scores, target), seen, self.test_set, settings)


def _right(scores: Tensor, target: Tensor) -> Tensor:
    return scores.argmax(dim=1) == target


def _group_rows(
    model: str, task: str, right: Tensor, images: ImageEmbeddings, dataset: Any, settings: Settings
) -> list[Result]:
    """Return the worst-group accuracy and the mean over groups (Sagawa et al. 2020, section 3)."""
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
        GroupAccuracy(name=group, accuracy=value, n=int(count))
        for group, value, count in zip(known, whole.tolist(), member.sum(0).tolist(), strict=True)
    ]
    rows = []
    # A group that a resample misses has no accuracy there: NaN, which the interval leaves out.
    for metric, over in (("worst_group", lambda a: a.amin(-1)), ("average_group", lambda a: a.mean(-1))):
        low, high = bootstrap_interval(lambda w, over=over: over(accuracies(w)), len(hits), seed=settings.seed)
        more = {"groups": groups_extra} if metric == "worst_group" else {}
        rows.append(Result(model, task, metric, over(whole).item(), low, high, len(hits), extra=more))
    return rows


def _per_class(scores: Tensor, target: Tensor, names: list[str]) -> list[ClassAccuracy]:
    right = _right(scores, target)
    of_class = [right[target == i] for i in range(len(names))]
    return [
        ClassAccuracy(name=name, accuracy=hits.double().mean().item(), n=len(hits))
        for name, hits in zip(names, of_class, strict=True)
        if len(hits)
    ]


def _confusion(scores: Tensor, target: Tensor, names: list[str]) -> dict[str, Confusion]:
    if len(names) > MAX_CONFUSION:
        return {}
    cells = target * len(names) + scores.argmax(dim=1)
    counts = torch.bincount(cells, minlength=len(names) ** 2).reshape(len(names), -1)
    return {"confusion": Confusion(names=names, counts=counts.tolist())}


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
            ImageExample(
                image=places[row],
                truth=[names[labels[row]]],
                found=pictures.found(scores[row], names, {labels[row]}, SHOWN),
            )
            for row in rows
        ],
        "similarity": Similarity(
            images=[places[row] for row in drawn],
            texts=[names[label] for label in first],
            scores=pictures.matrix(scores[drawn][:, list(first)]),
        ),
    }
