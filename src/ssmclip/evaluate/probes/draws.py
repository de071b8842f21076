"""Random draws of images, class by class.

n images · m drawn
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor

HELD_OUT = 0.2  # of the images of each class


def hold_out(labels: Int[Tensor, " n"], seed: int, share: float = HELD_OUT) -> tuple[Tensor, Tensor]:
    """Return the places of (images that are kept, images that are held out), both in order.

    Of each class this share is held out, rounded, but at least one image, and none of a class with a single image.
    """
    held = [places[: _count(len(places), share)] for places in _shuffled(labels, seed).values()]
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(held)] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()


def draw_shots(
    labels: Int[Tensor, " n"], shots: int, tested: Int[Tensor, " k"], names: Sequence[str], seed: int
) -> tuple[Int[Tensor, " m"], Int[Tensor, " r"]]:
    """Return the places of `shots` images of each class, and of the images that are left.

    tested: classes that must be among them. Raises ValueError naming the classes that have fewer images.
    """
    shuffled = _shuffled(labels, seed)
    counts = dict.fromkeys(tested.tolist(), 0) | {label: len(places) for label, places in shuffled.items()}
    if fewer := {names[label]: count for label, count in sorted(counts.items()) if count < shots}:
        first = ", ".join(f"{name!r} has {count}" for name, count in list(fewer.items())[:5])
        more = f" and {len(fewer) - 5} more classes have fewer" if len(fewer) > 5 else ""
        least = min(fewer.values())
        way_out = (
            f"take at most fewshot-{least}, or a larger training split" if least else "take a larger training split"
        )
        raise ValueError(f"{shots} training images of each class are needed, and {first}{more}: {way_out}")
    drawn = torch.cat([places[:shots] for places in shuffled.values()]).sort().values
    rest = torch.ones(len(labels), dtype=torch.bool)
    rest[drawn] = False
    return drawn, rest.nonzero().flatten()


def draw_up_to(labels: Int[Tensor, " n"], most: int, seed: int) -> Int[Tensor, " m"]:
    """Return the places of `most` images of each class, or of all it has."""
    drawn = [places[:most] for places in _shuffled(labels, seed).values()]
    return torch.cat(drawn).sort().values if drawn else torch.empty(0, dtype=torch.int64)


def _shuffled(labels: Tensor, seed: int) -> dict[int, Tensor]:
    """The places of each class's images, in random order."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = {}
    for label in labels.unique().tolist():
        places = (labels == label).nonzero().flatten()
        shuffled[label] = places[torch.randperm(len(places), generator=generator)]
    return shuffled


def _count(n: int, share: float) -> int:
    return min(max(round(share * n), 1), n - 1)
