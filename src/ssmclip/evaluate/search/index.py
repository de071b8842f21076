"""An index of unit vectors of a folder of images, one Parquet file, and its search by text.

Columns: path (relative to the folder), embedding (d numbers, float32). The schema's metadata says, as JSON under
"ssmclip", which model made it, with a fingerprint of its weights, the folder, and which pictures could not be read.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import os
import shutil
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Int
from tqdm import tqdm

from ssmclip.data.images import SUFFIXES, open_image, pictures_below
from ssmclip.evaluate.embeddings.embed import hashes
from ssmclip.evaluate.embeddings.fingerprint import Unsure, combined, weights_hash
from ssmclip.evaluate.search.embedder import Embedder
from ssmclip.files import locked, parse_json, whole
from ssmclip.rows.precision import FLOAT32

__all__ = ["Index", "build_index", "embedder_for", "made_by", "nearest", "read_index"]

log = logging.getLogger(__name__)

PART = 1024  # pictures in a file written on the way: what an interruption can cost


@dataclass(frozen=True)
class Index:
    """paths of n pictures, relative to `about["folder"]`; vectors: their embeddings; about: see the module."""

    paths: list[str]
    vectors: Float[np.ndarray, "n d"]
    about: dict[str, Any]


def build_index(folder: str | Path, embedder: Embedder, out: str | Path) -> Index:
    """Embed every image below a folder and write the index. Unreadable images are left out and listed in `about`.

    So are names that are not UTF-8, which Parquet cannot store; they are listed with backslash escapes.
    Parts are written next to `out`; after an interruption, parts whose images are unchanged are reused.
    Raises FileNotFoundError for a missing folder, ValueError if none of its images can be read, FileExistsError while
    another process writes the same index.
    """
    folder, out = Path(folder), Path(out)
    if not folder.is_dir():
        raise FileNotFoundError(f"folder not found: {folder}")
    paths = [path.relative_to(folder).as_posix() for path in pictures_below(folder)]
    if not paths:
        raise ValueError(f"no images in {folder}; supported formats: {', '.join(SUFFIXES)}")
    refusal = f"another process is writing {out}: wait for it, or choose another --out"
    with locked(out.with_name(f".{out.name}.lock"), refusal, remove=True):
        return _index(folder, paths, embedder, out)


def _index(folder: Path, paths: Sequence[str], embedder: Embedder, out: Path) -> Index:
    unreadable = {_printable(path): "the name is not UTF-8" for path in paths if not _is_utf8(path)}
    named = [path for path in paths if _is_utf8(path)]
    model = {
        "model": _from_anywhere(embedder.clip.label),
        "image_size": embedder.image_size,
        "precision": str(embedder.clip.dtype).removeprefix("torch."),
        "weights": weights_hash(embedder.clip.network),
        "made_by": _fingerprint(embedder),
    }
    parts = out.with_name(out.name + ".parts")
    parts.mkdir(parents=True, exist_ok=True)
    tables = []
    for start in tqdm(range(0, len(named), PART), desc="images", unit=f"x{PART}", disable=None):
        own = named[start : start + PART]
        pictures = [(path, *_state(folder / path)) for path in own]
        made_of = [model["made_by"] or uuid.uuid4().hex, str(folder.resolve()), pictures]
        key = hashlib.sha256(json.dumps(made_of).encode()).hexdigest()[:16]
        file = parts / f"{key}.parquet"
        if not file.is_file():
            _write(_embed(folder, own, embedder), file)
        table = pq.read_table(file)
        unreadable |= _about(table)["unreadable"]
        tables.append(table)
    if not any(map(len, tables)):
        shutil.rmtree(parts, ignore_errors=True)
        path, why = next(iter(unreadable.items()))
        raise ValueError(f"none of the {len(paths)} images in {folder} could be read; the first: {path} ({why})")
    table = pa.concat_tables(tables)
    _write(_described(table, {**model, "folder": str(folder.resolve()), "unreadable": unreadable}), out)
    shutil.rmtree(parts, ignore_errors=True)
    return read_index(out)


def read_index(path: str | Path) -> Index:
    """Read an index written by `build_index`. Raises FileNotFoundError, and ValueError for another file."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"index not found: {path}; make one with `ssmclip embed FOLDER --out {path}`")
    try:
        table = pq.read_table(path)
        about = dict(_about(table))
        vectors = np.stack(table["embedding"].to_numpy()).astype(np.float32)
        return Index(table["path"].to_pylist(), vectors, about)
    except (pa.ArrowException, OSError, KeyError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is not an index written by `ssmclip embed` ({error})") from error


def embedder_for(index: Index, model: str | None = None, *, device: str = "cpu") -> Embedder:
    """Return an embedder for an index: of the model it names, or another, at its image size and in its precision.

    Raises what `ssmclip.load` raises. Whether the model is still the one that made the index, `made_by` tells.
    """
    size = index.about["image_size"]
    dtype = getattr(torch, index.about.get("precision", FLOAT32))  # an older index does not name it
    size = tuple(size) if isinstance(size, list) else size
    return Embedder(model or index.about["model"], device=device, dtype=dtype, image_size=size)


def made_by(index: Index, embedder: Embedder) -> bool:
    """Return whether an index was made by this model, with this preprocessing."""
    if known := index.about.get("made_by"):
        return known == _fingerprint(embedder)
    return index.about["weights"] == weights_hash(embedder.clip.network)  # of an older index, or an unsure model


def nearest(
    vectors: Float[np.ndarray, "n d"], queries: Float[np.ndarray, "m e"], k: int
) -> tuple[Float[np.ndarray, "m k2"], Int[np.ndarray, "m k2"]]:
    """Return (scores, places) of the k vectors with the largest dot product for each query, best first, exactly.

    Uses FAISS (`pip install faiss-cpu`) if installed, else NumPy, which is logged. Returns fewer if n < k.
    Raises ValueError for k below 1 and for queries of another length than the vectors.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1 (got {k})")
    if vectors.shape[1] != queries.shape[1]:
        raise ValueError(f"the query must have {vectors.shape[1]} dimensions, like the index (got {queries.shape[1]})")
    k = min(k, len(vectors))
    if importlib.util.find_spec("faiss") is None:
        log.info("faiss is not installed (pip install faiss-cpu): using exact search in NumPy")
        scores = queries @ vectors.T
        places = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, places, axis=1), places
    import faiss

    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors, dtype=np.float32))
    return index.search(np.ascontiguousarray(queries, dtype=np.float32), k)


def _fingerprint(embedder: Embedder) -> str:
    """A hash of what decides the vectors of pictures, "" where it cannot all be seen."""
    try:
        made_of = {part: hashes(embedder.clip)[part] for part in ("model", "preprocess")}
    except Unsure as error:
        log.warning("the index can't tell by which model it was made: %s", error)
        return ""
    return combined(made_of)


def _from_anywhere(model: str) -> str:
    """A model's name with the path in it absolute, so that it is found from another folder, too."""
    if Path(model).exists():
        return os.path.abspath(model)
    start, slash, file = model.partition("/")
    return f"{start}/{os.path.abspath(file)}" if slash and ":" in start and Path(file).is_file() else model


def _is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _printable(path: str) -> str:
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _state(file: Path) -> tuple[int, int]:
    """Return size and time of change, which identify a file's content; -1 for both if it is missing."""
    try:
        found = file.stat()
    except OSError:
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _embed(folder: Path, paths: Sequence[str], embedder: Embedder) -> pa.Table:
    """Return a part of the index: rows of readable images, with the others in its metadata."""
    read, unreadable, vectors = [], {}, []
    for start in range(0, len(paths), embedder.batch_size):
        pictures = {}
        for path in paths[start : start + embedder.batch_size]:
            try:
                # Preprocessed at once: a batch of photographs as large as cameras make them fills the memory.
                pictures[path] = embedder.clip.preprocess(open_image(folder / path))
            except (ValueError, MemoryError) as error:  # BadImage, and a preprocessing that cannot take its shape
                unreadable[path] = str(error) or type(error).__name__
        if pictures:
            vectors.append(embedder.encode_images(list(pictures.values())).numpy())
            read += pictures
    flat = np.concatenate(vectors) if vectors else np.zeros((0, 1), np.float32)
    table = pa.table({"path": pa.array(read, pa.string()), "embedding": pa.array(list(flat), pa.list_(pa.float32()))})
    return _described(table, {"unreadable": unreadable})


def _described(table: pa.Table, about: dict[str, Any]) -> pa.Table:
    return table.replace_schema_metadata({"ssmclip": json.dumps(about)})


def _about(table: pa.Table) -> dict[str, Any]:
    return parse_json((table.schema.metadata or {})[b"ssmclip"])


def _write(table: pa.Table, path: Path) -> None:
    with whole(path) as part:
        pq.write_table(table, part)
