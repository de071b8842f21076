"""Embeddings on disk, by what they were made of: model, preprocessing and pictures, or model, tokenizer and texts.

A key is a hash of contents, never of names: other weights, another resize or a changed picture make another key. A
file says again inside what it was made of, and is not believed if that differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from PIL import Image
from safetensors import torch as safe
from torch import Tensor, nn

log = logging.getLogger(__name__)

PROBES = ((61, 47), (40, 90))  # sizes of the pictures a preprocessing is recognised by
ADDRESS = re.compile(r" at 0x[0-9a-f]+")
SAID = ("A photo of 2 dogs, long ago.", "zero " * 300)  # what a tokenizer is recognised by: words, and where it cuts


def model_hash(model: nn.Module) -> str:
    """Return a hash of the printed architecture and of every weight and buffer."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{type(model).__qualname__} {ADDRESS.sub('', repr(model))}".encode())
    for name, value in sorted(model.state_dict().items()):
        value = value.detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy() if value.numel() else b"")
    return digest.hexdigest()


def preprocess_hash(preprocess: Any) -> str:
    """Return a hash of the preprocessing's outputs for two fixed noise images."""
    digest = hashlib.blake2b(digest_size=16)
    for number, (width, height) in enumerate(PROBES):
        pixels = np.random.RandomState(number).randint(0, 256, (height, width, 3), dtype=np.uint8)
        digest.update(_bytes(preprocess(Image.fromarray(pixels))))
    return digest.hexdigest()


def tokenizer_hash(tokenizer: Any) -> str:
    """Return a hash of the tokens of two fixed texts."""
    return hashlib.blake2b(_bytes(tokenizer(list(SAID))), digest_size=16).hexdigest()


def texts_hash(texts: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        encoded = text.encode()
        digest.update(f"{len(encoded)} ".encode() + encoded)
    return digest.hexdigest()


def data_hash(dataset: Any, folder: Path) -> str:
    """Return a hash of a data set: its files' bytes (pixels if it has no files), keys and labels.

    A file is read once: afterwards its size and time of change answer for it (kept in `folder`).
    """
    digest = hashlib.blake2b(digest_size=16)
    files = tuple(getattr(dataset, "files", ()))
    digest.update(json.dumps([list(map(str, getattr(dataset, "keys", ()))), getattr(dataset, "labels", None)]).encode())
    for content in _file_hashes(files, folder) if files else map(_picture_hash, _items(dataset)):
        digest.update(content.encode())
    return digest.hexdigest()


def read(path: Path, made_of: dict[str, str]) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and notes cached at `path`; None if missing, damaged or made from something else."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        log.warning("%s is damaged and will be recomputed: %s", path, error)
        return None
    if about["made_of"] != made_of:
        differing = ", ".join(key for key in made_of if about["made_of"].get(key) != made_of[key])
        log.warning("%s contains embeddings of another %s and will be recomputed", path, differing)
        return None
    return tensors, about["notes"]


def write(path: Path, made_of: dict[str, str], tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Cache tensors. A failed write is logged and otherwise ignored, as results do not depend on it."""
    about = json.dumps({"made_of": made_of, "notes": notes})
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(safe.save({k: v.contiguous() for k, v in tensors.items()}, metadata={"about": about}))
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        log.warning("embeddings are not cached: %s cannot be written (%s)", path, error.strerror or error)


def key(made_of: dict[str, str]) -> str:
    return hashlib.blake2b(json.dumps(made_of, sort_keys=True).encode(), digest_size=16).hexdigest()


def _file_hashes(files: Sequence[Path], folder: Path) -> list[str]:
    """Return a hash of each file's bytes, reusing known hashes of files with unchanged size and time of change."""
    notes = folder / "files" / f"{texts_hash(map(str, files))}.json"
    try:
        known = json.loads(notes.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        known = {}
    now, changed = {}, False
    for file in files:
        state = file.stat() if file.is_file() else None
        mark = [state.st_size, state.st_mtime_ns] if state else [-1, -1]
        earlier = known.get(str(file))
        if earlier and earlier[:2] == mark:
            now[str(file)] = earlier
            continue
        changed = True
        now[str(file)] = [*mark, _file_hash(file) if state else "missing"]
    if changed:
        _note(notes, now)
    return [now[str(file)][2] for file in files]


def _file_hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def _note(path: Path, content: dict[str, list]) -> None:
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)  # costs reading the files again


def _items(dataset: Any) -> Iterable[Image.Image | None]:
    for i in range(len(dataset)):
        try:
            item = dataset[i]
        except (OSError, ValueError, SyntaxError):
            item = None
        yield item[0] if isinstance(item, tuple) else item


def _picture_hash(picture: Image.Image | None) -> str:
    if picture is None:
        return "unreadable"
    return hashlib.blake2b(f"{picture.mode}{picture.size}".encode() + picture.tobytes(), digest_size=16).hexdigest()


def _bytes(value: Any) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes() if isinstance(value, Tensor) else repr(value).encode()
