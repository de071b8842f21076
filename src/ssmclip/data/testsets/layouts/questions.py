"""Test sets of pictures and texts to be matched, in the files their authors published."""

from __future__ import annotations

import ast
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures, Question
from ssmclip.data.testsets.files import from_file, read_json, read_records, read_rows
from ssmclip.data.testsets.layouts.captioned import PictureFiles
from ssmclip.data.testsets.prompts import plain

SUGAR_CREPE = ("add_obj", "add_att", "replace_obj", "replace_att", "replace_rel", "swap_obj", "swap_att")
ARO_FEW = 25  # questions on a pair of attributes, below which its authors leave it out of their mean
WINOGAVIL = ("winogavil_dataset.csv", "assets/winogavil_dataset.csv")
VL_CHECKLIST = ("Attribute", "Object", "Relation")
VL_FOLDERS = {
    "vg": "vg",
    "vaw": "vg",
    "hake": "hake",
    "swig": "swig",
}  # a file's name says whose pictures it asks about
FIRST = ((0, 0),)  # the first text belongs to the first picture, and the others to none

Box = tuple[int, int, int, int]


class _Asked(NamedTuple):
    """A question as its file gives it: names of pictures, and the part of each to be seen (None: all of it)."""

    key: str
    pictures: Sequence[str]
    texts: Sequence[Any]
    right: Iterable[tuple[int, int]]
    category: str = ""
    box: Box | None = None


@LAYOUTS.register("questions_jsonl")
def questions_jsonl(folder: Path, card: Card) -> Found | str:
    """questions.jsonl, for questions of one's own: {"image": "a.jpg", "texts": ["right", "wrong", ...]}.

    Or {"images": [...], "texts": [...]}, each text of the picture at its place; or, of one text and several pictures,
    with their places as "right". "category" and "id" may be left out. A published set's lie in a folder of its name.
    """
    file = folder / "questions.jsonl"
    named = card.own or plain(folder.name) in {plain(name) for name in (card.name, *card.aliases)}
    if not (named and file.is_file()):
        return f"{card.name}/{file.name}"
    return _found(file, folder, [_own_question(file, i, record) for i, record in enumerate(read_records(file), 1)])


def _own_question(file: Path, number: int, record: Mapping[str, Any]) -> _Asked:
    names = [record["image"]] if "image" in record else record.get("images")
    texts = record.get("texts")
    if not isinstance(names, list) or not isinstance(texts, list):
        raise ValueError(
            f"{file}, question {number} must have an image or images, and texts (its keys: {', '.join(record)})"
        )
    right = [(place, 0) for place in record["right"]] if "right" in record else [(i, i) for i in range(len(names))]
    return _Asked(str(record.get("id", number)), names, texts, right, str(record.get("category", "")))


@LAYOUTS.register("sugar_crepe_json")
def sugar_crepe_json(folder: Path, card: Card) -> Found | str:
    """[data/]{add_obj,add_att,replace_obj,...}.json of SugarCrepe or, with caption2, SugarCrepe++; val2017/*.jpg."""
    both = card.name == "sugar_crepe_pp"
    places = [folder, folder / "data"]
    files = next((found for place in places if (found := _files_of(place, SUGAR_CREPE))), [])
    read = [(file, _entries(file)) for file in files]
    if not read or any(("caption2" in entry) != both for _, entries in read for _, entry in entries[:1]):
        return f"{SUGAR_CREPE[2]}.json {'with' if both else 'without'} caption2"
    keys = ("caption", "caption2", "negative_caption") if both else ("caption", "negative_caption")
    right = [(0, place) for place in range(len(keys) - 1)]
    asked = [
        _Asked(f"{file.stem}/{number}", [_of(entry, "filename", file, number)], _texts(entry, keys), right, file.stem)
        for file, entries in read
        for number, entry in entries
    ]
    return _found(files[0].parent, folder, asked)


def _files_of(folder: Path, names: Iterable[str]) -> list[Path]:
    return [folder / f"{name}.json" for name in names if (folder / f"{name}.json").is_file()]


def _entries(file: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """Return the numbered objects of a list or an object. Raises ValueError for anything else."""
    content = read_json(file)
    numbered = content.items() if isinstance(content, dict) else enumerate(content if isinstance(content, list) else ())
    entries = [(str(number), entry) for number, entry in numbered]
    if not entries or not all(isinstance(entry, dict) for _, entry in entries):
        raise ValueError(f"{file} must be a list, or an object, of objects with a caption each")
    return entries


@LAYOUTS.register("winoground_jsonl")
def winoground_jsonl(folder: Path, card: Card) -> Found | str:
    """[data/]examples.jsonl: id, image_0, image_1, caption_0, caption_1, collapsed_tag; images/ex_0_img_0.png ..."""
    file = next(
        (folder / name for name in ("examples.jsonl", "data/examples.jsonl") if (folder / name).is_file()), None
    )
    if file is None:
        return "[data/]examples.jsonl"
    asked = []
    for number, record in enumerate(read_records(file)):
        names = [_of(record, key, file, str(number)) for key in ("image_0", "image_1")]
        texts = _texts(record, ("caption_0", "caption_1"))
        category = str(record.get("collapsed_tag", ""))
        asked.append(_Asked(str(record.get("id", number)), names, texts, [(0, 0), (1, 1)], category))
    return _found(file, folder, asked)


@LAYOUTS.register("aro_json")
def aro_json(folder: Path, card: Card) -> Found | str:
    """visual_genome_relation.json or visual_genome_attribution.json, of which pictures are cut; images/*.jpg."""
    about = card.name.removeprefix("aro_")
    file = folder / f"visual_genome_{about}.json"
    if not file.is_file():
        return file.name
    entries = _entries(file)
    named = [_aro_category(entry) for _, entry in entries]
    count = Counter(named)
    few = ARO_FEW if about == "attribution" else 1
    asked = []
    for (number, entry), name in zip(entries, named, strict=True):
        left, upper, width, height = (int(_of(entry, f"bbox_{side}", file, number)) for side in "xywh")
        box = (left, upper, left + width, upper + height)
        texts = _texts(entry, ("true_caption", "false_caption"))
        category = name if count[name] >= few else ""
        asked.append(_Asked(number, [_of(entry, "image_path", file, number)], texts, FIRST, category, box))
    return _found(file, folder, asked)


def _aro_category(entry: Mapping[str, Any]) -> str:
    return str(entry.get("relation_name") or "_".join(map(str, entry.get("attributes", ()))))


@LAYOUTS.register("vl_checklist_json")
def vl_checklist_json(folder: Path, card: Card) -> Found | str:
    """[data/]{Attribute,Object,Relation}/**.json: [picture, {"POS": [text], "NEG": [text]}]; vg/, hake/ and swig/."""
    root = next((place for place in (folder, folder / "data") if (place / "Attribute").is_dir()), None)
    if root is None:
        return "[data/]Attribute/*/*.json"
    files = sorted(file for aspect in VL_CHECKLIST for file in (root / aspect).rglob("*.json"))
    asked = [question for file in files for question in _vl_questions(file, file.relative_to(root))]
    return _found(root, folder, asked)


def _vl_questions(file: Path, name: Path) -> Iterator[_Asked]:
    words = "_".join(name.with_suffix("").parts).split("_")
    pictures = next((VL_FOLDERS[word] for word in words if word in VL_FOLDERS), "")
    category = f"{name.parts[0]}/{name.parts[1] if name.parts[0] == 'Object' else name.stem.split('_')[-1]}"
    for number, entry in enumerate(read_json(file)):
        key = f"{name.with_suffix('').as_posix()}/{number}"
        try:
            picture, texts = entry
            pair = [texts["POS"][0], texts["NEG"][0]]
        except (TypeError, ValueError, KeyError, IndexError) as error:
            raise ValueError(f"{file}, entry {number} must be [picture, {{POS: [text], NEG: [text]}}]") from error
        yield _Asked(key, [f"{pictures}/{picture}" if pictures else picture], pair, FIRST, category)


@LAYOUTS.register("winogavil_csv")
def winogavil_csv(folder: Path, card: Card) -> Found | str:
    """[assets/]winogavil_dataset.csv (candidates, cue, associations) and the candidates' pictures, NAME.jpg.

    The cue is put as "A bald" or "An eagle", as its authors and DataComp put it. Categories are of the number of
    candidates: 5-6, and 10-12.
    """
    file = next((folder / name for name in WINOGAVIL if (folder / name).is_file()), None)
    if file is None:
        return WINOGAVIL[0]
    asked = []
    for number, row in enumerate(read_rows(file)):
        candidates = _words(_of(row, "candidates", file, str(number)), file, number)
        right = _words(_of(row, "associations", file, str(number)), file, number)
        if strangers := sorted(set(right) - set(candidates)):
            raise ValueError(f"{file}, row {number}: {strangers[0]!r} is associated, and is no candidate")
        pairs = [(place, 0) for place, name in enumerate(candidates) if name in right]
        category = "5-6 candidates" if len(candidates) <= 6 else "10-12 candidates"
        names = [f"{name}.jpg" for name in candidates]
        cue = _cue(_of(row, "cue", file, str(number)))
        asked.append(_Asked(str(row.get("ID") or number), names, [cue], pairs, category))
    return _found(file, folder, asked)


def _words(text: str, file: Path, number: int) -> list[str]:
    """Return a list of words, written as in JSON or as in Python."""
    for read in (json.loads, ast.literal_eval):
        try:
            words = read(text)
        except (ValueError, SyntaxError):
            continue
        if isinstance(words, list) and all(isinstance(word, str) for word in words):
            return words
    raise ValueError(f"{file}, row {number} must have a list of words (got {text[:40]!r})")


def _cue(word: str) -> str:
    """
    >>> _cue("Eagle"), _cue("west")
    ('An eagle', 'A west')
    """
    word = word.lower()
    return f"{'An' if word[:1] in tuple('aeiou') else 'A'} {word}"


def _of(entry: Mapping[str, Any], key: str, file: Path, number: str) -> Any:
    if entry.get(key) in (None, ""):
        raise ValueError(f"{file}: question {number} has no {key}")
    return entry[key]


def _texts(entry: Mapping[str, Any], keys: Iterable[str]) -> list[Any]:
    return [entry.get(key) for key in keys]


def _found(where: Path, folder: Path, asked: Sequence[_Asked]) -> Found | str:
    """Return the questions whose pictures are all there. Raises ValueError for one that lacks a text."""
    for question in asked:
        for place, text in enumerate(question.texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(
                    f"{where}: question {question.key} lacks half of a pair: its text {place + 1} of "
                    f"{len(question.texts)} is {text!r}"
                )
    files = PictureFiles(folder, dict.fromkeys(str(name) for question in asked for name in question.pictures))
    places: dict[tuple[Path, Box | None], int] = {}
    questions = []
    for question in asked:
        paths = [files.find(str(name)) for name in question.pictures]
        if None in paths:
            continue
        shown = tuple(places.setdefault((path, question.box), len(places)) for path in paths if path)
        texts = tuple(text.strip() for text in question.texts)
        questions.append(Question(question.key, shown, texts, tuple(question.right), question.category))
    if not questions:
        return f"the pictures of {where}, which is there"
    missing = len(asked) - len(questions)
    paths, boxes = [path for path, _ in places], [box for _, box in places]
    return Found(
        where=str(where),
        pictures=Pictures(len(paths), partial(_seen, paths, boxes)),
        keys=[_key(os.path.relpath(path, folder), box) for path, box in places],
        files=tuple(paths),
        questions=questions,
        said=f"{missing:,} of {len(asked):,} questions are left out: their pictures are not there" if missing else "",
    )


def _key(name: str, box: Box | None) -> str:
    return f"{name} {','.join(map(str, box))}" if box else name


def _seen(paths: Sequence[Path], boxes: Sequence[Box | None], index: int) -> Image.Image:
    picture, box = from_file(paths, index), boxes[index]
    return picture.crop(box) if box else picture
