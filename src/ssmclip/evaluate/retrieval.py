"""Retrieval, both ways, with several captions per image: an image has found its text when any of its captions is
among the first k; a caption has found its image when that one image is.

n images · m captions · d embedding dimensions
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property, partial
from math import comb
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ssmclip.evaluate import pictures
from ssmclip.evaluate.captions import cut_at, longer_than, spelled_out
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_texts, subset
from ssmclip.evaluate.judge import JUDGES, Judge, Right, coverage
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.geometry import geometry
from ssmclip.evaluate.statistics.metrics import bootstrap_interval, first_relevant_ranks, recall_at_k
from ssmclip.models.names import Model
from ssmclip.rows import Result
from ssmclip.rows.condition import TOKENS, Where
from ssmclip.rows.payloads import ImageExample, Similarity, TextExample

KS = (1, 5, 10)
RECALL_AT = 10  # of the one recall that distortions are measured by
SHOWN = 5  # best matches kept of an example


@JUDGES.register("retrieval")
class Retrieval(Judge):
    """A picture and its captions find each other among all of the test set.

    Rows: recall at 1, 5 and 10 from image to text and back, the mean of the six, and the geometry of the two sets of
    points. Captions that the text tower sees more than `settings.truncate` tokens of are evaluated cut there as well,
    under the key TOKENS. Intervals resample images, each with all its captions. The first row's `extra` has examples
    and a similarity matrix, and counts captions that the tokenizer can only spell out, where there are any.
    Raises ValueError naming images that have no caption.
    """

    kind = "retrieval"
    headline = "image_to_text_recall@10"

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        return model.tokenizer is not None

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        if bare := [test_set.keys[i] for i in range(len(test_set)) if not test_set.captions[i]]:
            raise ValueError(f"{test_set.card.name}: {len(bare)} images have no caption; the first: {bare[:5]}")
        places = subset(len(test_set), settings)
        self.flat = [caption for place in places for caption in test_set.captions[place]]
        self.owner = torch.tensor([place for place in places for _ in test_set.captions[place]])
        # How captions are seen: whole, and cut where the text tower sees more of them than usual.
        self.seen: list[tuple[Where, Model]] = [({}, clip)]
        if settings.truncate and longer_than(clip.tokenizer, self.flat, settings.truncate):
            cut = cut_at(clip.tokenizer, settings.truncate)
            self.seen.append(({TOKENS: settings.truncate}, replace(clip, tokenizer=cut)))

    @cached_property
    def texts(self) -> list[Float[Tensor, "m d"]]:
        """Return the embedded captions, for each truncation."""
        return [embed_texts(clip, self.flat, self.settings) for _, clip in self.seen]

    def right(self, seen: ImageEmbeddings) -> Right:
        mine = torch.isin(self.owner, seen.index)
        hits = first_relevant_ranks(seen.features, self.texts[0][mine], seen.index, self.owner[mine]) < RECALL_AT
        counts = [len(self.test_set.captions[place]) for place in seen.index.tolist()]
        return Right(hits, guessing(counts).get(self.headline))

    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        mine = torch.isin(self.owner, seen.index)
        flat = [caption for caption, kept in zip(self.flat, mine.tolist(), strict=True) if kept]
        place_of = {place: number for number, place in enumerate(seen.index.tolist())}
        owner = torch.tensor([place_of[place] for place in self.owner[mine].tolist()])
        keys = [self.test_set.keys[place] for place in seen.index.tolist()]
        rows = []
        for (where, _), texts in zip(self.seen, self.texts, strict=True):
            texts = texts[mine]
            about = {"title": self.test_set.card.title, "kind": self.kind, **coverage(seen, self.test_set)}
            if not rows:
                about |= _examples(self.test_set, seen, texts, flat, owner, self.settings)
                foreign = spelled_out(self.clip.tokenizer, flat)
                about |= {"spelled_out": foreign} if foreign else {}
            made = recall_rows(seen.features, texts, owner, keys, self.settings.seed)
            made += [Result("", "", metric, value) for metric, value in geometry(seen.features, texts, owner)]
            made = [row for row in made if not metrics or row.metric in metrics]
            made[0] = replace(made[0], extra=about | made[0].extra)
            rows += [replace(row, model=self.clip.label, task=task, where=where) for row in made]
        return rows


def recall_rows(
    images: Float[Tensor, "n d"], texts: Float[Tensor, "m d"], owner: Int[Tensor, " m"], keys: Sequence[str], seed: int
) -> list[Result]:
    """Return recalls of unit vectors, as rows without model and task. owner: the image each text belongs to."""
    counts = torch.bincount(owner, minlength=len(images)).tolist()
    everyone = torch.arange(len(images))
    to_text = first_relevant_ranks(images, texts, everyone, owner)
    to_image = first_relevant_ranks(texts, images, owner, everyone)
    recalls = {
        f"{way}_recall@{k}": (partial(recall_at_k, ranks, k, image), len(ranks))
        for way, ranks, image in (("image_to_text", to_text, None), ("text_to_image", to_image, owner))
        for k in KS
    }
    recalls["mean_recall"] = (partial(_mean_recall, [recall for recall, _ in recalls.values()]), len(images))
    chances = guessing(counts)
    rows = []
    for metric, (recall, n) in recalls.items():
        low, high = bootstrap_interval(lambda w, r=recall: r(weights=w), len(images), seed=seed)
        more: dict[str, Any] = {"chance": chances[metric]} if metric in chances else {}
        if metric.startswith("image_to_text"):
            more |= paired.marked(to_text < int(metric.rpartition("@")[2]), keys)
        rows.append(Result("", "", metric, recall().item(), low, high, n, extra=more))
    return rows


def _mean_recall(recalls: list[Callable[..., Tensor]], weights: Tensor | None = None) -> Tensor:
    return torch.stack([recall(weights=weights) for recall in recalls]).mean(dim=0)


def guessing(captions_per_image: list[int]) -> dict[str, float]:
    """Return the chance level: k of all m captions, c of them right, and k of all n images, one of them right."""
    n, m = len(captions_per_image), sum(captions_per_image)
    to_text = {k: sum(1 - comb(m - c, k) / comb(m, k) for c in captions_per_image) / n for k in KS if k <= m}
    to_image = {k: k / n for k in KS if k <= n}
    ways = (("image_to_text", to_text), ("text_to_image", to_image))
    return {f"{way}_recall@{k}": chance for way, chances in ways for k, chance in chances.items()}


def _examples(
    dataset: Any, images: ImageEmbeddings, texts: Tensor, flat: list[str], owner: Tensor, settings: Settings
) -> dict[str, Any]:
    rows = pictures.draw(len(images.index), settings.examples, settings.seed)
    if not rows:
        return {}
    places = [str(place) for place in images.index.tolist()]
    matrix_rows = pictures.draw(len(images.index), 2 * settings.examples, settings.seed)
    captions_of = {row: (owner == row).nonzero().flatten().tolist() for row in matrix_rows}
    first = [captions_of[row][0] for row in matrix_rows]
    to_text = [
        ImageExample(
            image=places[row],
            truth=[flat[i] for i in captions_of[row]],
            found=pictures.found(images.features[row] @ texts.T, flat, set(captions_of[row]), SHOWN),
        )
        for row in rows
    ]
    to_image = [
        TextExample(
            text=flat[captions_of[row][0]],
            truth=places[row],
            found=pictures.found(texts[captions_of[row][0]] @ images.features.T, places, {row}, SHOWN),
        )
        for row in rows
    ]
    shown = [*matrix_rows, *(places.index(hit["item"]) for example in to_image for hit in example["found"])]
    return {
        "thumbnails": pictures.thumbnails(dataset, [int(places[row]) for row in shown]),
        "image_to_text": to_text,
        "text_to_image": to_image,
        "similarity": Similarity(
            images=[places[row] for row in matrix_rows],
            texts=[flat[i] for i in first],
            scores=pictures.matrix(images.features[matrix_rows] @ texts[first].T),
        ),
    }
