"""What each tab of the page answers: models, a picture and what is asked of it -> values. Nothing here knows the page.

What one model cannot do (a classifier reads no text, a ViT may not take a size) is a `Refusal` in its place, so that
the other models still answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Float
from PIL import Image

from ssmclip.analyze.cost.efficiency import in_fresh_process
from ssmclip.analyze.cost.macs import count_macs
from ssmclip.analyze.cost.measure import Job
from ssmclip.analyze.saliency.explanation import Explanation, explain
from ssmclip.data.distortions import distort
from ssmclip.data.distortions.pictures import SIDE, crop
from ssmclip.data.distortions.registry import Table, parse_level
from ssmclip.data.images import BadImage, open_image, thumbnail
from ssmclip.evaluate.models import as_encoder
from ssmclip.evaluate.prediction import Prediction, classify
from ssmclip.evaluate.search.embedder import Embedder
from ssmclip.evaluate.search.index import Index, build_index, embedder_for, made_by, nearest, read_index
from ssmclip.models.frozen import POOLED
from ssmclip.models.names import Model, find
from ssmclip.models.towers import is_clip

__all__ = [
    "Cost",
    "Distorted",
    "Gallery",
    "Hit",
    "Refusal",
    "Similarity",
    "Subject",
    "at_size",
    "classified",
    "compared",
    "distorted",
    "looked_at",
    "make_gallery",
    "open_gallery",
    "open_subjects",
    "searched",
]

# What a model or a visitor's input can cause; anything else is a mistake in this program.
CAUSES = (ValueError, KeyError, OSError, ImportError, RuntimeError, AssertionError)

SHOWN = 10  # labels of a picture
TIMEOUT_S = 120.0  # to measure a model at one size
THUMBNAIL = 192  # pixels

Measure = Callable[[Job], dict[str, Any]]
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Subject:
    """A model under show, and the name that it is opened by again at another size."""

    name: str
    model: Model

    @property
    def label(self) -> str:
        return self.model.label


@dataclass(frozen=True)
class Refusal:
    """Why a model gives no answer."""

    model: str
    why: str


def open_subjects(names: Mapping[str, str], device: str = "cpu") -> tuple[Subject, ...]:
    """Return the models of names, by label -> name. Raises what `ssmclip.find` raises."""
    return tuple(Subject(name, find(name, label=label, device=device)) for label, name in names.items())


def _each(subjects: Sequence[Subject], answer: Callable[[Subject], Answer]) -> list[Answer | Refusal]:
    def one(subject: Subject) -> Answer | Refusal:
        try:
            return answer(subject)
        except CAUSES as error:
            return Refusal(subject.label, str(error) or type(error).__name__)

    return [one(subject) for subject in subjects]


# ---- Classify


def classified(
    subjects: Sequence[Subject], picture: Image.Image, labels: Sequence[str] | None, template: str = "{}"
) -> list[Prediction | Refusal]:
    """Return each model's most probable labels of a picture.

    labels: what to choose from, None for a classifier's own classes; a classifier is not asked about others.
    """
    return _each(subjects, lambda subject: _predicted(subject.model, picture, labels, template))


def _predicted(model: Model, picture: Image.Image, labels: Sequence[str] | None, template: str) -> Prediction:
    chosen = labels if is_clip(model.network) else None
    (prediction,) = classify(model, picture, chosen, [template or "{}"], SHOWN)
    return prediction


# ---- Search


@dataclass(frozen=True)
class Gallery:
    """An index, and the model that it was made with."""

    index: Index
    embedder: Embedder
    file: Path

    @property
    def folder(self) -> Path:
        return Path(self.index.about["folder"])


@dataclass(frozen=True)
class Hit:
    """A picture of an index: its similarity, and a JPEG in base64, or why there is none."""

    path: str
    score: float
    picture: str = ""
    missing: str = ""


def open_gallery(file: Path, subjects: Sequence[Subject] = (), device: str = "cpu") -> Gallery:
    """Return an index with the one of the models that made it, or else the model it names.

    Raises what `read_index` and `ssmclip.load` raise, and ValueError for a model that has changed since.
    """
    index = read_index(file)
    embedders = (Embedder(subject.model, device=device) for subject in subjects if is_clip(subject.model.network))
    if known := next((embedder for embedder in embedders if made_by(index, embedder)), None):
        return Gallery(index, known, file)
    embedder = embedder_for(index, device=device)
    if not made_by(index, embedder):
        raise ValueError(
            f"{file} was made with other weights or preprocessing than {embedder.clip.label} has now: make it again "
            f"with `ssmclip embed`, from a model with weights of its own"
        )
    return Gallery(index, embedder, file)


def make_gallery(folder: Path, subject: Subject, file: Path) -> Gallery:
    """Return an index of the pictures in a folder, made with a model and written to a file."""
    embedder = Embedder(subject.model, device=subject.model.device)
    return Gallery(build_index(folder, embedder, file), embedder, file)


def searched(gallery: Gallery, text: str, picture: Image.Image | None, k: int = 12) -> list[Hit]:
    """Return the pictures of an index that are most similar to a text or to a picture, best first.

    Raises ValueError for neither, for both, and where none of the pictures can be opened any more.
    """
    query = _embedded(gallery.embedder, text, picture)
    scores, places = nearest(gallery.index.vectors, query[None], k)
    hits = [
        _hit(gallery, gallery.index.paths[place], float(score))
        for score, place in zip(scores[0], places[0], strict=True)
    ]
    if all(hit.missing for hit in hits):
        raise ValueError(
            f"none of the {len(hits)} nearest pictures can be opened any more; the first: {hits[0].missing}. Was "
            f"{gallery.folder} moved or emptied? Make the index again with `ssmclip embed`"
        )
    return hits


def _hit(gallery: Gallery, path: str, score: float) -> Hit:
    # An index is a file like any other: what it lists must not lead out of its folder.
    if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
        return Hit(path, score, missing=f"{path}: outside the folder of the index")
    try:
        return Hit(path, score, thumbnail(open_image(gallery.folder / path), THUMBNAIL))
    except BadImage as error:
        return Hit(path, score, missing=str(error))


def _embedded(embedder: Embedder, text: str, picture: Image.Image | None) -> Float[np.ndarray, " d"]:
    if bool(text) == (picture is not None):
        raise ValueError("give a picture or a text" + (", and not both" if text else ""))
    if picture is not None:
        return embedder.encode_images(picture).numpy()[0]
    if not is_clip(embedder.clip.network):
        raise ValueError(f"{embedder.clip.label} reads no text: give pictures, or take a CLIP")
    return embedder.encode_texts(text).numpy()[0]


# ---- Compare


@dataclass(frozen=True)
class Similarity:
    """A model's cosine similarity of two things."""

    model: str
    cosine: float


def compared(
    subjects: Sequence[Subject], left: tuple[str, Image.Image | None], right: tuple[str, Image.Image | None]
) -> list[Similarity | Refusal]:
    """Return each model's cosine similarity of two sides, each a text or a picture.

    A CLIP compares embeddings, an image encoder its pooled features. Raises ValueError for a side with neither or both.
    """
    for name, (text, picture) in (("left", left), ("right", right)):
        if bool(text) == (picture is not None):
            raise ValueError(f"{name} side: give a picture or a text" + (", and not both" if text else ""))

    def one(subject: Subject) -> Similarity:
        model = subject.model if is_clip(subject.model.network) else as_encoder(subject.model, POOLED)
        embedder = Embedder(model, device=model.device, dtype=model.dtype)
        return Similarity(subject.label, float(_embedded(embedder, *left) @ _embedded(embedder, *right)))

    return _each(subjects, one)


# ---- Resolution


@dataclass(frozen=True)
class Cost:
    """What a model says of a picture at a size, and what its image tower takes there.

    macs: multiply-accumulates; latency_ms: median; memory_mb: peak in 10^6 bytes, weights included; unmeasured: why
    time and memory are not known.
    """

    prediction: Prediction
    size: int
    macs: int
    latency_ms: float | None = None
    memory_mb: float | None = None
    unmeasured: str = ""


def at_size(
    subjects: Sequence[Subject],
    picture: Image.Image,
    labels: Sequence[str] | None,
    size: int,
    measure: Measure | None = None,
) -> list[Cost | Refusal]:
    """Return each model's answer for a picture of size x size pixels, and its cost there.

    Time and memory are those of `ssmclip analyze efficiency`, taken in a process of their own; a model that does not
    fit into memory is known from that, and not asked. measure: in place of that process.
    """
    measure = measure or (lambda job: in_fresh_process(job, TIMEOUT_S))

    def one(subject: Subject) -> Cost:
        macs = count_macs(subject.name, size).image.total
        device = str(subject.model.device)
        found = measure(Job(subject.name, image_size=(size, size), seconds=0.5, device=device))
        if "out of memory" in found.get("failed", ""):
            raise ValueError(f"{subject.label} does not fit into memory at {size} px ({found['failed']})")
        model = find(subject.name, label=subject.label, device=device, image_size=size)
        prediction = _predicted(model, picture, labels, "{}")
        if "failed" in found:
            return Cost(prediction, size, macs, unmeasured=found["failed"])
        return Cost(prediction, size, macs, 1e3 * found["single"]["median"], found["memory_mb"])

    return _each(subjects, one)


# ---- Distort


@dataclass(frozen=True)
class Distorted:
    """A picture before and after a distortion, and what each model says of both."""

    before: Image.Image
    after: Image.Image
    answers: list[tuple[Prediction | Refusal, Prediction | Refusal]] = field(default_factory=list)


def distorted(
    subjects: Sequence[Subject],
    picture: Image.Image,
    labels: Sequence[str] | None,
    name: str,
    level: str,
    tables: Mapping[str, Table] | None = None,
) -> Distorted:
    """Return a picture, cropped to 224 x 224 as the published stimuli are, distorted, and what the models say.

    name, level, tables: as for `ssmclip.distort`. Raises what that raises.
    """
    parse_level(name, level or None)  # before anything is cropped
    before = crop(picture, SIDE)
    after = Image.fromarray(distort(np.array(before), name, level or None, **(tables or {})))
    pairs = zip(classified(subjects, before, labels), classified(subjects, after, labels), strict=True)
    return Distorted(before, after, list(pairs))


# ---- Where it looks


def looked_at(
    subjects: Sequence[Subject],
    picture: Image.Image,
    text: str,
    method: str,
    position: tuple[float, float] = (0.5, 0.5),
) -> list[Explanation | Refusal]:
    """Return each model's maps by a method of `ssmclip.explain`.

    text: what to look for, "" for a classifier's most probable class.
    """

    def one(subject: Subject) -> Explanation:
        (found,) = explain(subject.model, {"": picture}, text or None, [method], position=position, steps=0)
        return found

    return _each(subjects, one)
