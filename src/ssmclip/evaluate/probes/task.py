"""A probe on a data set as a task: features of all splits, answers, rows."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor

from ssmclip.evaluate.classification import ByScores
from ssmclip.evaluate.doubts import DOUBTS, doubted
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_images
from ssmclip.evaluate.models import Models, as_encoder
from ssmclip.evaluate.probes.draws import HELD_OUT, hold_out
from ssmclip.evaluate.probes.parts import Parts
from ssmclip.evaluate.probes.probe import Answer, Labelled, Probe, Splits
from ssmclip.evaluate.statistics.metrics import LEVEL
from ssmclip.evaluate.task import StudyTask
from ssmclip.models.frozen import POOLED
from ssmclip.models.names import Model
from ssmclip.rows import Result
from ssmclip.rows.condition import SEED

log = logging.getLogger(__name__)

OF_ONE_DRAW = ("right", "images", "per_class", "confusion", "groups", "image_to_text", "similarity", "thumbnails")
NOT_SPLIT = "no training split: {:.0f} % of each class, drawn with seed {}, are tested on and the others trained on"


def features(model: Model, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Return an encoder's features of preprocessed images, as long as they are, float32, on the CPU."""
    return model.network.encode_image(images.to(model.device, model.dtype)).float().cpu()


class _Seen(NamedTuple):
    """What an encoder makes of a data set: for the probe; the test images; of the test set, what rows count; what a
    reader must know."""

    splits: Splits
    tested: ImageEmbeddings
    test_set: Any
    about: dict[str, Any]


@dataclass(frozen=True)
class ProbeTask(StudyTask):
    """A probe trained on the features of one split of a data set and tested on another.

    probe: which one (see `read_probe`); parts: the splits; features: which, one of FEATURES; name: of the rows' task.
    Its rows are those of a classifier on the test set. A probe of several draws has their means, with the interval that
    Student's t gives for the mean of the draws, and the accuracy of each draw, with `seed` in its row's `where`.
    """

    probe: Probe
    parts: Parts
    name: str
    features: str = POOLED

    def measure(self, models: Models, settings: Settings) -> Iterator[list[Result]]:
        for label in models:
            yield self._rows(models.encoder(label, self.features), settings)

    def rows(self, model: Model, settings: Settings) -> list[Result]:
        """Return the rows of one model, a CLIP or an image encoder."""
        return self._rows(as_encoder(model, self.features), settings)

    def _rows(self, encoder: Model, settings: Settings) -> list[Result]:
        seen = self._see(encoder, settings)
        answers = self.probe.answers(seen.splits, settings.seed)
        about = seen.about | {
            "title": f"{self.parts.test.card.title}, {self.probe.title}",
            "probe": self.probe.title,
            "features": self.features,
            "width": seen.splits.test.shape[1],
            "parameters": encoder.parameters,
        }
        shown = settings if answers[0].seed is None else replace(settings, examples=0)
        judged = [_Judge(encoder, seen, shown, answer, about) for answer in answers]
        each = [judge.rows(seen.tested, self.name) for judge in judged]
        rows = each[0] if answers[0].seed is None else _means(each, answers)
        rows = doubted(rows, seen.test_set)
        for doubt in rows[0].extra.get(DOUBTS, ()):
            log.warning("%s on %s: %s", encoder.label, self.name, doubt)
        return rows

    def _see(self, encoder: Model, settings: Settings) -> _Seen:
        parts = self.parts
        seen = [embed_images(encoder, part, settings, features) for part in parts.opened()]
        log.info("%s on %s: %s images", encoder.label, self.name, " + ".join(f"{len(part.index):,}" for part in seen))
        if parts.train is None:
            return _divided(parts, seen[0], settings)
        labelled = [
            Labelled(images.features, parts.labels(part, images.labels))
            for part, images in zip(parts.opened(), seen, strict=True)
        ]
        test, train, *validation = labelled
        splits = Splits(train, validation[0] if validation else None, test.features, test.classes, parts.names)
        said = list(_less(parts.opened()[1:], seen[1:]))
        tested = replace(seen[0], labels=test.labels)
        return _Seen(splits, tested, parts.test, _noted(splits, said, parts.test))


def _less(parts: Sequence[Any], seen: Sequence[ImageEmbeddings]) -> Iterator[str]:
    """Say how much of the parts to train on there is not."""
    used, unreadable = (sum(map(len, some)) for some in zip(*((s.index, s.unreadable) for s in seen), strict=True))
    if used + unreadable < (whole := sum(map(len, parts))):
        yield f"{used:,} of {whole:,} training images"
    if unreadable:
        yield f"{unreadable:,} training images could not be read"


def _divided(parts: Parts, images: ImageEmbeddings, settings: Settings) -> _Seen:
    """Split the images of a data set that has no splits, class by class."""
    kept, held = hold_out(parts.labels(parts.test, images.labels), settings.seed)
    whole = Labelled(images.features, images.labels)
    if not len(held):
        raise ValueError(f"{parts.test.card.name} has one image of each class: none is left to test on")
    test = whole.at(held)
    splits = Splits(whole.at(kept), None, test.features, test.classes, parts.names)
    tested = replace(images, features=test.features, index=images.index[held], labels=test.labels)
    test_set = _Part(parts.test, len(held))
    said = [NOT_SPLIT.format(100 * HELD_OUT, settings.seed)]
    return _Seen(splits, tested, test_set, _noted(splits, said, test_set))


class _Part:
    """Some pictures of a test set, by their places in all of it; its card says how many they are."""

    def __init__(self, whole: Any, n: int):
        self._whole, self.card = whole, replace(whole.card, test_size=n)

    def __len__(self) -> int:
        return len(self._whole)

    def __getitem__(self, place: int) -> Any:
        return self._whole[place]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)


def _noted(splits: Splits, said: list[str], test_set: Any) -> dict[str, Any]:
    """What a reader must know of the splits, for a row's `extra`."""
    trained = set(splits.train.labels.tolist())
    without = [splits.names[label] for label in splits.tested.tolist() if label not in trained]
    if without:
        first = ", ".join(without[:5]) + (" ..." if len(without) > 5 else "")
        said = [*said, f"{len(without)} classes without training images, whose images count as wrong: {first}"]
    said = [*filter(None, [getattr(test_set, "said", "")]), *said]
    return {"said": "; ".join(said)} if said else {}


class _Judge(ByScores):
    """The judge of one answer of a probe."""

    def __init__(self, encoder: Model, seen: _Seen, settings: Settings, answer: Answer, about: dict[str, Any]):
        super().__init__(encoder, seen.test_set, settings)
        self.names = list(seen.splits.names)
        self.answer, self.known = answer, about

    def scores(self, seen: ImageEmbeddings) -> Float[Tensor, "n c"]:
        return self.answer.scores

    def about(self, seen: ImageEmbeddings) -> dict[str, Any]:
        return self.known | self.answer.about


def _means(each: Sequence[list[Result]], answers: Sequence[Answer]) -> list[Result]:
    """Return the means over draws, then each draw's own rows of top1.

    The rows of a draw keep which images were right, so that two models are compared draw by draw.
    """
    rows = [_mean(of_metric, answers) for of_metric in zip(*each, strict=True)]
    for of_draw, answer in zip(each, answers, strict=True):
        rows += [
            replace(row, where={SEED: answer.seed}, extra={key: row.extra[key] for key in ("right", "images")})
            for row in of_draw
            if row.metric == "top1"
        ]
    return rows


def _mean(of_metric: Sequence[Result], answers: Sequence[Answer]) -> Result:
    values = torch.tensor([row.value for row in of_metric], dtype=torch.float64)
    mean, interval = values.mean().item(), (None, None)
    if len(values) > 1:
        half = stats.t.ppf((1 + LEVEL) / 2, len(values) - 1) * values.std().item() / math.sqrt(len(values))
        interval = max(mean - half, 0.0), min(mean + half, 1.0)
    first = {key: value for key, value in of_metric[0].extra.items() if key not in OF_ONE_DRAW}
    if first:  # of each draw: what was chosen
        chosen = [{"seed": answer.seed} | answer.about for answer in answers]
        first = {key: value for key, value in first.items() if key not in answers[0].about} | {"draws": chosen}
    return replace(
        of_metric[0],
        value=mean,
        ci_low=interval[0],
        ci_high=interval[1],
        extra=first | {"values": values.tolist(), "interval": f"Student's t over {len(values)} draws"},
    )
