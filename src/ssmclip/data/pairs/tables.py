"""Image-caption pairs in a csv, tsv or parquet file, and drawn ones: sources any row of which can be had at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet

from ssmclip.data import synthetic
from ssmclip.data.pairs.samples import Sample, permutation

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "file")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "sentence")

TEXT = pa.large_string()  # the one kind of text that may be longer than 2 GiB in all


@dataclass(frozen=True)
class TableFormat:
    """How to read a table when its header does not say. Empty names: the first known column name is taken.

    Names are found in any case, with or without spaces around them.
    """

    image_column: str = ""
    caption_column: str = ""
    encoding: str = "utf-8"


class RowSource:
    """Samples any of which can be had at once: each pass is a new order of all of them, dealt out to the readers."""

    def __init__(self, samples: Sequence[Sample], *, seed: int, identity: str):
        self.samples = samples
        self.seed = seed
        self.identity = identity
        self.num_samples = len(samples)
        self.resident = isinstance(samples, list)

    def windows(
        self, number: int, reader: int, readers: int, start: Sequence[int]
    ) -> Iterator[tuple[list[int], Sequence[Sample]]]:
        """Pass `number` of one reader: one window with all its samples."""
        order = permutation(self.num_samples, self.seed, "rows", number)
        yield [0, 0], _Picked(self.samples, order[reader::readers])


class _Picked(Sequence):
    def __init__(self, samples: Sequence[Sample], order: np.ndarray):
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[int(self.order[index])]


def synthetic_source(name: str, *, seed: int) -> RowSource:
    """One of synthetic.PAIR_SOURCES. The pictures do not depend on `seed`, only their order."""
    items = synthetic.PAIR_SOURCES[name]()
    samples = [Sample(item.key, partial(item.draw, synthetic.NATIVE_SIZE), list(item.captions)) for item in items]
    return RowSource(samples, seed=seed, identity=f"synthetic:{name} {len(samples)}")


def table_source(path: str | Path, table_format: TableFormat, *, seed: int, resident_bytes: int) -> RowSource:
    """A table of (image, caption) rows. Rows with the same path are one sample with several captions.

    Images are paths (relative to the table's folder), encoded bytes, or Hugging Face's {"bytes", "path"}. Captions are
    texts or lists of texts; numbers are taken as they are written.
    Raises FileNotFoundError, and ValueError that names a missing column, one that holds something else, or the first
    byte that is not in the encoding.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no table {path}")
    table = _read_parquet(path, table_format) if path.suffix.lower() == ".parquet" else _read_text(path, table_format)
    rows = _Rows(_as_images(path, table["image"]), _as_captions(path, table["caption"]), path.parent)
    samples = list(rows) if table.nbytes <= resident_bytes else rows
    return RowSource(samples, seed=seed, identity=f"{path.name} {len(rows)}")


class _Rows(Sequence):
    """Rows of a table as Samples, made when asked for; of each picture's rows one Sample."""

    def __init__(self, images: pa.ChunkedArray, captions: pa.ChunkedArray, folder: Path):
        # In the chunks they were read in: one array of texts or bytes holds at most 2 GiB.
        self.images, self.captions = images, captions
        self.rows = _grouped(images) if images.type == TEXT else None
        self.folder = folder

    def __len__(self) -> int:
        return len(self.images if self.rows is None else self.rows)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        rows = [index] if self.rows is None else self.rows[index].as_py()
        image = self.images[rows[0]].as_py()
        key = f"row {rows[0]}"
        if isinstance(image, dict):  # as Hugging Face's data sets store pictures
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str) and image:
            key, image = image, self.folder / image
        captions = [caption for row in rows for caption in self._captions(row) if caption is not None]
        return Sample(key, image or None, captions, "" if image else "no image")

    def _captions(self, row: int) -> list[str | None]:
        captions = self.captions[row].as_py()
        return captions if isinstance(captions, list) else [captions]


def _grouped(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """The rows of each path; rows without one stand alone.

    In an order that runs go on from: Arrow's own for short text, else that in which paths first occur.
    """
    rows = pa.array(np.arange(len(paths)))
    missing = pc.equal(pc.fill_null(paths, ""), "")
    if not pc.any(missing).as_py() and paths.nbytes < 2**31:
        table = pa.table({"path": paths.cast(pa.string()), "row": rows})
        return table.group_by("path", use_threads=False).aggregate([("row", "list")])["row_list"]
    alone = pc.if_else(missing, rows, -1)
    table = pa.table({"path": paths, "alone": alone, "row": rows})
    return table.group_by(["path", "alone"], use_threads=False).aggregate([("row", "list")])["row_list"]


def _as_images(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Paths as TEXT, whatever Arrow type says text; bytes and {"bytes", "path"} as they are."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
        return column.cast(kind).cast(TEXT)
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise ValueError(f'{path}: its images are of type {kind}, wanted paths, encoded bytes or {{"bytes", "path"}}')
    return column.cast(kind)


def _as_captions(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Captions as TEXT or lists of TEXT."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    several = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    try:
        return column.cast(kind).cast(pa.large_list(TEXT) if several else TEXT)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{path}: its captions are of type {kind}, wanted texts or lists of texts ({error})"
        ) from error


def _read_parquet(path: Path, table_format: TableFormat) -> pa.Table:
    try:
        names = pa.parquet.read_schema(path).names
        image, caption = _columns(path, names, table_format)
        table = pa.parquet.read_table(path, columns=[image, caption])
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    return table.select([image, caption]).rename_columns(["image", "caption"])


def _read_text(path: Path, table_format: TableFormat) -> pa.Table:
    tabs = path.name.lower().endswith((".tsv", ".tsv.gz"))
    parse = pa.csv.ParseOptions(
        delimiter="\t" if tabs else ",", quote_char=False if tabs else '"', newlines_in_values=not tabs
    )
    read = pa.csv.ReadOptions(encoding=table_format.encoding)
    try:
        with pa.csv.open_csv(_unpacked(path), read, parse) as reader:
            names = reader.schema.names
        image, caption = _columns(path, names, table_format)
        convert = pa.csv.ConvertOptions(
            include_columns=[image, caption], column_types={image: pa.string(), caption: pa.string()}
        )
        table = pa.csv.read_csv(_unpacked(path), read, parse, convert)
    except (pa.ArrowInvalid, UnicodeDecodeError, LookupError) as error:
        _check_encoding(path, table_format.encoding)
        raise ValueError(f"{path} is not a readable table: {error}") from error
    return table.rename_columns(["image", "caption"])


def _unpacked(path: Path) -> pa.NativeFile:
    return pa.input_stream(path, compression="gzip" if path.suffix.lower() == ".gz" else None)


def _check_encoding(path: Path, encoding: str) -> None:
    """Raises ValueError for an unknown encoding, or naming the first byte that is not in it; else does nothing."""
    with _unpacked(path) as file:
        content = file.read()
    try:
        content.decode(encoding)
    except LookupError as error:
        raise ValueError(f"{path}: {error}; wanted one that Python knows, such as utf-8, latin-1, cp1252") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{path} is not {encoding}: byte 0x{content[error.start]:02x} at position {error.start} (line {line}). "
            "Give its encoding, e.g. --set data.encoding=latin-1 (TableFormat(encoding='latin-1')), or convert it: "
            "iconv -f latin1 -t utf-8"
        ) from error


def _columns(path: Path, names: Sequence[str], table_format: TableFormat) -> tuple[str, str]:
    return (
        _column(path, names, "image", table_format.image_column, IMAGE_COLUMNS),
        _column(path, names, "caption", table_format.caption_column, CAPTION_COLUMNS),
    )


def _column(path: Path, names: Sequence[str], kind: str, wanted: str, known: Sequence[str]) -> str:
    candidates = (wanted,) if wanted else known
    if exact := [name for name in candidates if name in names]:
        return exact[0]
    for name in candidates:
        alike = [n for n in names if n.strip().lower() == name.strip().lower()]
        if len(alike) == 1:
            return alike[0]
    looked = wanted or ", ".join(known)
    raise ValueError(
        f"{path} has no {kind} column: looked for {looked}, its columns are {', '.join(names)}. "
        f"Name it: --set data.{kind}_column=... (TableFormat({kind}_column=...))"
    )
