"""Test sets that are arrays: drawn by this package, and CIFAR's and MNIST's files in the formats torchvision reads."""

from __future__ import annotations

import gzip
import pickle
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

from ssmclip.data import synthetic
from ssmclip.data.testsets.card import LAYOUTS, Card, Found, Pictures
from ssmclip.data.testsets.prompts import plain

CIFAR10 = {
    "test": ["cifar-10-batches-py/test_batch"],
    "train": [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)],
}
CIFAR100 = {split: [f"cifar-100-python/{split}"] for split in ("test", "train")}
IDX = {"test": "t10k", "train": "train"}  # how MNIST's files begin


@LAYOUTS.register("embedded_digits")
def embedded_digits(folder: Path, card: Card) -> Found | str:
    """synthetic.digits("test"), wherever; and "train"."""
    return _embedded("scikit-learn's digits", synthetic.digits, card)


@LAYOUTS.register("embedded_scenes")
def embedded_scenes(folder: Path, card: Card) -> Found | str:
    """synthetic.scenes("test"), wherever; and "train"."""
    return _embedded("drawn scenes", synthetic.scenes, card)


def _embedded(where: str, make: Callable[[str], list[synthetic.Item]], card: Card) -> Found | str:
    split = card.part or "test"
    if split not in ("train", "test"):
        return f"a split {split} (there are train and test)"
    items = make(split)
    pictures = Pictures(len(items), partial(_draw, items))
    return Found(where, pictures, [item.key for item in items], labels=[item.label for item in items], split=split)


def _draw(items: list[synthetic.Item], index: int) -> Image.Image:
    return items[index].draw(synthetic.NATIVE_SIZE)


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
    """The original Python pickles, `cifar-10-batches-py/test_batch` or `cifar-100-python/test`, whole or cut.

    For training, `data_batch_1` to `data_batch_5`, all of them, or `train`.
    """
    split = card.part or "test"
    names = CIFAR100 if card.name == "cifar100" else CIFAR10
    paths = [folder / name for name in names.get(split, ())]
    if not paths or not all(path.is_file() for path in paths):
        return ", ".join(names.get(split, [f"a split {split} (there are train and test)"]))
    batches = [_cifar_batch(path) for path in paths]
    pixels = np.concatenate([pixels for pixels, _, _ in batches])
    labels = [label for _, labels, _ in batches for label in labels]
    keys = [
        f"{path.name}/{key}" if card.part else key
        for path, batch in zip(paths, batches, strict=True)
        for key in batch[2]
    ]
    pictures = Pictures(len(labels), partial(from_array, pixels))
    return Found(str(paths[0]), pictures, keys, labels=labels, files=tuple(paths), split=split)


def _cifar_batch(path: Path) -> tuple[np.ndarray, list[int], list[str]]:
    """Pixels (n, 32, 32, 3), labels and names. Raises ValueError for a file that is no batch."""
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
    return pixels, labels, keys


def _text(value: object) -> str:
    """Strings that were pickled again by Python 3 are bytes."""
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


@LAYOUTS.register("idx_files")
def idx_files(folder: Path, card: Card) -> Found | str:
    """MNIST's format: t10k-images-idx3-ubyte and its labels, gzipped or not, in the folder, raw/ or NAME/raw/.

    For training, train-images-idx3-ubyte.
    """
    split = card.part or "test"
    if split not in IDX:
        return f"a split {split} (there are {' and '.join(IDX)})"
    stem = f"{IDX[split]}-images-idx3-ubyte"
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
    pictures = Pictures(len(keys), partial(from_array, images))
    return Found(str(found[0]), pictures, keys, labels=labels.tolist(), files=(found[0],), split=split)


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


def from_array(pixels: np.ndarray, index: int) -> Image.Image:
    return Image.fromarray(pixels[index]).convert("RGB")
