"""Read delimited text (csv, tsv) strictly.

A quote that opens a value and is never closed, or is closed by a quote further down, makes one value of all the rows
between them. Parsers accept that silently, so files are checked here first.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from ssmclip.data.images import SUFFIXES

_PICTURE = re.compile(rf"\.({'|'.join(SUFFIXES)})$", re.IGNORECASE)
_RETURN_ALONE = re.compile(rb"\r(?!\n)")
_FEED, _RETURN = b"\n\r"
_PIECE = 2**24


def read_content(path: Path) -> bytes:
    """Return the contents of a UTF-8 file, without a byte order mark. Raises ValueError as `in_utf8` does."""
    return in_utf8(path, unpack(path)).removeprefix(codecs.BOM_UTF8)


def unpack(path: Path) -> bytes:
    """Return a file's contents, unpacked where its name ends with .gz. Raises ValueError for a damaged one."""
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix.lower() == ".gz" else path.read_bytes()
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} is not a readable gzip file: {error}") from error


def in_utf8(path: Path, content: bytes, encoding: str = "utf-8", remedy: str = "Convert it") -> bytes:
    """Return text of another encoding in UTF-8. remedy: the advice for a file that is not in that encoding.

    Raises ValueError for an encoding that Python does not know, or naming the file and the first byte not in it.
    """
    try:
        return _transcode(content, encoding)
    except LookupError as error:
        raise ValueError(f"{path}: {error}; choose one that Python knows, such as utf-8, latin-1, cp1252") from error
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        likely = "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "latin-1"
        raise ValueError(
            f"{path} is not {encoding}: byte 0x{content[error.start]:02x} at position {error.start} (line {line}). "
            f"{remedy.format(encoding=likely)}: iconv -f {likely.replace('-1', '1')} -t utf-8"
        ) from error


def _transcode(content: bytes, encoding: str) -> bytes:
    """Convert piece by piece, as the whole text may take four times the memory."""
    "".encode(encoding)  # raises LookupError, also for codecs that are not about text
    decoder = codecs.getincrementaldecoder(encoding)()
    starts = range(0, len(content), _PIECE)
    try:
        return b"".join(decoder.decode(content[i : i + _PIECE], i == starts[-1]).encode() for i in starts)
    except UnicodeDecodeError:
        content.decode(encoding)  # raises the same with the place in the whole
        raise


def read_table(path: Path) -> list[dict[str, str]]:
    """Return the rows of a csv file as {name in the header: value}, separated by commas, tabs or semicolons.

    Raises ValueError as `Delimited.rows` and `in_utf8` do.
    """
    content = read_content(path)
    readings = [Delimited(path, content, separator) for separator in (",", "\t", ";")]
    return list(next((text for text in readings if len(text.header()) > 1), readings[0]).rows())


@dataclass(frozen=True)
class Delimited:
    """The contents of such a file. quoted: whether quotes at both ends of a value are no part of it (RFC 4180).

    path: the file named in errors; content: in UTF-8, without a byte order mark.
    """

    path: Path
    content: bytes
    separator: str = ","
    quoted: bool = True

    def header(self) -> list[str]:
        """Return the names in the first line that is not empty, [] where there is none."""
        return next(filter(None, self._records()), [])

    def check(self, is_picture: Callable[[str], bool] | None = None) -> None:
        """Raise ValueError, naming the file and the line, where the file can be read in more than one way.

        That is: a quote that is not closed, text after the quote that closes a value, a value over several lines that
        has rows in it, and a carriage return that ends no line. A line counts as a row when one of several fields
        names a picture, by its suffix or by `is_picture`.
        """
        for place, value in self._values_over_lines:
            if row := _row_in(value.decode(errors="replace"), self.separator, is_picture):
                self._refuse(
                    place,
                    f"a quote opens a value here that goes on over several lines, and one of them, {row[:60]!r}, looks "
                    "like a row: close or remove the quote; where the value is meant so, remove its line breaks",
                )
        for place in self._returns_outside_values():
            self._refuse(place, "a carriage return in the middle of a line, which some readers take for its end")

    def count_rows(self) -> int:
        """Return the number of rows below the header by line ends and quotes alone, which any reader must come to."""
        if not self.content:
            return 0
        text = np.frombuffer(self.content, np.uint8)
        starts = np.append(0, np.flatnonzero(text[:-1] == _FEED) + 1)
        full = (text[starts] != _FEED) & (text[starts] != _RETURN)
        continued = sum(_continuing_lines(value) for _, value in self._values_over_lines)
        return max(0, int(full.sum()) - continued - 1)

    def first_uneven_line(self, columns: int) -> int | None:
        """Return the number of the first line with more or fewer fields than `columns`, None where there is none."""
        reader = self._records()
        try:
            return next((reader.line_num for row in reader if row and len(row) != columns), None)
        except csv.Error:
            return None

    def rows(self, *, skip_spaces: bool = False) -> Iterator[dict[str, str]]:
        """Yield each row as {name in the header: value}.

        skip_spaces: leave out spaces after separators. Raises ValueError for what `check` refuses, and naming the line
        of a row that has not as many fields as the header.
        """
        self.check()
        names: list[str] = []
        reader = self._records(skip_spaces)
        try:
            for row in filter(None, reader):
                if not names:
                    names = row
                elif len(row) == len(names):
                    yield dict(zip(names, row, strict=True))
                else:
                    raise ValueError(
                        f"{self.path}, line {reader.line_num}: must have {len(names)} fields as the header "
                        f"(got {len(row)})"
                    )
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {reader.line_num}: {error}") from error

    def _records(self, skip_spaces: bool = False):
        text = io.TextIOWrapper(io.BytesIO(self.content), encoding="utf-8", errors="replace", newline="")
        quoting = csv.QUOTE_MINIMAL if self.quoted else csv.QUOTE_NONE
        return csv.reader(text, delimiter=self.separator, quoting=quoting, skipinitialspace=skip_spaces)

    @cached_property
    def _values_over_lines(self) -> list[tuple[int, bytes]]:
        """Yield quoted values that contain a line end, with their places. Raises ValueError for misplaced quotes."""
        if not self.quoted:
            return []
        separator = self.separator.encode()
        quoted_value = re.compile(rb'(?<![^\r\n%s])"([^"]*(?:""[^"]*)*)("?)' % re.escape(separator))
        found = []
        for match in quoted_value.finditer(self.content):
            if not match[2]:
                self._refuse(match.start(), "a quote opens a value here and is never closed: close or remove it")
            if self.content[match.end() : match.end() + 1] not in (b"", b"\r", b"\n", separator):
                line, last = self._line(match.start()), self._line(match.end())
                self._refuse(
                    match.start(),
                    "a quote opens a value here, and text follows the quote that closes it"
                    + (f" in line {last}" if last != line else "")
                    + ': close or remove the quote, or write a quote inside a quoted value twice ("")',
                )
            if b"\n" in match[1] or b"\r" in match[1]:
                found.append((match.start(), match[1]))
        return found

    def _returns_outside_values(self) -> Iterator[int]:
        starts = [place for place, _ in self._values_over_lines]
        for match in _RETURN_ALONE.finditer(self.content):
            before = int(np.searchsorted(starts, match.start())) - 1
            if before < 0 or match.start() > starts[before] + len(self._values_over_lines[before][1]):
                yield match.start()

    def _line(self, place: int) -> int:
        return self.content.count(b"\n", 0, place) + 1

    def _refuse(self, place: int, what: str) -> None:
        raise ValueError(f"{self.path}, line {self._line(place)}: {what}")


def _row_in(value: str, separator: str, is_picture: Callable[[str], bool] | None) -> str:
    """Return the first line of a value that looks like a row of the table, "" where none does."""
    for line in re.split(r"[\r\n]+", value):
        fields = [field.strip(' "') for field in line.split(separator)]
        if len(fields) > 1 and any(_PICTURE.search(field) or (is_picture and is_picture(field)) for field in fields):
            return line
    return ""


def _continuing_lines(value: bytes) -> int:
    """Return how many lines begin inside a quoted value and are not empty (the last one ends with the quote)."""
    *middle, last = value.split(b"\n")[1:] or [b"\r"]
    return sum(line[:1] not in (b"", b"\r") for line in middle) + (last[:1] != b"\r")
