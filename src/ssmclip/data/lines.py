"""Split text into lines, which end only with a line feed, with or without a carriage return.

`str.splitlines` also cuts at form feeds, U+0085, U+2028 and others, which are characters like any other inside a
caption or a JSON string.
"""

from __future__ import annotations

from pathlib import Path


def split_lines(text: str) -> list[str]:
    r"""Return the lines of a text without their ends.

    >>> split_lines("a dog\u2028runs\r\n\na cat\x0c")
    ['a dog\u2028runs', '', 'a cat\x0c']
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [line.removesuffix("\r") for line in lines]


def read_lines(path: Path) -> list[str]:
    """Return the lines of a UTF-8 file without their ends, and without a byte order mark.

    Raises ValueError naming the file and the line that is not UTF-8.
    """
    content = path.read_bytes()
    try:
        return split_lines(content.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason}): convert the file to UTF-8") from error
