"""What visitors of the page give: pictures and labels, checked before a model sees them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ssmclip.config.bounds import Settings, bounded
from ssmclip.config.lists import split_list
from ssmclip.data.images import BadImage, open_image

__all__ = ["LIMITS", "Limits", "labels_in", "picture_in", "text_in"]


@dataclass(frozen=True)
class Limits(Settings):
    """The most that a visitor may give.

    bytes: of one upload; pixels, aspect: of a picture, and of its long side over its short one (preprocessing enlarges
    the short side, and with it the long one); labels: to choose from; characters: of a label or another text.
    """

    bytes: int = bounded(20_000_000, at_least=1)
    pixels: int = bounded(40_000_000, at_least=1)
    aspect: int = bounded(20, at_least=1)
    labels: int = bounded(1000, at_least=1)
    characters: int = bounded(1000, at_least=1)


LIMITS = Limits()


def picture_in(path: str | Path | None, limits: Limits = LIMITS) -> Image.Image:
    """Return an uploaded picture in mode RGB. Raises ValueError for none, BadImage for one that cannot be used."""
    if path is None:
        raise ValueError("no picture given: drop one into the box")
    size = Path(path).stat().st_size
    if size > limits.bytes:
        raise BadImage("too many bytes", f"a picture must have at most {limits.bytes:,} (got {size:,})")
    picture = open_image(path, max_pixels=limits.pixels)
    if max(picture.size) > limits.aspect * min(picture.size):
        sides = " x ".join(map(str, picture.size))
        raise BadImage("image too narrow", f"one side must be at most {limits.aspect} times the other (got {sides})")
    return picture


def labels_in(text: str | None, limits: Limits = LIMITS) -> list[str] | None:
    r"""Return the labels of a text, one a line or, in a single line, with commas between; None for a blank text.

    Raises ValueError for too many, and for one that is too long.

    >>> labels_in("a dog,a cat"), labels_in("red, green\na cat"), labels_in(" ")
    (['a dog', 'a cat'], ['red, green', 'a cat'], None)
    """
    text = (text or "").strip()
    labels = [label.strip() for label in (text.splitlines() if "\n" in text else split_list(text))]
    labels = [label for label in labels if label]
    if len(labels) > limits.labels:
        raise ValueError(f"there must be at most {limits.labels:,} labels (got {len(labels):,}): choose fewer")
    return [text_in(label, limits) for label in labels] or None


def text_in(text: str | None, limits: Limits = LIMITS) -> str:
    """Return a text without the blanks around it. Raises ValueError for one that is too long."""
    text = (text or "").strip()
    if len(text) > limits.characters:
        raise ValueError(f"a text must have at most {limits.characters:,} characters (got {len(text):,}): shorten it")
    return text
