"""Write files atomically, lock what only one process may write, and parse JSON that others wrote."""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

_LOST = {errno.EIO, errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quotas' code
PARTIAL = ".partial"  # the suffix of a file that is being written, or that a kill left behind


@contextmanager
def whole(path: str | Path, *, durable: bool = False) -> Iterator[Path]:
    """Yield a temporary path next to `path` to write to; when the block ends, it replaces `path`.

    A reader sees the old file or the new one, never a part; if the block raises, the old file stays and the part is
    removed. Missing folders are created. Two processes may write one path: the last to finish wins.
    durable: ask the disk to keep it through a power cut, as far as the file system can (see `flush`).
    Raises OSError when the path cannot be written, as on a full disk.
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
    """Ask the disk to keep a file, or a folder's entries, now, where the system can do so.

    Network and FUSE file systems may be unable to for folders, or at all; Windows cannot open a folder. That is no
    error. Raises OSError if the disk reports that the data is lost: it is full, over a quota, or broken.
    """
    try:
        # Windows flushes files that are open for writing, and those only.
        handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno in _LOST:
            raise


def parse_json(text: str | bytes, **how: Any) -> Any:
    """Return what `json.loads` returns. Raises ValueError for text that is not JSON, or nested too deep to be read."""
    try:
        return json.loads(text, **how)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


@contextmanager
def locked(path: Path, refusal: str, *, remove: bool = False) -> Iterator[None]:
    """Hold a lock, the file `path`, against other processes until the block or this process ends.

    remove: remove the file at the end. Raises FileExistsError with `refusal` when another process holds the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _open_to_lock(path, refusal):
        try:
            yield
        finally:
            if remove:
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()


def _open_to_lock(path: Path, refusal: str) -> IO:
    for last in (*[False] * 99, True):  # a file system that numbers its files differently each time ends this, too
        file = path.open("w")
        if not _lock(file):
            break
        if last or _is_at(path, file):
            return file
        file.close()  # its last holder removed it between our opening and our locking it
    file.close()
    raise FileExistsError(refusal)


def _is_at(path: Path, file: IO) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _lock(file: IO) -> bool:
    """Lock an open file until it is closed or this process ends; return false when another process holds the lock.

    A POSIX lock, which processes that read data don't inherit: they outlive a killed run by seconds.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return True
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:  # a file system without locks, as some of clusters: no reason not to write there
        pass
    return True
