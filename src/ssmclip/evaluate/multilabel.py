"""Zero-shot classification of pictures with several things on them: is a class's picture above those without it?

n images · c classes · d embedding dimensions
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_texts
from ssmclip.evaluate.judge import JUDGES, Judge, Right, coverage, names_of
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.metrics import average_precision, bootstrap_interval, mean_average_precision
from ssmclip.evaluate.zeroshot import class_embeddings
from ssmclip.models.names import Model
from ssmclip.rows import Result

MAP, ANY = "mean_average_precision", "top1"


@JUDGES.register("multilabel")
class MultiLabel(Judge):
    """A class's pictures are those most similar to its prompts; several classes may be right for a picture.

    Rows: the mean over classes of the average precision (scikit-learn's), and top1, for which the most similar class
    must be one of those on the picture. The guessing level is the mean share of a class's pictures. The first row's
    `extra` has each class's average precision; classes that are on no picture are left out.
    """

    kind = "multilabel"
    headline = ANY

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        return model.tokenizer is not None

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.names = [names_of(name)[0] for name in test_set.classnames]
        self.classes = class_embeddings(
            lambda texts: embed_texts(clip, texts, settings), test_set.classnames, test_set.templates
        )

    def check(self, metrics: Sequence[str]) -> None:
        asked = metrics or [self.test_set.card.metric]
        if unfit := [metric for metric in asked if metric not in (MAP, ANY)]:
            raise ValueError(
                f"{self.test_set.card.name}: the metric {unfit[0]} does not fit pictures with several classes: choose "
                f"{MAP} or {ANY}"
            )

    def scores(self, seen: ImageEmbeddings) -> Float[Tensor, "n c"]:
        """Return each image's similarity to the classes' prompts."""
        return seen.features @ self.classes.T

    def answers(self, seen: ImageEmbeddings) -> Bool[Tensor, "n c"]:
        """Return which classes are on each image."""
        on = torch.zeros(len(seen.index), len(self.names), dtype=torch.bool)
        for row, place in enumerate(seen.index.tolist()):
            on[row, list(self.test_set.answers[place])] = True
        return on

    def right(self, seen: ImageEmbeddings) -> Right:
        answers = self.answers(seen)
        best = self.scores(seen).argmax(dim=1, keepdim=True)
        return Right(answers.gather(1, best)[:, 0], answers.double().mean().item())

    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        self.check(metrics)
        scores, answers, n = self.scores(seen), self.answers(seen), len(seen.index)
        hits, share = self.right(seen)
        about = {"title": self.test_set.card.title, "kind": self.kind, "chance": share, **coverage(seen, self.test_set)}
        about |= {"prompts": getattr(self.test_set, "prompts", ""), "parameters": self.clip.parameters}
        each = {name: average_precision(scores[:, c], answers[:, c]).item() for c, name in enumerate(self.names)}
        about["average_precision"] = {name: value for name, value in each.items() if value == value}
        statistics = {
            MAP: lambda weights: mean_average_precision(scores, answers, weights),
            ANY: lambda weights: weights @ hits.double() / weights.sum(-1),
        }
        rows = []
        for metric in metrics or (MAP, ANY):
            value = statistics[metric](torch.ones(n, dtype=torch.float64)).item()
            low, high = bootstrap_interval(statistics[metric], n, seed=self.settings.seed)
            more = {"chance": share} if rows else about
            if metric == ANY:
                more = more | paired.marked(hits, [self.test_set.keys[i] for i in seen.index.tolist()])
            rows.append(Result(self.clip.label, task, metric, value, low, high, n, extra=more))
        return rows
