"""Test sets as CLIP_benchmark keeps them: webdatasets of pictures with a label or captions."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ssmclip.data.images import SUFFIXES, BadImage, is_litter, open_image
from ssmclip.data.lines import read_lines, split_lines
from ssmclip.data.tars import Member, index_samples
from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures
from ssmclip.data.testsets.prompts import names_on
from ssmclip.data.testsets.splits import spellings


@LAYOUTS.register("clip_benchmark_tars")
def clip_benchmark_tars(folder: Path, card: Card) -> Found | str:
    """`test/0.tar ...` with NAME.jpg and NAME.cls or NAME.txt (a caption a line), as CLIP_benchmark's webdatasets are.

    Beside test/ there may be classnames.txt, zeroshot_classification_templates.txt (with {c}) and dataset_type.txt.
    Other splits lie in train/ and val/; what is tested on is always in test/. NAME.npy holds, where there are several
    classes on a picture, a one for each; else the numbers that the card's `metadata` names, as in DataComp's.
    Raises ValueError for numbers that are missing or others.
    """
    split = card.part or "test"
    names = spellings(card.part) if card.part else ("test",)
    shards = next((found for name in names if (found := _shards(folder / name))), [])
    if not shards:
        return f"{split}/0.tar (CLIP_benchmark's webdataset)"
    declared = (_lines(folder / "dataset_type.txt") or ["classification"])[0]
    if declared != card.kind:
        return f"a {card.kind} webdataset ({split}/0.tar is there, but its dataset_type.txt says {declared!r})"
    own_names = tuple(_class_names(folder / "classnames.txt", card))
    templates = tuple(t.replace("{c}", "{}") for t in _lines(folder / "zeroshot_classification_templates.txt"))
    samples = [sample for shard in shards for sample in index_samples(shard).items()]
    keys = _distinct(samples)
    images = [_pick(key, files, SUFFIXES) for key, files in samples]
    pictures = Pictures(len(keys), partial(_from_member, keys, images))
    if card.kind == "retrieval":
        captions = [_captions(key, _pick(key, files, ("txt",))) for key, files in samples]
        return Found(str(folder), pictures, keys, captions=captions, files=tuple(shards), split=split)
    if card.kind == "multilabel":
        answers = [tuple(np.flatnonzero(_numbers(key, _pick(key, files, ("npy",)))).tolist()) for key, files in samples]
        found = Found(str(folder), pictures, keys, answers=answers, files=tuple(shards), split=split)
        return replace(found, classnames=own_names, templates=templates)
    labels = [_label(key, _pick(key, files, ("cls", "cls.txt"))) for key, files in samples]
    return Found(
        where=str(folder),
        pictures=pictures,
        keys=keys,
        labels=labels,
        classnames=own_names,
        templates=templates,
        groups=_groups(samples, card),
        files=tuple(shards),
        split=split,
    )


def _groups(samples: Sequence[tuple[str, dict[str, Member]]], card: Card) -> list[str] | None:
    """Return each picture's group, None where the card tells none apart or no picture has the numbers for it."""
    if not card.grouped_by or not any("npy" in files for _, files in samples):
        return None
    place = card.metadata.index(card.grouped_by)
    groups = []
    for key, files in samples:
        numbers = _numbers(key, _pick(key, files, ("npy",)))
        if len(numbers) != len(card.metadata):
            raise ValueError(
                f"{key} in {files['npy'].shard} must have {len(card.metadata)} numbers, {', '.join(card.metadata)} "
                f"(got {len(numbers)})"
            )
        groups.append(f"{card.grouped_by} {int(numbers[place])}")
    return groups


def _numbers(key: str, member: Member) -> np.ndarray:
    try:
        return np.load(io.BytesIO(member.read()), allow_pickle=False).reshape(-1)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"the numbers of {key} in {member.shard} are damaged: {error}") from error


def _class_names(path: Path, card: Card) -> list[str]:
    """Return a file's class names. An empty line is one where the card has such a class, as CLEVR's middle distance."""
    if "" not in names_on(card) or not path.is_file():
        return _lines(path)
    return [line.strip() for line in read_lines(path)]


def _distinct(samples: Sequence[tuple[str, dict[str, Member]]]) -> list[str]:
    """The samples' keys, with the shard's name before those that several shards have."""
    count = Counter(key for key, _ in samples)
    return [key if count[key] == 1 else f"{next(iter(files.values())).shard.stem}/{key}" for key, files in samples]


def _shards(folder: Path) -> list[Path]:
    count = folder / "nshards.txt"
    if not count.is_file():
        return sorted(
            (path for path in folder.glob("*.tar") if not is_litter(path.name)),
            key=lambda path: (len(path.name), path.name),
        )
    shards = [folder / f"{i}.tar" for i in range(int(count.read_text()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{count} says {len(shards)} shards, but {', '.join(missing[:5])} is not there")
    return shards


def _pick(key: str, files: dict[str, Member], suffixes: Sequence[str]) -> Member:
    for suffix in suffixes:
        if suffix in files:
            return files[suffix]
    shard = next(iter(files.values())).shard
    raise ValueError(f"{key} in {shard} has no .{suffixes[0]}; it has .{', .'.join(files)}")


def _captions(key: str, member: Member) -> list[str]:
    try:
        return [line for line in split_lines(member.read().decode("utf-8-sig")) if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"the captions of {key} in {member.shard} are not utf-8: {error}") from error


def _label(key: str, member: Member) -> int:
    text = member.read()
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the label of {key} in {member.shard} is not a number: {text[:20]!r}") from error


def _from_member(keys: list[str], images: list[Member], index: int) -> Image.Image:
    try:
        return open_image(images[index].read())
    except BadImage as error:
        raise BadImage(error.reason, f"{keys[index]} in {images[index].shard}: {error.detail}") from error


def _lines(path: Path) -> list[str]:
    lines = read_lines(path) if path.is_file() else []
    return [line.strip() for line in lines if line.strip()]
