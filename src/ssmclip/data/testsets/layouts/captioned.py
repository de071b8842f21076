"""Captioned test sets in the files their authors published."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from ssmclip.data.images import SUFFIXES, is_litter, pictures_below
from ssmclip.data.lines import read_lines
from ssmclip.data.testsets.card import LAYOUTS, Card, Found
from ssmclip.data.testsets.files import picture_files, read_json, read_records
from ssmclip.data.testsets.splits import choose_split

DESCRIPTIONS = ("IIW", "IIW-P5B", "caption", "description", "extra_caption", "text")  # of these the first a record has
IMAGES = ("image_file", "file_name", "image/key", "image")

_PICTURE = re.compile(rf"\.({'|'.join(SUFFIXES)})\"?$", re.IGNORECASE)

Described = tuple[str, list[str]]  # the name of a picture, as a file gives it, and its captions


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
    content = read_json(file)
    captions: dict[Any, list[str]] = {}
    for annotation in content["annotations"]:
        captions.setdefault(annotation["image_id"], []).append(annotation["caption"].strip())
    return _found(file, folder, [(image["file_name"], captions.get(image["id"], [])) for image in content["images"]])


@LAYOUTS.register("karpathy_json")
def karpathy_json(folder: Path, card: Card) -> Found | str:
    """dataset_coco.json, dataset_flickr30k.json, dataset_flickr8k.json: of Karpathy's splits, the card's."""
    name = {"coco_karpathy": "dataset_coco.json"}.get(card.name, f"dataset_{card.name}.json")
    file = _first(folder, [name])
    if file is None:
        return name
    images = read_json(file)["images"]
    names = [str(PurePosixPath(image.get("filepath", "")) / image["filename"]) for image in images]
    pairs = [
        (name, [said["raw"].strip() for said in image["sentences"]])
        for name, image in zip(names, images, strict=True)
        if image["split"] == card.split
    ]
    return _found(file, folder, pairs, names=names)


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
    """data.jsonl of ImageInWords or docci_descriptions.jsonlines: records of pictures, which lie in images/.

    Records of another split are left out, where they say theirs; several of one picture are its captions.
    """
    file = _first(folder, ["data.jsonl", "docci_descriptions.jsonlines", "metadata.jsonl"])
    if file is None:
        return "data.jsonl or docci_descriptions.jsonlines"
    pairs, splits = [], []
    for record in read_records(file):
        text = next((record[key] for key in DESCRIPTIONS if record.get(key)), None)
        name = next((record[key] for key in IMAGES if key in record), None)
        if text is None or name is None:
            raise ValueError(f"{file}: a record has no image or no description; its keys are {', '.join(record)}")
        pairs.append((str(name), [str(text).strip()]))
        splits.append(str(record.get("split", card.split)).lower())
    split, note = choose_split(card.split, set(splits))
    kept = [pair for pair, own in zip(pairs, splits, strict=True) if own == split]
    return _found(file, folder, kept, names=[name for name, _ in pairs], note=note)


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
        record = read_json(file)
        if missing := {"image", "extra_caption"} - set(record):
            raise ValueError(f"{file} has no {' and no '.join(sorted(missing))}; its keys are {', '.join(record)}")
        pairs.append((record["image"], [f"{record.get('short_caption', '')} {record['extra_caption']}".strip()]))
    kept, note = pairs, ""
    if (folder / "splits.json").is_file():
        listed = read_json(folder / "splits.json")
        split, note = choose_split(card.split, listed)
        if not split:
            raise ValueError(f"{folder / 'splits.json'} has no {card.split}; it has {', '.join(listed)}")
        names = {name for entry in listed[split] for name in ([entry] if isinstance(entry, str) else entry.values())}
        kept = [pair for pair, file in zip(pairs, files, strict=True) if {pair[0], file.stem, file.name} & names]
    return _found(folder / "annotations", folder, kept, names=[name for name, _ in pairs], note=note)


@LAYOUTS.register("image_and_text_folders")
def image_and_text_folders(folder: Path, card: Card) -> Found | str:
    """image/NAME.jpg and caption/NAME.txt, as Urban1k is laid out; in the folder or Urban1k/."""
    root = next((p for p in (folder, folder / "Urban1k") if (p / "image").is_dir() and (p / "caption").is_dir()), None)
    if root is None:
        return "image/ and caption/"
    texts = {path.stem: path for path in (root / "caption").glob("*.txt") if not is_litter(path.name)}
    pictures = [path for path in pictures_below(root / "image") if path.parent == root / "image" and path.stem in texts]
    shared = {path.stem: path for path in pictures}
    if twice := [path for path in pictures if shared[path.stem] != path]:
        raise ValueError(f"{twice[0]} and {shared[twice[0].stem]} share the caption {texts[twice[0].stem]}: remove one")
    pictures.sort(key=lambda path: (len(path.stem), path.stem))
    pairs = [(f"image/{path.name}", [texts[path.stem].read_bytes().decode("utf-8-sig").strip()]) for path in pictures]
    return _found(root, root, pairs)


def _found(
    where: Path, folder: Path, pairs: Iterable[Described], *, names: Sequence[str] = (), note: str = ""
) -> Found | str:
    """Pictures by name, wherever below the folder they lie; those without a file or a caption are left out.

    names: of all pictures that are described, where `pairs` are a part of them; note: what a reader must know.
    Raises ValueError for a name that several files have.
    """
    pairs = [(name, captions) for name, captions in pairs if captions]
    files = PictureFiles(folder, [*names, *(name for name, _ in pairs)])
    captions_of: dict[Path, list[str]] = {}
    missing = 0
    for name, captions in pairs:
        path = files.find(name)
        missing += path is None
        if path is not None:
            captions_of.setdefault(path, []).extend(captions)
    if not captions_of:
        return f"the pictures of {where}, which is there"
    left_out = f"{missing} of {len(pairs)} described pictures are not there" if missing else ""
    return Found(
        where=str(where),
        pictures=picture_files(list(captions_of)),
        keys=[os.path.relpath(path, folder) for path in captions_of],
        captions=list(captions_of.values()),
        files=tuple(captions_of),
        said="; ".join(filter(None, (note, left_out))),
    )


class PictureFiles:
    """Picture files by the names that a file of captions gives them.

    A name is a path: below the folder, or below one that is not in the name (images/, val2014/). A file is that of the
    longest name its path ends with. Where a copy has left out the name's own folders, its last part serves, if it is
    the only one of all the names.
    """

    def __init__(self, folder: Path, names: Iterable[str]):
        self.folder = folder
        known = {_path(name).parts for name in names}
        self.names_of = Counter(name[-1] for name in known)  # how many names end in this part
        self.folders = {part for name in known for part in name[:-1]}
        self.by_name: dict[tuple[str, ...], list[Path]] = {}
        self.by_last: dict[str, list[Path]] = {}
        for path in pictures_below(folder):
            ends = _ends(path.relative_to(folder))
            for last in (path.name, path.stem):
                self.by_last.setdefault(last, []).append(path)
            if name := next((end for end in ends if end in known), None):
                self.by_name.setdefault(name, []).append(path)

    def find(self, name: str) -> Path | None:
        """Return the file of that name, None where there is none. Raises ValueError where it may be any of several."""
        path = _path(name)
        if not path.is_absolute() and (whole := self.folder / path).is_file():
            return whole
        found = self.by_name.get(path.parts, [])
        if not found and self.names_of[path.name] == 1:
            last = self.by_last.get(path.name, [])
            found = [file for file in last if not self.folders & set(file.relative_to(self.folder).parts[:-1])]
        if len(found) > 1 and not _same(found):
            shown = " and ".join(str(file) for file in found[:2])
            raise ValueError(
                f"{name} may be {shown}: {len(found)} different pictures in {self.folder} have this name. Leave the "
                "one that is described, or move the others elsewhere"
            )
        return found[0] if found else None


def _ends(path: Path) -> Iterator[tuple[str, ...]]:
    """Yield the ends of a path, longest first, each with the file's suffix and without."""
    for start in range(len(path.parts)):
        yield path.parts[start:]
        yield (*path.parts[start:-1], path.stem)


def _path(name: str) -> PurePosixPath:
    """
    >>> _path("./a\\\\b.png")
    PurePosixPath('a/b.png')
    """
    return PurePosixPath(name.replace("\\", "/"))


def _same(files: Sequence[Path]) -> bool:
    """Whether all are copies of one file."""
    if len({file.stat().st_size for file in files}) > 1:
        return False
    first = files[0].read_bytes()
    return all(file.read_bytes() == first for file in files[1:])


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((path for name in names for path in sorted(folder.glob(name)) if path.is_file()), None)
