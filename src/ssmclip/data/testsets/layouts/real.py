"""ImageNet's validation pictures with reassessed labels: several may be right for a picture (Beyer et al. 2020)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ssmclip.data.images import folders_in, pictures_below
from ssmclip.data.testsets.card import LAYOUTS, Card, Found
from ssmclip.data.testsets.files import picture_files, read_json
from ssmclip.data.testsets.prompts import names_on, timm_info
from ssmclip.data.testsets.splits import choose_split

PICTURE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPE?G", re.IGNORECASE)
LABELS = "real.json"  # the authors' file: picture 1's labels, picture 2's ...
PACKAGED = "imagenet_real_labels.json"  # timm's copy of it
WNID = re.compile(r"n\d{8}")


@LAYOUTS.register("reassessed_labels")
def reassessed_labels(folder: Path, card: Card) -> Found | str:
    """val/ILSVRC2012_val_00000001.JPEG, or in folders of classes, which do not count; real.json beside them or timm's.

    Pictures without a right label are left out. Raises ValueError for labels that are not lists of classes by number.
    """
    pictures = {path: int(found[1]) for path in _pictures(folder, card) if (found := PICTURE.fullmatch(path.name))}
    if not pictures:
        return f"{card.split}/ILSVRC2012_val_00000001.JPEG ..., by themselves or in folders of classes"
    labels = _labels(folder, len(names_on(card)))
    if beyond := [path.name for path, number in pictures.items() if not 1 <= number <= len(labels)]:
        raise ValueError(f"{folder}: {LABELS} has labels for {len(labels):,} pictures, and none for {beyond[0]}")
    kept = [path for path, number in pictures.items() if labels[number - 1]]
    answers = [labels[pictures[path] - 1] for path in kept]
    return Found(
        where=str(folder),
        pictures=picture_files(kept),
        keys=[path.name for path in kept],
        labels=[right[0] for right in answers],
        answers=answers,
        files=tuple(kept),
    )


def _pictures(folder: Path, card: Card) -> list[Path]:
    """Return the pictures in a folder, or below its folder of the split, in the order of their names."""
    if not folder.is_dir():
        return []
    below = {path.name.lower(): path for path in folders_in(folder)}
    split, _ = choose_split(card.split, below)
    place = below[split] if split else folder
    direct = [path for path in place.iterdir() if path.is_file()]
    in_classes = [path for one in folders_in(place) if WNID.fullmatch(one.name) for path in pictures_below(one)]
    return sorted([*direct, *in_classes], key=lambda path: path.name)


def _labels(folder: Path, classes: int) -> list[tuple[int, ...]]:
    """Return each picture's right classes, from the authors' file where it is there. Raises ValueError."""
    there = [path for path in (folder / LABELS, folder.parent / LABELS) if path.is_file()]
    source = there[0] if there else timm_info(PACKAGED)
    labels = read_json(source)
    wrong = [right for right in labels if not _are_classes(right, classes)] if isinstance(labels, list) else [labels]
    if wrong:
        raise ValueError(
            f"{source} must be a list of each picture's classes, from 0 to {classes - 1} (got {str(wrong[0])[:40]})"
        )
    return [tuple(right) for right in labels]


def _are_classes(value: Any, count: int) -> bool:
    return isinstance(value, list) and all(type(label) is int and 0 <= label < count for label in value)
