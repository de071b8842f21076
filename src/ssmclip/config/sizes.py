"""Image sizes as text."""

from __future__ import annotations


def image_size(text: str) -> int | tuple[int, int]:
    """Pixels, or HEIGHTxWIDTH. Raises ValueError for what is neither.

    >>> image_size("224"), image_size("97x160")
    (224, (97, 160))
    """
    sides = text.split("x")
    if len(sides) > 2 or not all(side.isdigit() and int(side) for side in sides):
        raise ValueError(f"image size {text!r}: wanted pixels, or HEIGHTxWIDTH, all above 0")
    return int(text) if len(sides) == 1 else (int(sides[0]), int(sides[1]))
