"""Accuracy by level of distortion on any data set, using its own classes or captions.

n images · l levels

Pictures are distorted as the published stimuli were, at 224 x 224 (sigmas and reaches are in those pixels), and then go
through each model's own preprocessing. Every model sees the same pictures, so models are compared image by image.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ssmclip.data.distortions import DISTORTIONS, GEIRHOS, distort
from ssmclip.data.distortions.apply import fingerprint
from ssmclip.data.distortions.pictures import SIDE, crop, picture_seed
from ssmclip.data.distortions.registry import Table, find, kept, prepare
from ssmclip.data.images import thumbnail
from ssmclip.evaluate.embeddings.cache import texts_hash
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, subset
from ssmclip.evaluate.judge import Judge, coverage
from ssmclip.evaluate.pictures import draw
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.metrics import bootstrap_interval
from ssmclip.rows import Result
from ssmclip.rows.condition import AVERAGE, LEVEL
from ssmclip.rows.tasks import of_distorted

log = logging.getLogger(__name__)

MEAN = "mean over levels"
REMEMBERED = 2000  # distorted pictures kept for the next model, 300 MB


@dataclass(frozen=True)
class Manipulations:
    """The distortions to apply, each at all of its levels; tables: "amplitude" and "gamma", checked, if given."""

    names: tuple[str, ...]
    tables: dict[str, np.ndarray] = field(default_factory=dict)
    seed: int = 0


def choose(names: Sequence[str] | None, amplitude: Table = None, gamma: Table = None, seed: int = 0) -> Manipulations:
    """Return the named distortions, or those of Geirhos et al. whose tables are given; omitted ones are logged.

    names: as `find` takes them: "contrast", "imagenet-c/fog", "FILE.py:NAME".
    Raises UnknownName, ValueError for a named distortion without its table and for tables that do not fit, and
    ImportError for a named distortion whose package is missing.
    """
    given = {"amplitude": amplitude, "gamma": gamma}
    if names is None:
        without_tables = [name for name in GEIRHOS if any(given[kind] is None for kind in DISTORTIONS[name].tables)]
        names = [name for name in GEIRHOS if name not in without_tables]
        for name in without_tables:
            log.warning("%s is omitted: it needs --%s FILE.npy", name, " and --".join(DISTORTIONS[name].tables))
    names = tuple(find(name) for name in names)
    tables = {kind: table for name in names for kind, table in prepare(name, given).items()}
    return Manipulations(names, tables, seed)


class Distorted(Dataset):
    """A data set with its images distorted, indexed like the original. Images are kept for the next model."""

    def __init__(self, dataset: Any, name: str, label: str, how: Manipulations):
        self.dataset, self.name, self.label, self.how = dataset, name, label, how
        self.tables = {kind: how.tables[kind] for kind in DISTORTIONS[name].tables}
        # Embeddings are found again by files, keys and labels: the keys say what was done to the pictures.
        tables = texts_hash(table.tobytes().hex() for table in self.tables.values())
        mark = f"{name} {label} {SIDE} {how.seed} {tables} {fingerprint(name, label, self.tables)}"
        self.keys = [f"{key} {mark}" for key in dataset.keys]
        self.files = dataset.files
        self.labels = getattr(dataset, "labels", None)
        self._remembered: dict[int, Image.Image] = {}

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: int) -> Image.Image | tuple[Image.Image, int]:
        if place not in self._remembered:
            item = self.dataset[place]
            picture = self._distorted(item[0] if isinstance(item, tuple) else item, self.dataset.keys[place])
            if len(self._remembered) >= REMEMBERED:
                return picture if self.labels is None else (picture, self.labels[place])
            self._remembered[place] = picture
        picture = self._remembered[place]
        return picture if self.labels is None else (picture, self.labels[place])

    def _distorted(self, picture: Image.Image, key: str) -> Image.Image:
        picture = picture.convert("RGB")
        if picture.size != (SIDE, SIDE):
            picture = crop(picture, SIDE)
        seed = picture_seed(self.how.seed, self.name, str(key))
        return Image.fromarray(distort(np.array(picture), self.name, self.label, seed=seed, **self.tables))


def distorted_rows(judges: Sequence[Judge], how: Manipulations, settings: Settings) -> Iterator[list[Result]]:
    """Yield the rows of one distortion after another: each model's at each level, their mean, and models compared.

    judges: of one test set, one for each model. At a level: the judge's headline metric. "mean over levels": the same
    over the levels that count (`Distortion.counted`), and `..._retained`: of what the model has above guessing at the
    level that does not distort, the share it keeps, for models that are clearly above it there (by the interval).
    Intervals resample images. Against another model: differences, over the same images.
    """
    metric, dataset = judges[0].headline, judges[0].test_set
    card = dataset.card
    with tqdm(total=sum(len(DISTORTIONS[name].labels) for name in how.names), unit="level", disable=None) as bar:
        for name in how.names:
            task, labels = of_distorted(card.name, name), list(DISTORTIONS[name].labels)
            levels, right, shown = [], {judge.clip.label: [] for judge in judges}, {}
            for place, label in enumerate(labels):
                bar.set_description(f"{name} {label}")
                pictures = Distorted(dataset, name, label, how)
                for judge in judges:
                    images = judge.see(pictures)
                    hits, chance = judge.right(images)
                    model = judge.clip.label
                    right[model].append(hits)
                    extra = {"title": f"{card.title}, {name}", "chance": chance, "counted": place in kept(name)}
                    levels.append(_level_row(model, task, label, metric, hits, images, dataset, settings, extra))
                if settings.examples:
                    example = subset(len(dataset), settings)
                    item = pictures[example[draw(len(example), 1, settings.seed)[0]]]
                    shown[label] = thumbnail(item[0] if isinstance(item, tuple) else item)
                bar.update()
            about = {"title": f"{card.title}, {name}", **coverage(images, dataset)}
            scores = {model: torch.stack(hits).double() for model, hits in right.items()}
            rows = levels + paired.paired_rows(levels, seed=settings.seed)
            rows += _mean_rows(task, metric, scores, kept(name), chance or 0.0, settings.seed, about)
            if shown:
                rows[0].extra["stimuli"] = shown
            yield rows


def _level_row(model, task, label, metric, hits, images: ImageEmbeddings, dataset, settings, extra) -> Result:
    low, high = bootstrap_interval(lambda w: w @ hits.double() / w.sum(-1), len(hits), seed=settings.seed)
    extra = extra | paired.marked(hits, [dataset.keys[i] for i in images.index.tolist()])
    return Result(
        model, task, metric, hits.double().mean().item(), low, high, len(hits), where={LEVEL: label}, extra=extra
    )


def _mean_rows(
    task: str, metric: str, scores: dict[str, Tensor], counted, chance: float, seed: int, about
) -> list[Result]:
    """Return means over levels. scores: model -> (l, n), 1 where right; the first level does not distort."""
    n = next(iter(scores.values())).shape[1]

    def mean(model: str) -> Callable[[Tensor], Tensor]:
        of_image = scores[model][counted].mean(dim=0)
        return lambda weights: weights @ of_image / weights.sum(-1)

    def retained(model: str) -> Callable[[Tensor], Tensor]:
        of_image, undistorted = scores[model][counted].mean(dim=0), scores[model][0]
        return lambda weights: (weights @ (of_image - chance)) / (weights @ (undistorted - chance))

    def row(model, name, statistic, against="") -> Result:
        value = statistic(torch.ones(1, n, dtype=torch.float64))[0].item()
        low, high = bootstrap_interval(lambda w: _finite(statistic(w)), n, seed=seed)
        return Result(model, task, name, value, low, high, n, where={AVERAGE: MEAN}, against=against, extra=about)

    def sees(model: str) -> bool:
        return bootstrap_interval(lambda w: w @ scores[model][0] / w.sum(-1), n, seed=seed)[0] > chance

    rows = []
    for name, of, models in (
        (metric, mean, list(scores)),
        (f"{metric}_retained", retained, [model for model in scores if sees(model)]),
    ):
        rows += [row(model, name, of(model)) for model in models]
        rows += [row(a, f"{name}_difference", _minus(of(a), of(b)), against=b) for a, b in combinations(models, 2)]
    return rows


def _minus(a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda weights: a(weights) - b(weights)


def _finite(values: Tensor) -> Tensor:
    return values.masked_fill(~values.isfinite(), torch.nan)  # which the interval leaves out
