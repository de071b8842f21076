"""What the larger parts of a row's `extra` look like: who measures writes them, who draws reads them. Needs no torch.

per_class: list[ClassAccuracy]      of classification, in label order
confusion: Confusion                of classification with few classes
groups: list[GroupAccuracy]         of test sets with groups
thumbnails: dict[str, str]          place -> a small JPEG, as base64
image_to_text: list[ImageExample]   text_to_image: list[TextExample]
similarity: Similarity
saliency: Saliency                  maps over a picture
right, images                       see RightImages
"""

from __future__ import annotations

from typing import TypedDict


class ClassAccuracy(TypedDict):
    """One class: its name, the fraction of its n images that were right."""

    name: str
    accuracy: float
    n: int


class GroupAccuracy(ClassAccuracy):
    """The same of one group of images."""


class Confusion(TypedDict):
    """counts[i][j]: images of class i that were taken for class j."""

    names: list[str]
    counts: list[list[int]]


class Match(TypedDict):
    """What was found: the item (a text, or an image's place), its score, whether it is right."""

    item: str
    score: float
    right: bool


class ImageExample(TypedDict):
    """An image, by its place; the texts that are right for it; the best matches."""

    image: str
    truth: list[str]
    found: list[Match]


class TextExample(TypedDict):
    """A text; the place of its image; the best matches."""

    text: str
    truth: str
    found: list[Match]


class Similarity(TypedDict):
    """scores[i][j]: cosine similarity of image i (its place) and text j; true pairs are on the diagonal."""

    images: list[str]
    texts: list[str]
    scores: list[list[float]]


class SaliencyMap(TypedDict):
    """A map: its title, and its values row by row."""

    title: str
    values: list[list[float]]


class Saliency(TypedDict):
    """What a model looks at: by which method, for which query, in the picture of which name and in which layer.

    picture: a small JPEG as base64, "" where the maps are over no picture; span: the least and largest value that all
    maps are drawn with, None for a scale of each map's own.
    """

    method: str
    query: str
    name: str
    layer: str
    picture: str
    span: list[float] | None
    maps: list[SaliencyMap]


class RightImages(TypedDict):
    """Which of a row's n images were right: a bit each, as base64; and a hash of which images they are."""

    right: str
    images: str
