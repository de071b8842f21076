"""PASCAL VOC 2007 in its authors' files, as CLIP_benchmark reads it: what is on a picture, or its objects cut out."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

from PIL import Image

from ssmclip.data.lines import read_lines
from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures
from ssmclip.data.testsets.files import from_file, picture_files
from ssmclip.data.testsets.prompts import names_on

YEAR = "VOCdevkit/VOC2007"
SIDES = ("xmin", "ymin", "xmax", "ymax")  # pixels from the upper left corner


class _Object(NamedTuple):
    """An object on a picture: its class, and the box around it, (left, upper, right, lower) in pixels."""

    label: int
    box: tuple[int, int, int, int]


@LAYOUTS.register("voc2007_objects")
def voc2007_objects(folder: Path, card: Card) -> Found | str:
    """VOCdevkit/VOC2007/{ImageSets/Main/CLASS_test.txt,Annotations/*.xml,JPEGImages/*.jpg}: each object cut out of its
    picture. Also trainval, train and val."""
    annotated = _annotated(folder, card)
    if isinstance(annotated, str):
        return annotated
    root, pictures, split = annotated
    cut = [(path, thing) for path, things in pictures for thing in things]
    paths = [path for path, _ in cut]
    boxes = [thing.box for _, thing in cut]
    return Found(
        where=str(root),
        pictures=Pictures(len(cut), partial(_cut_out, paths, boxes)),
        keys=[f"{path.name} {','.join(map(str, box))}" for path, box in zip(paths, boxes, strict=True)],
        labels=[thing.label for _, thing in cut],
        files=tuple(paths),
        split=split,
    )


@LAYOUTS.register("voc2007_pictures")
def voc2007_pictures(folder: Path, card: Card) -> Found | str:
    """The same files: whole pictures, with all classes that are on them, objects marked as difficult among them."""
    annotated = _annotated(folder, card)
    if isinstance(annotated, str):
        return annotated
    root, pictures, split = annotated
    paths = [path for path, _ in pictures]
    return Found(
        where=str(root),
        pictures=picture_files(paths),
        keys=[path.name for path in paths],
        answers=[tuple(sorted({thing.label for thing in things})) for _, things in pictures],
        files=tuple(paths),
        split=split,
    )


def _annotated(folder: Path, card: Card) -> tuple[Path, list[tuple[Path, list[_Object]]], str] | str:
    """Return the folder of the year, its pictures of a split that are there, each with its objects, and the split."""
    split, names = card.part or "test", names_on(card)
    listed = f"ImageSets/Main/{names[0]}_{split}.txt"
    places = (folder / YEAR, folder / "VOC2007", folder)
    root = next((place for place in places if (place / listed).is_file()), None)
    if root is None:
        return f"{YEAR}/{listed}"
    stems = [line.split()[0] for line in read_lines(root / listed) if line.strip()]
    paths = [root / "JPEGImages" / f"{stem}.jpg" for stem in stems]
    there = [path for path in paths if path.is_file()]
    if not there:
        raise ValueError(f"{root / listed} names {len(stems)} pictures and none of them is there")
    return root, [(path, _objects(root / "Annotations" / f"{path.stem}.xml", names)) for path in there], split


def _objects(file: Path, names: Sequence[str]) -> list[_Object]:
    """Return what a file of annotations lists. Raises ValueError for one that is damaged or lists another class."""
    try:
        tree = ElementTree.parse(file)
        return [_object(element, names) for element in tree.iterfind("object")]
    except (ElementTree.ParseError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{file} is no list of objects of the {len(names)} classes: {error}") from error


def _object(element: ElementTree.Element, names: Sequence[str]) -> _Object:
    left, upper, right, lower = (int(float(element.find(f"bndbox/{side}").text)) for side in SIDES)
    return _Object(list(names).index(element.find("name").text), (left, upper, right, lower))


def _cut_out(paths: Sequence[Path], boxes: Sequence[tuple[int, int, int, int]], index: int) -> Image.Image:
    return from_file(paths, index).crop(boxes[index])
