"""Image-caption pairs in a csv, tsv or parquet file, and generated ones: sources with random access to rows."""

from __future__ import annotations

import codecs
import json
import os
import re
import zlib
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
from ssmclip.data.delimited import Delimited, in_utf8, unpack
from ssmclip.data.pairs.samples import Sample, permutation, with_replacement
from ssmclip.data.tars import TAR_SUFFIXES

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".parquet")
IMAGE_COLUMNS = ("image", "image_path", "filepath", "file_path", "path", "filename", "file_name", "file")
CAPTION_COLUMNS = ("caption", "captions", "title", "text", "sentence")

SEPARATORS = {"comma": ",", "tab": "\t", r"\t": "\t", "semicolon": ";", "pipe": "|"}  # by name, for the command line

REMEDY = "Give its encoding, e.g. --set data.encoding={encoding} (TableFormat(encoding='{encoding}')), or convert it"

TEXT = pa.large_string()  # the one kind of text that may be longer than 2 GiB in all


@dataclass(frozen=True)
class TableFormat:
    """The format of a table. Empty names: the first known column name is used.

    Names are found in any case, with or without spaces around them. encoding, separator: of a csv or tsv file; the
    separator is one character or a name in SEPARATORS, "": the first of , tab ; | that separates the two columns.
    captions: columns that captions are drawn from, in place of caption_column.
    caption_columns: the known names of the column with the texts.
    Raises ValueError for another separator.
    """

    image_column: str = ""
    caption_column: str = ""
    encoding: str = "utf-8"
    separator: str = ""
    captions: tuple[str, ...] = ()
    caption_columns: tuple[str, ...] = CAPTION_COLUMNS

    def __post_init__(self):
        character = SEPARATORS.get(self.separator, self.separator)
        if character and (len(character) > 1 or not character.isascii() or character in '"\r\n'):
            raise ValueError(
                f"data.separator must be one ASCII character or one of {', '.join(SEPARATORS)} (got {self.separator!r})"
            )


class RowSource:
    """A source with random access: each pass is a new order of all samples, dealt out to the readers.

    resample: each reader draws from all samples with replacement instead, as many as its share would be.
    """

    def __init__(self, samples: Sequence[Sample], *, seed: int, identity: str, resample: bool = False):
        self.samples = samples
        self.resample = resample
        self.seed = seed
        self.identity = identity
        self.num_samples = len(samples)
        self.resident = isinstance(samples, list)

    def windows(
        self, number: int, reader: int, readers: int, start: Sequence[int], deal: int | None = None
    ) -> Iterator[tuple[list[int], Sequence[Sample]]]:
        """Yield pass `number` of one reader: one window with all its samples. deal: see `stream.Source`."""
        if self.resample and self.num_samples:
            count = -(-self.num_samples // readers)
            drawn = with_replacement(self.num_samples, count, self.seed, "drawn rows", number, reader)
            yield [0, 0], _Picked(self.samples, drawn)
            return
        order = permutation(self.num_samples, self.seed, "rows", number if deal is None else deal)
        yield [0, 0], _Picked(self.samples, order[reader::readers])

    def is_empty(self) -> bool:
        """Return whether there is no sample."""
        return not self.num_samples


class _Picked(Sequence):
    def __init__(self, samples: Sequence[Sample], order: np.ndarray):
        self.samples, self.order = samples, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[int(self.order[index])]


def is_table(source: str) -> bool:
    """Return whether a source is the name of one table, there or not, and no pattern for several."""
    return source.lower().endswith(TABLE_SUFFIXES) and (not set(source) & set("*?[{") or Path(source).is_file())


def tables_in(folder: Path) -> list[str]:
    """Return the tables of a folder without shards, [] where there is no such folder or it has none.

    Raises ValueError where they are not parts of one table, whose names differ in numbers only: they may be splits.
    """
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")) if folder.is_dir() else []
    tables = [name for name in names if name.lower().endswith(TABLE_SUFFIXES)]
    if any(name.lower().endswith(TAR_SUFFIXES) for name in names):
        return []
    if len({re.sub(r"\d+", "0", name) for name in tables}) > 1:
        raise ValueError(
            f"{folder} has tables that may belong to different sets: {', '.join(tables[:8])}. "
            f"Choose with a pattern, such as {folder / '*'}{Path(tables[0]).suffix}"
        )
    return [str(folder / name) for name in tables]


def synthetic_source(name: str, *, seed: int, resample: bool = False) -> RowSource:
    """Return one of synthetic.PAIR_SOURCES. The pictures do not depend on `seed`, only their order."""
    items = synthetic.PAIR_SOURCES[name]()
    samples = [Sample(item.key, partial(item.draw, synthetic.NATIVE_SIZE), list(item.captions)) for item in items]
    return RowSource(samples, seed=seed, identity=f"synthetic:{name} {len(samples)}", resample=resample)


def table_source(
    source: str | Path | Sequence[str | Path],
    table_format: TableFormat,
    *,
    seed: int,
    resident_bytes: int,
    resample: bool = False,
) -> RowSource:
    """Return the rows (image, caption) of a table, or of several as if they were one.

    Rows with the same path are one sample with several captions. Images are paths (relative to the table's folder),
    encoded bytes, or Hugging Face's {"bytes", "path"}. Captions are texts or lists of texts; numbers are taken as they
    are written.
    Raises FileNotFoundError, and ValueError that names a missing column, one that holds something else, the first
    byte that is not in the encoding, or the line that can be read in more than one way.
    """
    paths = [Path(path) for path in ([source] if isinstance(source, str | Path) else source)]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"no such table: {', '.join(missing)}")
    tables = [_read_table(path, table_format) for path in paths]
    folder = _common_folder(paths)
    images = [_below(folder, path, table["image"]) for path, table in zip(paths, tables, strict=True)]
    names = tables[0].column_names[1:]
    captions = [_joined(paths, [table[name] for table in tables]) for name in names]
    rows = _Rows(_joined(paths, images), captions, folder, table_format.captions)
    samples = list(rows) if sum(table.nbytes for table in tables) <= resident_bytes else rows
    return RowSource(samples, seed=seed, identity=f"{_identity(paths, folder)} {len(rows)}", resample=resample)


def table_labels(source: Sequence[str | Path], table_format: TableFormat) -> tuple[list[str], list[str]]:
    """Return a table's distinct texts, and the names of its classes that Hugging Face's metadata give ([]: none).

    Raises what `table_source` raises.
    """
    paths = [Path(path) for path in source]
    if missing := [str(path) for path in paths if not path.is_file()]:
        raise FileNotFoundError(f"no such table: {', '.join(missing)}")
    texts: dict[str, None] = {}
    for path in paths:
        column = _read_table(path, table_format).column(1)
        if any(is_list(column.type) for is_list in _IS_LIST):
            raise ValueError(f"{path}: an image must have one label (got lists of them)")
        texts |= dict.fromkeys(text for text in pc.unique(column).to_pylist() if text is not None)
    return list(texts), _named_classes(paths[0], table_format)


def _named_classes(path: Path, table_format: TableFormat) -> list[str]:
    if path.suffix.lower() != ".parquet":
        return []
    schema = pa.parquet.read_schema(path)
    metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    feature = metadata.get("info", {}).get("features", {}).get(_columns(path, schema.names, table_format)[1], {})
    return list(feature.get("names", ())) if isinstance(feature, dict) else []


def _identity(paths: Sequence[Path], folder: Path) -> str:
    if len(paths) == 1:
        return paths[0].name
    names = " ".join(os.path.relpath(path, folder) for path in paths)
    return f"{len(paths)} tables {zlib.crc32(names.encode()):08x}"


def _common_folder(paths: Sequence[Path]) -> Path:
    folders = {path.parent for path in paths}
    return folders.pop() if len(folders) == 1 else Path(os.path.commonpath([folder.absolute() for folder in folders]))


def _below(folder: Path, path: Path, images: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return paths relative to the tables' common folder, so that equal paths are one picture."""
    between = os.path.relpath(path.parent.absolute(), folder.absolute())
    if between == os.curdir:
        return images
    if pa.types.is_struct(images.type):
        raise ValueError(f"{path}: tables in several folders must hold paths or encoded bytes (got {images.type})")
    if images.type != TEXT:
        return images
    as_it_is = pc.or_(pc.equal(images, ""), pc.starts_with(images, os.sep))
    return pc.if_else(
        as_it_is, images, pc.binary_join_element_wise(pa.scalar(between, TEXT), images, pa.scalar(os.sep, TEXT))
    )


def _joined(paths: Sequence[Path], columns: Sequence[pa.ChunkedArray]) -> pa.ChunkedArray:
    for path, column in zip(paths, columns, strict=True):
        if column.type != columns[0].type:
            raise ValueError(
                f"all tables must have the same column types: {path} has {column.type}, {paths[0]} {columns[0].type}"
            )
    return pa.chunked_array([chunk for column in columns for chunk in column.chunks], columns[0].type)


class _Rows(Sequence):
    """Rows of a table as Samples, made on access; the rows of one picture are one Sample.

    captions: the columns that have them; fields: their names, where captions are drawn by field.
    """

    def __init__(
        self,
        images: pa.ChunkedArray,
        captions: Sequence[pa.ChunkedArray],
        folder: Path,
        fields: Sequence[str] = (),
    ):
        # In the chunks they were read in: one array of texts or bytes holds at most 2 GiB.
        self.images, self.captions, self.fields = images, captions, fields
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
        columns = [[text for row in rows for text in _texts(column[row])] for column in self.captions]
        fields = [name for name, texts in zip(self.fields, columns, strict=False) for _ in texts]
        captions = [text for texts in columns for text in texts]
        return Sample(key, image or None, captions, "" if image else "no image", fields=fields)


def _texts(cell: pa.Scalar) -> list[str]:
    captions = cell.as_py()
    return [text for text in (captions if isinstance(captions, list) else [captions]) if text is not None]


def _grouped(paths: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return the rows of each path; rows without a path are separate.

    The order must not change, as runs resume from it: Arrow's for short text, else that of first occurrence.
    """
    rows = pa.array(np.arange(len(paths)))
    missing = pc.equal(pc.fill_null(paths, ""), "")
    if not pc.any(missing).as_py() and paths.nbytes < 2**31:
        table = pa.table({"path": paths.cast(pa.string()), "row": rows})
        return table.group_by("path", use_threads=False).aggregate([("row", "list")])["row_list"]
    alone = pc.if_else(missing, rows, -1)
    table = pa.table({"path": paths, "alone": alone, "row": rows})
    return table.group_by(["path", "alone"], use_threads=False).aggregate([("row", "list")])["row_list"]


_IS_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view, pa.types.is_null)
_IS_LIST = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def _as_images(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return paths as TEXT from any Arrow text type; bytes and {"bytes", "path"} unchanged."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if any(is_text(kind) for is_text in _IS_TEXT):
        return column.cast(kind).cast(TEXT)
    if pa.types.is_binary_view(kind):
        return column.cast(pa.large_binary())
    if not (pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind)):
        raise ValueError(f'{path}: images must be paths, encoded bytes or {{"bytes", "path"}} (got {kind})')
    return column.cast(kind)


def _as_captions(path: Path, column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return captions as TEXT or lists of TEXT."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
        kind = pa.large_list(kind.value_type)  # whose values Arrow's own cast mixes up
        column = pa.chunked_array([pa.array(chunk.to_pylist(), kind) for chunk in column.chunks], kind)
    several = any(is_list(kind) for is_list in _IS_LIST)
    try:
        return column.cast(kind).cast(pa.large_list(TEXT) if several else TEXT)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
        raise ValueError(f"{path}: captions must be texts or lists of texts (got {kind}; {error})") from error


def _read_table(path: Path, table_format: TableFormat) -> pa.Table:
    """Return the images, and a column for each caption column."""
    parquet = path.suffix.lower() == ".parquet"
    table = _read_parquet(path, table_format) if parquet else _read_text(path, table_format)
    images, *captions = table.columns
    columns = [_as_images(path, images), *(_as_captions(path, column) for column in captions)]
    return pa.table(columns, ["image", *(f"caption {number}" for number in range(len(captions)))])


def _read_parquet(path: Path, table_format: TableFormat) -> pa.Table:
    try:
        names = pa.parquet.read_schema(path).names
        columns = _columns(path, names, table_format)
        table = pa.parquet.read_table(path, columns=columns)
    except (pa.ArrowException, OSError) as error:  # OSError for pages that cannot be decoded
        raise ValueError(f"{path} is not a readable parquet file: {error}") from error
    return table.select(columns)


def _read_text(path: Path, table_format: TableFormat) -> pa.Table:
    text = _separated(path, _content(path, table_format.encoding), table_format)
    if not text.header():
        raise ValueError(f"{path} must have a header with the columns' names (it is empty)")
    columns = _columns(path, text.header(), table_format)
    text.check(lambda field: os.path.isfile(path.parent / field))
    read = pa.csv.ReadOptions(encoding=table_format.encoding)
    parse = pa.csv.ParseOptions(
        delimiter=text.separator, quote_char='"' if text.quoted else False, newlines_in_values=text.quoted
    )
    convert = pa.csv.ConvertOptions(include_columns=columns, column_types=dict.fromkeys(columns, pa.string()))
    stream = pa.input_stream(path, compression="gzip" if path.suffix.lower() == ".gz" else None)
    try:
        table = pa.csv.read_csv(stream, read, parse, convert)
    except (pa.ArrowException, OSError) as error:
        in_utf8(path, unpack(path), table_format.encoding, REMEDY)
        line = text.first_uneven_line(len(text.header()))
        raise ValueError(f"{path} is not a readable table: {f'line {line}: ' if line else ''}{error}") from error
    if len(table) != text.count_rows():
        raise ValueError(f"{path} is not a readable table: {text.count_rows():,} rows became {len(table):,} when read")
    return table


def _content(path: Path, encoding: str) -> bytes:
    """Return the file in UTF-8. A UTF-8 file is not validated, as other columns may contain anything."""
    content = unpack(path)
    if encoding != "utf-8" or content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        content = in_utf8(path, content, encoding, REMEDY)
    content = content.removeprefix(codecs.BOM_UTF8)
    return content if b"\n" in content else content.replace(b"\r", b"\n")  # as old Macintoshes end lines


def _separated(path: Path, content: bytes, table_format: TableFormat) -> Delimited:
    """Return the file with the given separator, or else the first that yields both columns in the header.

    If none does, the file's name decides. Between tabs in a file named tsv, quotes are characters
    of the values.
    """
    tsv = path.name.lower().endswith((".tsv", ".tsv.gz"))
    given = SEPARATORS.get(table_format.separator, table_format.separator)
    likely = ("\t", ",", ";", "|") if tsv else (",", "\t", ";", "|")
    readings = [Delimited(path, content, each, not (tsv and each == "\t")) for each in ([given] if given else likely)]
    return next((text for text in readings if _has_columns(path, text.header(), table_format)), readings[0])


def _has_columns(path: Path, names: Sequence[str], table_format: TableFormat) -> bool:
    try:
        return bool(_columns(path, names, table_format))
    except ValueError:
        return False


def _columns(path: Path, names: Sequence[str], table_format: TableFormat) -> list[str]:
    """Return the names of the image's column and of the captions'. Raises ValueError where one is missing."""
    wanted = table_format.captions or (table_format.caption_column,)
    return [
        column_named(path, names, "image", table_format.image_column, IMAGE_COLUMNS),
        *(column_named(path, names, "caption", name, table_format.caption_columns) for name in wanted),
    ]


def column_named(path: Path | str, names: Sequence[str], kind: str, wanted: str, known: Sequence[str]) -> str:
    """Return the name of a column of `kind`: `wanted`, else the first known one. Raises ValueError where none fits."""
    candidates = (wanted,) if wanted else known
    exact = next((name for name in candidates if name in names), "")
    if names.count(exact) == 1:
        return exact
    for name in [] if exact else candidates:
        alike = [n for n in names if n.strip().lower() == name.strip().lower()]
        if len(alike) == 1:
            return alike[0]
    looked = wanted or ", ".join(known)
    raise ValueError(
        f"{path} has no {kind} column: looked for {looked}, its columns are {', '.join(names)}. "
        f"Name it: --set data.{kind}_column=... (TableFormat({kind}_column=...))"
        + (". Is another character between them? Name that: --set data.separator=..." if len(names) < 2 else "")
    )
