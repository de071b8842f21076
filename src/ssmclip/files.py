"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PARTIAL = ".partial"  # the suffix of a file that is being written, or that a kill left behind


@contextmanager
def whole(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; when the block ends, what was written there takes the place of `path`.

    A reader sees the old file or the new one, never a part; when the block raises, the old file stays and the part is
    removed. Folders are made where they are missing. Two processes may write one path: the last to end wins.
    durable: ask the disk to keep it through a power cut, as far as the file system can.
    Raises OSError when the path cannot be written.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}{PARTIAL}")
    try:
        yield part
        if durable:
            flush(part)
        part.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error is the one to tell
            part.unlink(missing_ok=True)
        raise
    if durable:
        flush(path.parent)


def flush(path: Path) -> None:
    """Ask the disk to keep a file, or a folder's entries, now; some file systems cannot do so for folders."""
    with suppress(OSError):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
