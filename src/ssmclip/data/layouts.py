"""The forms in which test sets lie on disks.

A layout is a function (folder, class names, kind) -> Found, or a string that names what is not there. Files that are
there but damaged raise ValueError or FileNotFoundError.
"""

from __future__ import annotations

import gzip
import pickle
import re
import tarfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ssmclip.data import synthetic
from ssmclip.data.images import SUFFIXES, BadImage, open_image
from ssmclip.registry import Registry


@dataclass(frozen=True)
class Found:
    """A test set. pictures[i] opens picture i, keys[i] names it; labels or captions go with its kind.

    classnames, templates: when the files bring their own.
    """

    where: str
    pictures: Sequence[Image.Image]
    keys: list[str]
    labels: list[int] | None = None
    captions: list[list[str]] | None = None
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()


LAYOUTS: Registry[Callable[[Path, tuple[str, ...], str], Found | str]] = Registry("layout")


class Pictures(Sequence):
    """Pictures opened one at a time, by a function of the number."""

    def __init__(self, count: int, get: Callable[[int], Image.Image]):
        self.count, self.get = count, get

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Image.Image:
        if not 0 <= index < self.count:
            raise IndexError(index)
        return self.get(index)


# ---- embedded --------------------------------------------------------------------------------------------------------


@LAYOUTS.register("embedded_digits")
def embedded_digits(folder: Path, classnames: tuple[str, ...], kind: str) -> Found:
    """synthetic.digits("test"), wherever."""
    return _embedded("scikit-learn's digits", synthetic.digits("test"))


@LAYOUTS.register("embedded_scenes")
def embedded_scenes(folder: Path, classnames: tuple[str, ...], kind: str) -> Found:
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
def cifar_pickles(folder: Path, classnames: tuple[str, ...], kind: str) -> Found | str:
    """The original Python pickles, `cifar-10-batches-py/test_batch`, whole or cut."""
    path = folder / "cifar-10-batches-py" / "test_batch"
    if not path.is_file():
        return "cifar-10-batches-py/test_batch"
    try:
        with path.open("rb") as file:
            batch = {_text(key): value for key, value in _ArraysOnly(file, encoding="latin1").load().items()}
        pixels = np.asarray(batch["data"], dtype=np.uint8).reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        labels = [int(label) for label in batch["labels"]]
        keys = [_text(name) for name in batch.get("filenames", range(len(labels)))]
        if not len(pixels) == len(labels) == len(keys):
            raise ValueError(f"{len(pixels)} images, {len(labels)} labels and {len(keys)} file names")
    except Exception as error:  # a damaged pickle raises nearly anything
        raise ValueError(f"{path} is not a CIFAR batch: {type(error).__name__}: {error}") from error
    return Found(str(path), Pictures(len(labels), partial(_from_array, pixels)), keys, labels=labels)


def _text(value: object) -> str:
    """Strings that were pickled again by Python 3 are bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


@LAYOUTS.register("idx_files")
def idx_files(folder: Path, classnames: tuple[str, ...], kind: str) -> Found | str:
    """MNIST's format: t10k-images-idx3-ubyte and its labels, gzipped or not, in the folder, raw/ or NAME/raw/."""
    stem = "t10k-images-idx3-ubyte"
    places = [folder, folder / "raw", *sorted(folder.glob("*/raw"))]
    found = [place / name for place in places for name in (stem, stem + ".gz") if (place / name).is_file()]
    if not found:
        return f"{stem}[.gz] in it, raw/ or */raw/"
    images = _read_idx(found[0], 3)
    labels = _read_idx(found[0].with_name(found[0].name.replace("images-idx3", "labels-idx1")), 1)
    if len(images) != len(labels):
        raise ValueError(f"{found[0]} holds {len(images)} images, the file beside it {len(labels)} labels")
    keys = [str(i) for i in range(len(labels))]
    return Found(str(found[0]), Pictures(len(keys), partial(_from_array, images)), keys, labels=labels.tolist())


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
def class_folders(folder: Path, classnames: tuple[str, ...], kind: str) -> Found | str:
    """test/CLASS/picture.jpg, or val/..., or CLASS/.... Case and punctuation of folder names don't matter.

    Raises ValueError for folders without a class, two of one class, and folders without a picture.
    """
    classes = {plain(name): label for label, name in enumerate(classnames)}
    for place in (folder / "test", folder / "val", folder):
        folders = sorted(path for path in place.iterdir() if path.is_dir()) if place.is_dir() else []
        if any(plain(path.name) in classes for path in folders):
            break
    else:
        return "test/CLASS/, val/CLASS/ or CLASS/ with pictures"
    if strangers := [path.name for path in folders if plain(path.name) not in classes]:
        names = ", ".join(strangers)
        raise ValueError(f"{place} has folders that are no class: {names}. Classes: {', '.join(classnames)}")
    paths: list[Path] = []
    labels: list[int] = []
    seen: dict[int, str] = {}
    for path in folders:
        label = classes[plain(path.name)]
        if label in seen:
            raise ValueError(f"{place}: {seen[label]} and {path.name} are the same class")
        seen[label] = path.name
        pictures = sorted(file for file in path.rglob("*") if file.suffix.lower().lstrip(".") in SUFFIXES)
        if not pictures:
            raise ValueError(f"the class folder {path} has no picture")
        paths += pictures
        labels += [label] * len(pictures)
    keys = [str(path.relative_to(place)) for path in paths]
    return Found(str(place), Pictures(len(keys), partial(_from_file, paths)), keys, labels=labels)


def plain(name: str) -> str:
    """A class name as it is compared: without case and punctuation."""
    return re.sub(r"[\W_]+", " ", name.lower()).strip()


def _from_file(paths: list[Path], index: int) -> Image.Image:
    try:
        return open_image(paths[index])
    except BadImage as error:
        raise BadImage(error.reason, f"{paths[index]}: {error.detail}") from error


# ---- CLIP_benchmark's shards -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Member:
    """Where in which tar a file lies."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


@LAYOUTS.register("clip_benchmark_tars")
def clip_benchmark_tars(folder: Path, classnames: tuple[str, ...], kind: str) -> Found | str:
    """`test/0.tar ...` with NAME.jpg and NAME.cls or NAME.txt (a caption a line), as CLIP_benchmark's webdatasets are.

    Beside test/ there may be classnames.txt, zeroshot_classification_templates.txt (with {c}) and dataset_type.txt.
    """
    shards = _shards(folder / "test")
    if not shards:
        return "test/0.tar (CLIP_benchmark's webdataset)"
    declared = (_lines(folder / "dataset_type.txt") or ["classification"])[0]
    if declared != kind:
        return f"a {kind} webdataset (test/0.tar is there, but its dataset_type.txt says {declared!r})"
    own_names = tuple(_lines(folder / "classnames.txt"))
    templates = tuple(t.replace("{c}", "{}") for t in _lines(folder / "zeroshot_classification_templates.txt"))
    samples = [sample for shard in shards for sample in _index(shard)]
    keys = [key for key, _ in samples]
    images = [_pick(key, files, SUFFIXES) for key, files in samples]
    pictures = Pictures(len(keys), partial(_from_member, keys, images))
    if kind == "retrieval":
        captions = [_captions(key, _pick(key, files, ("txt",))) for key, files in samples]
        return Found(str(folder), pictures, keys, captions=captions)
    labels = [_label(key, _pick(key, files, ("cls", "cls.txt"))) for key, files in samples]
    return Found(str(folder), pictures, keys, labels=labels, classnames=own_names, templates=templates)


def _shards(folder: Path) -> list[Path]:
    count = folder / "nshards.txt"
    if not count.is_file():
        return sorted(folder.glob("*.tar"), key=lambda path: (len(path.name), path.name))
    shards = [folder / f"{i}.tar" for i in range(int(count.read_text()))]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise FileNotFoundError(f"{count} says {len(shards)} shards, but {', '.join(missing[:5])} is not there")
    return shards


def _index(shard: Path) -> list[tuple[str, dict[str, _Member]]]:
    samples: dict[str, dict[str, _Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if member.isreg():
                    path, _, name = member.name.rpartition("/")
                    stem, _, suffix = name.partition(".")
                    key = f"{path}/{stem}" if path else stem
                    samples.setdefault(key, {})[suffix.lower()] = _Member(shard, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {shard} is damaged after {len(samples)} samples: {error}") from error
    return list(samples.items())


def _pick(key: str, files: dict[str, _Member], suffixes: Sequence[str]) -> _Member:
    for suffix in suffixes:
        if suffix in files:
            return files[suffix]
    shard = next(iter(files.values())).shard
    raise ValueError(f"{key} in {shard} has no .{suffixes[0]}; it has .{', .'.join(files)}")


def _captions(key: str, member: _Member) -> list[str]:
    try:
        return [line for line in member.read().decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"the captions of {key} in {member.shard} are not utf-8: {error}") from error


def _label(key: str, member: _Member) -> int:
    text = member.read()
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"the label of {key} in {member.shard} is not a number: {text[:20]!r}") from error


def _from_member(keys: list[str], images: list[_Member], index: int) -> Image.Image:
    try:
        return open_image(images[index].read())
    except BadImage as error:
        raise BadImage(error.reason, f"{keys[index]} in {images[index].shard}: {error.detail}") from error


def _lines(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [line.strip() for line in text.splitlines() if line.strip()]
