"""The forms in which test sets lie on disks: embedded, arrays, class folders, CLIP_benchmark's shards.

Others are in `originals.py`, `parquet.py` and `captioned.py`.
"""

from __future__ import annotations

import gzip
import pickle
import zlib
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ssmclip.data import synthetic
from ssmclip.data.delimited import read_table
from ssmclip.data.images import SUFFIXES, BadImage, open_image
from ssmclip.data.lines import read_lines, split_lines
from ssmclip.data.tars import Member, index_samples
from ssmclip.data.testsets.card import LAYOUTS, SORTED, Card, Found, Pictures
from ssmclip.data.testsets.prompts import folders_on, names_on, plain, spoken

# ---- embedded --------------------------------------------------------------------------------------------------------


@LAYOUTS.register("embedded_digits")
def embedded_digits(folder: Path, card: Card) -> Found:
    """synthetic.digits("test"), wherever."""
    return _embedded("scikit-learn's digits", synthetic.digits("test"))


@LAYOUTS.register("embedded_scenes")
def embedded_scenes(folder: Path, card: Card) -> Found:
    """synthetic.scenes("test"), wherever."""
    return _embedded("drawn scenes", synthetic.scenes("test"))


def _embedded(where: str, items: list[synthetic.Item]) -> Found:
    pictures = Pictures(len(items), partial(_draw, items))
    return Found(where, pictures, [item.key for item in items], labels=[item.label for item in items])


def _draw(items: list[synthetic.Item], index: int) -> Image.Image:
    return items[index].draw(synthetic.NATIVE_SIZE)


# ---- torchvision's formats -------------------------------------------------------------------------------------------


class _ArraysOnly(pickle.Unpickler):
    """Unpickles containers, numbers, strings and NumPy arrays. Anything else could run code, and is refused."""

    ALLOWED = frozenset(
        [("_codecs", "encode"), ("numpy", "ndarray"), ("numpy", "dtype")]
        + [(f"numpy.{core}.multiarray", "_reconstruct") for core in ("core", "_core")]
    )

    def find_class(self, module: str, name: str):
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, and only arrays are allowed")
        module = module.replace("numpy.core", "numpy._core")  # the old name warns
        return super().find_class(module, name)


@LAYOUTS.register("cifar_pickles")
def cifar_pickles(folder: Path, card: Card) -> Found | str:
    """The original Python pickles, `cifar-10-batches-py/test_batch` or `cifar-100-python/test`, whole or cut."""
    name = {"cifar100": "cifar-100-python/test"}.get(card.name, "cifar-10-batches-py/test_batch")
    path = folder / name
    if not path.is_file():
        return name
    try:
        with path.open("rb") as file:
            batch = {_text(key): value for key, value in _ArraysOnly(file, encoding="latin1").load().items()}
        pixels = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [int(label) for label in batch["fine_labels" if "fine_labels" in batch else "labels"]]
        keys = [_text(name) for name in batch.get("filenames", range(len(labels)))]
        if not len(pixels) == len(labels) == len(keys):
            raise ValueError(f"{len(pixels)} images, {len(labels)} labels and {len(keys)} file names")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is not a CIFAR batch: {type(error).__name__}: {error}") from error
    return Found(str(path), Pictures(len(labels), partial(_from_array, pixels)), keys, labels=labels, files=(path,))


def _text(value: object) -> str:
    """Strings that were pickled again by Python 3 are bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


@LAYOUTS.register("idx_files")
def idx_files(folder: Path, card: Card) -> Found | str:
    """MNIST's format: t10k-images-idx3-ubyte and its labels, gzipped or not, in the folder, raw/ or NAME/raw/."""
    stem = "t10k-images-idx3-ubyte"
    names = {plain(name) for name in (card.name, *card.aliases)}  # MNIST and Fashion-MNIST differ in nothing else
    places = [folder, folder / "raw", *(p for p in sorted(folder.glob("*/raw")) if plain(p.parent.name) in names)]
    found = [place / name for place in places for name in (stem, stem + ".gz") if (place / name).is_file()]
    if not found:
        return f"{stem}[.gz] in it, raw/ or */raw/"
    images = _read_idx(found[0], 3)
    labels = _read_idx(found[0].with_name(found[0].name.replace("images-idx3", "labels-idx1")), 1)
    if len(images) != len(labels):
        raise ValueError(f"{found[0]} holds {len(images)} images, the file beside it {len(labels)} labels")
    keys = [str(i) for i in range(len(labels))]
    pictures = Pictures(len(keys), partial(_from_array, images))
    return Found(str(found[0]), pictures, keys, labels=labels.tolist(), files=(found[0],))


def _read_idx(path: Path, dimensions: int) -> np.ndarray:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    header = 4 * (1 + dimensions)
    if content[:4] != bytes([0, 0, 8, dimensions]) or len(content) < header:
        raise ValueError(f"{path} is not an idx file of bytes with {dimensions} dimensions")
    shape = np.frombuffer(content[4:header], ">u4").astype(int)
    if len(content) - header != shape.prod():
        raise ValueError(f"{path} should hold {shape.prod()} bytes of data and holds {len(content) - header}")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


def _from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index]).convert("RGB")


# ---- class folders ---------------------------------------------------------------------------------------------------


@LAYOUTS.register("class_folders")
def class_folders(folder: Path, card: Card) -> Found | str:
    """test/CLASS/picture.jpg, or SPLIT/, val/ or CLASS/ alone. Case and punctuation of folder names don't matter.

    Folders are known by the card's `folders` or class names; a card with neither takes the names of all there are.
    A file groups.csv (file,group) beside them gives each picture's group.
    Raises ValueError for folders without a class, two of one class, and folders without a picture.
    """
    known = _known_folders(card)
    for place in dict.fromkeys((folder / card.split, folder / "test", folder / "val", folder / "valid", folder)):
        folders = sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
        if any(plain(spoken(path.name)) in known for path in folders) or (folders and not known and _own(place, card)):
            break
    else:
        return f"{card.split}/CLASS/, val/CLASS/ or CLASS/ with pictures"
    there = sum(plain(spoken(path.name)) in known for path in folders)
    if known and not _own(place, card) and (2 * there < len(folders) or _shares_folders(card)):
        return f"class folders of its own (those in {place} may be another set's)"
    known = known or _all_of(place, folders, card)
    paths, labels = _walk(place, folders, known, card)
    keys = [str(path.relative_to(place)) for path in paths]
    return Found(
        where=str(place),
        pictures=Pictures(len(keys), partial(from_file, paths)),
        keys=keys,
        labels=labels,
        classnames=() if names_on(card) else tuple(spoken(path.name) for path in folders),
        groups=_groups(place, folder, keys),
        files=tuple(paths),
    )


def _known_folders(card: Card) -> dict[str, int]:
    """Class folder, plain -> label; empty when the card names none."""
    names = folders_on(card) or (() if card.folders == SORTED else names_on(card))
    return {plain(spoken(name)): label for label, name in enumerate(names)}


def _own(place: Path, card: Card) -> bool:
    """Whether folders of any names are classes here: below a folder that is called like the data set, or so split."""
    names = {plain(name) for name in (card.name, *card.aliases)}
    return plain(place.name) in names or plain(place.parent.name) in names


def _shares_folders(card: Card) -> bool:
    """Whether its class folders are called as ImageNet's are, all of them."""
    return isinstance(card.folders, str) and card.folders.startswith("timm:") and card.name != "imagenet"


def _all_of(place: Path, folders: list[Path], card: Card) -> dict[str, int]:
    """The folders in their own order: of numbers by size, of names by letter."""
    if all(path.name.isdecimal() for path in folders):
        folders = sorted(folders, key=lambda path: int(path.name))
    names = names_on(card)
    if names and len(names) != len(folders):
        raise ValueError(
            f"{place} has {len(folders)} class folders and {card.name} has {len(names)} classes: which folder is which "
            "class shows only when all are there"
        )
    return {plain(spoken(path.name)): label for label, path in enumerate(folders)}


def _walk(place: Path, folders: list[Path], known: dict[str, int], card: Card) -> tuple[list[Path], list[int]]:
    if strangers := [path.name for path in folders if plain(spoken(path.name)) not in known]:
        names = folders_on(card) or names_on(card)
        raise ValueError(f"{place} has folders that are no class: {_few(strangers)}. Classes: {_few(names)}")
    paths: list[Path] = []
    labels: list[int] = []
    seen: dict[int, str] = {}
    for path in folders:
        label = known[plain(spoken(path.name))]
        if label in seen:
            raise ValueError(f"{place}: {seen[label]} and {path.name} are the same class")
        seen[label] = path.name
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in SUFFIXES)
        if not pictures:
            raise ValueError(f"the class folder {path} has no picture")
        paths += pictures
        labels += [label] * len(pictures)
    return paths, labels


def _few(names: Sequence[str], count: int = 5) -> str:
    return ", ".join(names[:count]) + (f" and {len(names) - count} more" if len(names) > count else "")


def _groups(place: Path, folder: Path, keys: list[str]) -> list[str] | None:
    """The groups of groups.csv (columns file and group), None without it. Raises ValueError for pictures it lacks."""
    table = next((path / "groups.csv" for path in (place, folder) if (path / "groups.csv").is_file()), None)
    if table is None:
        return None
    rows = _table(table)
    if not {"file", "group"} <= set(rows[0]):
        raise ValueError(f"{table} must have the columns file and group; it has {', '.join(rows[0])}")
    group = {row["file"]: row["group"] for row in rows}
    if missing := [key for key in keys if key not in group]:
        raise ValueError(f"{table} has no group for {len(missing)} pictures; the first: {missing[0]}")
    return [group[key] for key in keys]


@LAYOUTS.register("metadata_csv")
def metadata_csv(folder: Path, card: Card) -> Found | str:
    """metadata.csv with a row for each picture, as Waterbirds has: img_filename, y, split (2: test), place.

    Also file_name, label and "test". The group of a picture is its column `group`, else its label and `place`.
    """
    table = folder / "metadata.csv"
    if not table.is_file():
        return "metadata.csv"
    rows = _table(table)
    name = next((known for known in ("img_filename", "file_name", "filename", "path") if known in rows[0]), "")
    label = next((known for known in ("y", "label", "target") if known in rows[0]), "")
    if not name or not label:
        has = ", ".join(rows[0])
        raise ValueError(f"{table} needs a column img_filename or file_name, and y or label; it has {has}")
    rows = [row for row in rows if row.get("split", card.split) in (card.split, "2")]
    names = {plain(known): str(i) for i, known in enumerate(names_on(card))}
    try:
        labels = [int(names.get(plain(row[label]), row[label])) for row in rows]
    except ValueError as error:
        raise ValueError(f"{table}: a {label} is neither a number nor a class of {card.name}: {error}") from error
    paths = [folder / row[name] for row in rows]
    groups = [row.get("group") or (f"{row[label]}, {row['place']}" if "place" in row else "") for row in rows]
    return Found(
        where=str(table),
        pictures=Pictures(len(paths), partial(from_file, paths)),
        keys=[row[name] for row in rows],
        labels=labels,
        groups=groups if all(groups) else None,
        files=tuple(paths),
    )


def _table(path: Path) -> list[dict[str, str]]:
    rows = read_table(path)
    if not rows:
        raise ValueError(f"{path} has no rows")
    return rows


def from_file(paths: Sequence[Path], index: int) -> Image.Image:
    """Picture `index`, opened; what is wrong with it is said with its path."""
    try:
        return open_image(paths[index])
    except BadImage as error:
        raise BadImage(error.reason, f"{paths[index]}: {error.detail}") from error


# ---- CLIP_benchmark's shards -----------------------------------------------------------------------------------------


@LAYOUTS.register("clip_benchmark_tars")
def clip_benchmark_tars(folder: Path, card: Card) -> Found | str:
    """`test/0.tar ...` with NAME.jpg and NAME.cls or NAME.txt (a caption a line), as CLIP_benchmark's webdatasets are.

    Beside test/ there may be classnames.txt, zeroshot_classification_templates.txt (with {c}) and dataset_type.txt.
    """
    shards = _shards(folder / "test")
    if not shards:
        return "test/0.tar (CLIP_benchmark's webdataset)"
    declared = (_lines(folder / "dataset_type.txt") or ["classification"])[0]
    if declared != card.kind:
        return f"a {card.kind} webdataset (test/0.tar is there, but its dataset_type.txt says {declared!r})"
    own_names = tuple(_lines(folder / "classnames.txt"))
    templates = tuple(t.replace("{c}", "{}") for t in _lines(folder / "zeroshot_classification_templates.txt"))
    samples = [sample for shard in shards for sample in index_samples(shard).items()]
    keys = _distinct(samples)
    images = [_pick(key, files, SUFFIXES) for key, files in samples]
    pictures = Pictures(len(keys), partial(_from_member, keys, images))
    if card.kind == "retrieval":
        captions = [_captions(key, _pick(key, files, ("txt",))) for key, files in samples]
        return Found(str(folder), pictures, keys, captions=captions, files=tuple(shards))
    labels = [_label(key, _pick(key, files, ("cls", "cls.txt"))) for key, files in samples]
    return Found(
        where=str(folder),
        pictures=pictures,
        keys=keys,
        labels=labels,
        classnames=own_names,
        templates=templates,
        files=tuple(shards),
    )


def _shards(folder: Path) -> list[Path]:
    count = folder / "nshards.txt"
    if not count.is_file():
        return sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    shards = [folder / f"{i}.tar" for i in range(int(count.read_text()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{count} says {len(shards)} shards, but {', '.join(missing[:5])} is not there")
    return shards


def _distinct(samples: Sequence[tuple[str, dict[str, Member]]]) -> list[str]:
    """The samples' keys, with the shard's name before those that several shards have."""
    count = Counter(key for key, _ in samples)
    return [key if count[key] == 1 else f"{next(iter(files.values())).shard.stem}/{key}" for key, files in samples]


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
