"""Embeddings on disk, by what they were made of: model, preprocessing and pictures, or model, tokenizer and texts.

A key is a hash of contents, never of names: other weights, another resize or a changed picture make another key. A
file says again inside what it was made of, and is not believed if that differs.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import safetensors
from PIL import Image
from safetensors import torch as safe
from torch import Tensor

from ssmclip.evaluate.embeddings.fingerprint import (
    Unsure,
    combined,
    model_hash,
    preprocess_hash,
    texts_hash,
    tokenizer_hash,
)
from ssmclip.files import whole

__all__ = ["data_hash", "key", "model_hash", "place", "preprocess_hash", "read", "sure", "texts_hash"]
__all__ += ["tokenizer_hash", "write"]

log = logging.getLogger(__name__)

_WARNED: set[Any] = set()  # what a warning was about: one is enough for a run

MISSING, UNREADABLE = "missing", "unreadable"
Made = dict[str, str]  # what embeddings were made of: part -> hash


def sure(parts: Callable[[], Made]) -> Made | None:
    """Return what embeddings are made of; None, with a warning, where that cannot all be seen: they are not kept."""
    try:
        return parts()
    except Unsure as error:
        _warn_once(str(error), f"embeddings are not cached: {error}")
        return None


def place(folder: Path, kind: str, made_of: Made) -> Path:
    """Return where embeddings of a kind ("images", "texts") are kept."""
    return folder / kind / f"{key(made_of)}.safetensors"


def data_hash(dataset: Any, folder: Path) -> str:
    """Return a hash of the bytes of the files a data set is read from, its keys and labels.

    It is of the pixels in place of the files where there are none, and where others than this package's own readers
    make pictures of them. A file is read once: afterwards its size, its times of change and its number on the disk
    answer for it (kept in `folder`).
    """
    digest = hashlib.blake2b(digest_size=16)
    files, reader = tuple(getattr(dataset, "files", ())), _reader(dataset)
    keys = getattr(dataset, "keys", ())
    keys = [] if callable(keys) else list(map(str, keys))
    labels = getattr(dataset, "labels", None)
    labels = labels if labels is None else list(map(str, labels))
    digest.update(json.dumps([keys, labels, reader]).encode())
    for content in _file_hashes(files, folder) if files and reader else map(_picture_hash, _items(dataset)):
        digest.update(content.encode())
    return digest.hexdigest()


def read(path: Path, made_of: Made) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Return the tensors and notes kept at `path`.

    None when there are none, or not of these things, or they are damaged, or the cache cannot be used.
    """
    try:
        path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        _warn_unusable(path, error)
        return None
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            about = json.loads(file.metadata()["about"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        earlier, notes = about["made_of"], about["notes"]
    except PermissionError as error:
        _warn_unusable(path, error)
        return None
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        log.warning("%s is damaged and will be recomputed: %s", path, error)
        return None
    if earlier != made_of:
        differing = ", ".join(key for key in made_of if earlier.get(key) != made_of[key])
        log.warning("%s contains embeddings of another %s and will be recomputed", path, differing)
        return None
    return tensors, notes


def write(path: Path, made_of: Made, tensors: dict[str, Tensor], notes: dict[str, Any]) -> None:
    """Keep tensors. What can't be written is not kept, with a warning: the numbers don't depend on it."""
    about = json.dumps({"made_of": made_of, "notes": notes})
    content = safe.save({name: tensor.contiguous() for name, tensor in tensors.items()}, metadata={"about": about})
    try:
        with whole(path) as part:
            part.write_bytes(content)
    except OSError as error:
        _warn_unusable(path, error)


def key(made_of: Made) -> str:
    """Return the name that things made of these go by."""
    return combined(made_of)


def _warn_unusable(path: Path, error: OSError) -> None:
    folder = path.parent.parent
    _warn_once(folder, f"embeddings are not cached: the cache {folder} can't be used ({error.strerror or error})")


def _warn_once(about: Any, message: str) -> None:
    if about not in _WARNED:
        _WARNED.add(about)
        log.warning("%s", message)


def _reader(dataset: Any) -> str:
    """The function that makes a data set's pictures of its files; "" for one that is not this package's."""
    if type(dataset).__module__.partition(".")[0] != "ssmclip":
        return ""
    inner = getattr(dataset, "dataset", dataset)  # of a distorted one, whose keys say how
    get = getattr(getattr(inner, "_pictures", None), "get", None)
    function = getattr(get, "func", get)
    name = f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"
    return name if name.startswith("ssmclip.") else ""


def _file_hashes(files: Sequence[Path], folder: Path) -> list[str]:
    """A hash of each file's bytes, from the notes of an earlier time where its state is the same."""
    notes = folder / "files" / f"{texts_hash(map(str, files))}.json"
    known = _noted(notes)
    now, hashes = {}, []
    for file in files:
        state = _state(file)
        earlier = known.get(str(file))
        content = earlier[1] if earlier and earlier[0] == state else _file_hash(file)
        hashes.append(content)
        if content not in (MISSING, UNREADABLE):  # which may change without the file
            now[str(file)] = [state, content]
    if now != known:
        with suppress(OSError), whole(notes) as part:  # not kept, it costs reading the files again
            part.write_bytes(json.dumps(now).encode())
    return hashes


def _noted(notes: Path) -> dict[str, list]:
    try:
        known = json.loads(notes.read_bytes())
    except (OSError, ValueError):
        return {}
    whole = isinstance(known, dict) and all(isinstance(note, list) and len(note) == 2 for note in known.values())
    return known if whole else {}


def _state(file: Path) -> list[int]:
    """What changes when a file does: size, times of its content and of its entry, its number on the disk."""
    try:
        state = file.stat()
    except OSError:
        return []
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _file_hash(file: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with file.open("rb") as stream:
            while block := stream.read(2**20):
                digest.update(block)
    except FileNotFoundError:
        return MISSING
    except OSError:  # as embedding it will count it
        return UNREADABLE
    return digest.hexdigest()


def _items(dataset: Any) -> Iterable[Image.Image | None]:
    for i in range(len(dataset)):
        try:
            item = dataset[i]
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            item = None
        yield item[0] if isinstance(item, tuple) else item


def _picture_hash(picture: Image.Image | None) -> str:
    if picture is None:
        return UNREADABLE
    return hashlib.blake2b(f"{picture.mode}{picture.size}".encode() + picture.tobytes(), digest_size=16).hexdigest()
