"""Captioned test sets in the files their authors published."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ssmclip.data.images import SUFFIXES
from ssmclip.data.lines import read_lines
from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures
from ssmclip.data.testsets.layouts.folders import from_file

DESCRIPTIONS = ("IIW", "IIW-P5B", "caption", "description", "extra_caption", "text")  # of these the first a record has

_PICTURE = re.compile(rf"\.({'|'.join(SUFFIXES)})\"?$", re.IGNORECASE)


@LAYOUTS.register("coco_json")
def coco_json(folder: Path, card: Card) -> Found | str:
    """annotations/captions_val2017.json, coco_test_karpathy.json or nocaps_val_4500_captions.json, in COCO's form.

    The pictures lie in val2017/, val2014/, images/ ... or beside the file.
    """
    patterns = {
        "coco_karpathy": ["coco_test_karpathy.json"],
        "nocaps": ["nocaps_val_4500_captions.json", "nocaps_val*.json"],
    }.get(card.name, ["captions_val2017.json"])
    file = _first(folder, [f"{below}{name}" for below in ("", "annotations/") for name in patterns])
    if file is None:
        return f"[annotations/]{patterns[0]}"
    content = _json(file)
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    pairs = [(image["file_name"], captions.get(image["id"], [])) for image in content["images"]]
    return _found(file, folder, pairs)


@LAYOUTS.register("karpathy_json")
def karpathy_json(folder: Path, card: Card) -> Found | str:
    """dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json: of Karpathy's splits, the card's."""
    name = {"coco_karpathy": "dataset_coco.json"}.get(card.name, f"dataset_{card.name}.json")
    file = _first(folder, [name])
    if file is None:
        return name
    images = [image for image in _json(file)["images"] if image["split"] == card.split]
    pairs = [
        (str(Path(image.get("filepath", "")) / image["filename"]), [said["raw"].strip() for said in image["sentences"]])
        for image in images
    ]
    return _found(file, folder, pairs)


@LAYOUTS.register("caption_list")
def caption_list(folder: Path, card: Card) -> Found | str:
    """flickr30k_test_karpathy.txt (a csv: image,caption), captions.txt, results_20130124.token (name#0<tab>caption).

    The last two list all images of the data set: without a list of the test images all are taken.
    """
    names = [f"{card.name}_{card.split}_karpathy.txt", "captions.txt", "results_20130124.token"]
    file = _first(folder, names)
    if file is None:
        return " or ".join(names)
    captions: dict[str, list[str]] = {}
    for name, caption in _listed(file):
        captions.setdefault(name.split("#")[0].strip(), []).append(caption.strip())
    return _found(file, folder, captions.items())


def _listed(file: Path) -> Iterator[tuple[str, str]]:
    """Yield the picture's name and the caption on each line. A caption may have separators in it, quoted or not.

    A quote never reaches over lines, as it would in a csv: these lists have a caption a line, and in some of them
    quotes are the captions' own. Raises ValueError naming the line that is none of a name and a caption, and the one
    whose caption seems to go on in the next.
    """
    separator = "\t" if file.suffix == ".token" else ","
    lines = [(number, line) for number, line in enumerate(read_lines(file), start=1) if line.strip()]
    for (number, line), (_, following) in zip(lines, [*lines[1:], (0, "")], strict=True):
        name, between, caption = line.partition(separator)
        if not between:
            raise ValueError(f"{file}, line {number} must be picture{separator}caption (got {line[:60]!r})")
        if separator == "\t":
            yield name, caption
        elif (name, caption) != ("image", "caption"):
            is_open = caption.startswith('"') and caption.count('"') % 2 == 1
            if is_open and following and not _PICTURE.search(following.partition(separator)[0]):
                raise ValueError(f"{file}, line {number}: a quote opens a caption and is not closed on the same line")
            yield name.strip('"'), _unquoted(caption)


def _unquoted(value: str) -> str:
    return value[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', value) else value


@LAYOUTS.register("records_jsonl")
def records_jsonl(folder: Path, card: Card) -> Found | str:
    """data.jsonl of ImageInWords or docci_descriptions.jsonlines: a record for each image, pictures in images/.

    Records of another split are left out, where they say theirs.
    """
    file = _first(folder, ["data.jsonl", "docci_descriptions.jsonlines", "metadata.jsonl"])
    if file is None:
        return "data.jsonl or docci_descriptions.jsonlines"
    pairs = []
    for number, line in enumerate(read_lines(file), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
        text = next((record[key] for key in DESCRIPTIONS if record.get(key)), None)
        name = next((record[key] for key in ("image_file", "file_name", "image/key", "image") if key in record), None)
        if text is None or name is None:
            raise ValueError(f"{file}: a record has no image or no description; its keys are {', '.join(record)}")
        if record.get("split", card.split) == card.split:
            pairs.append((str(name), [text.strip()]))
    return _found(file, folder, pairs)


@LAYOUTS.register("dci_json")
def dci_json(folder: Path, card: Card) -> Found | str:
    """Densely Captioned Images: annotations/*.json (image, short_caption, extra_caption), photos/*.jpg; splits.json.

    The long caption is the short one and the extra one.
    """
    files = sorted((folder / "annotations").glob("*.json"))
    files = [file for file in files if file.name.split("_")[0].isdigit() or file.stem.isdigit()]
    if not files:
        return "annotations/NUMBER.json"
    pairs = []
    for file in files:
        record = _json(file)
        pairs.append((record["image"], [f"{record.get('short_caption', '')} {record['extra_caption']}".strip()]))
    if (folder / "splits.json").is_file():
        tested = _json(folder / "splits.json")[card.split]
        names = {name for entry in tested for name in ([entry] if isinstance(entry, str) else entry.values())}
        pairs = [pair for pair, file in zip(pairs, files, strict=True) if {pair[0], file.stem, file.name} & names]
    return _found(folder / "annotations", folder, pairs)


@LAYOUTS.register("image_and_text_folders")
def image_and_text_folders(folder: Path, card: Card) -> Found | str:
    """image/NAME.jpg and caption/NAME.txt, as Urban1k is laid out; in the folder or Urban1k/."""
    root = next((p for p in (folder, folder / "Urban1k") if (p / "image").is_dir() and (p / "caption").is_dir()), None)
    if root is None:
        return "image/ and caption/"
    texts = {path.stem: path for path in (root / "caption").glob("*.txt")}
    pairs = [
        (f"image/{path.name}", [texts[path.stem].read_text(encoding="utf-8").strip()])
        for path in sorted((root / "image").iterdir(), key=lambda path: (len(path.stem), path.stem))
        if path.suffix.lower().lstrip(".") in SUFFIXES and path.stem in texts
    ]
    return _found(root, root, pairs)


def _found(where: Path, folder: Path, pairs: Iterable[tuple[str, list[str]]]) -> Found | str:
    """Pictures by name, wherever below the folder they lie; those without a file or a caption are left out."""
    pairs = [(name, captions) for name, captions in pairs if captions]
    places = _index(folder)
    kept = [(path, captions) for name, captions in pairs if (path := _lookup(places, folder, name)) is not None]
    if not kept:
        return f"the pictures of {where}, which is there"
    paths = [path for path, _ in kept]
    missing = len(pairs) - len(kept)
    return Found(
        where=str(where),
        pictures=Pictures(len(paths), partial(from_file, paths)),
        keys=[str(path.relative_to(folder)) for path in paths],
        captions=[captions for _, captions in kept],
        files=tuple(paths),
        said=f"{missing} of {len(pairs)} described pictures are not there" if missing else "",
    )


def _index(folder: Path) -> dict[str, Path]:
    """Picture files below a folder by name, and by stem where that tells them apart."""
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower().lstrip(".") in SUFFIXES)
    by_stem: dict[str, list[Path]] = {}
    for path in files:
        by_stem.setdefault(path.stem, []).append(path)
    stems = {stem: paths[0] for stem, paths in by_stem.items() if len(paths) == 1}
    return stems | {path.name: path for path in files}


def _lookup(places: dict[str, Path], folder: Path, name: str) -> Path | None:
    whole = folder / name
    return whole if whole.is_file() else places.get(Path(name).name)


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((path for name in names for path in sorted(folder.glob(name)) if path.is_file()), None)


def _json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
