"""Shards that are not on this machine: opened through fsspec, read on after a failure, kept on disk if asked.

A shard is one stream of bytes. When reading fails, it is opened again and read on from the same byte, a few times with
longer and longer pauses; what fails for good (no such file, no permission) fails at once.
"""

from __future__ import annotations

import errno
import hashlib
import io
import logging
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from braceexpand import braceexpand
from filelock import FileLock

from ssmclip.files import PARTIAL, whole

_LOG = logging.getLogger(__name__)
T = TypeVar("T")

# What opens an address, by its scheme: the package that is needed. The extra `remote` has those of s3 and http.
PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
    "az": "adlfs",
    "abfs": "adlfs",
}
WEB = ("http", "https")

STALE_AFTER_S = 24 * 3600  # a part that was not touched for so long was left behind by a kill
PROBED = 3  # shards that are tried before a source counts as unreachable
LONGEST_PAUSE_S = 30.0
_FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))


@dataclass(frozen=True)
class Remote:
    """How shards are fetched. retries: how often a failed read is repeated; pause_s: before the first, then doubled.

    cache_dir: folder in which shards are kept, "": none; cache_gib: its size, beyond which the shards that were not
    used for longest are removed, None: unlimited. Processes and runs may share a folder. A shard that changes at its
    address is not noticed.
    """

    retries: int = 4
    pause_s: float = 0.5
    cache_dir: str = ""
    cache_gib: float | None = None


def scheme_of(address: str) -> str:
    """Return what stands before :// in an address that fsspec opens; "" for a file, a pipe and any other.

    >>> scheme_of("s3://bucket/0000.tar"), scheme_of("pipe:cat 0.tar"), scheme_of("file:///0.tar"), scheme_of("0.tar")
    ('s3', '', '', '')
    """
    scheme, separator, _ = address.partition("://")
    if not separator or scheme in ("file", "local") or scheme.startswith("pipe:"):
        return ""
    return scheme if scheme in PACKAGES or scheme in _registered() else ""


def expand(pattern: str) -> list[str]:
    """Return the addresses of a brace pattern, and in each those that a glob or a folder (.../) holds.

    Raises FileNotFoundError for a glob or folder without shards or that cannot be listed, ImportError as `file_system`.
    """
    return [address for part in braceexpand(pattern) for address in _listed(part)]


def check_reachable(shards: Sequence[str], remote: Remote) -> None:
    """Raise FileNotFoundError with the reasons when none of the first shards can be read.

    ImportError as `file_system`. One that can is enough: others that are missing are counted when they are read.
    """
    reasons = []
    for shard in shards[:PROBED]:
        try:
            with open_shard(shard, remote, keep=False) as stream:
                stream.read(1)
            return
        except ImportError:
            raise
        except Exception as error:  # file systems fail in their own ways
            reasons.append(f"{shard}: {describe(error)}")
    raise FileNotFoundError(
        f"none of the first {len(reasons)} of {len(shards)} shards can be read: {'; '.join(reasons)}"
    )


def open_shard(address: str, remote: Remote, *, keep: bool = True) -> io.BufferedIOBase:
    """Return a readable stream of an address of a scheme that fsspec knows. keep: put it into the cache, if any.

    Raises what the file system raises, when it has done so as often as `remote` says; ImportError as `file_system`.
    """
    if remote.cache_dir:
        place = _place_in_cache(address, remote)
        if keep or place.exists():
            return _open_cached(address, place, remote)
    return io.BufferedReader(_Persistent(address, remote), 2**20)


def file_system(address: str) -> tuple[Any, str]:
    """Return fsspec's file system of an address, and the path in it. Raises ImportError that says what to install."""
    import fsspec

    scheme = scheme_of(address)
    options = {"client_kwargs": {"timeout": _patient()}} if scheme in WEB else {}
    try:
        return fsspec.core.url_to_fs(address, **options)
    except ImportError as error:
        package = PACKAGES.get(scheme, f"the package that fsspec needs for {scheme}")
        raise ImportError(f"{address} needs {package}: pip install {package} ({error})") from error


def _patient() -> Any:
    """Return time limits for waiting instead of for a whole shard, which aiohttp gives five minutes."""
    try:
        import aiohttp
    except ImportError:
        return None  # fsspec then says that it is missing
    return aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)


def describe(error: BaseException) -> str:
    """Return an error's type and message on one line; messages may be empty."""
    error = _original(error)
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _original(error: BaseException) -> BaseException:
    """Return why a file counts as not found: fsspec says so of every failure of a web server, unreachable ones too."""
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _registered() -> Sequence[str]:
    import fsspec

    return fsspec.available_protocols()


def _listed(address: str) -> list[str]:
    if not any(char in address for char in "*?[") and not address.endswith("/"):
        return [address]
    pattern = f"{address}*.tar*" if address.endswith("/") else address
    files, path = file_system(pattern)
    try:
        found = sorted(files.unstrip_protocol(name) for name in files.glob(path))
    except Exception as error:  # file systems fail in their own ways
        raise FileNotFoundError(f"the shards {pattern} cannot be listed: {describe(error)}") from error
    if not found:
        raise FileNotFoundError(f"no shard matches {pattern}")
    return found


class _Persistent(io.RawIOBase):
    """A remote file read from beginning to end, opened again and read on where reading failed."""

    def __init__(self, address: str, remote: Remote):
        self.address, self.remote = address, remote
        self.offset = 0
        self._file: Any = None
        self._ranges = True  # whether the server sends parts of a file
        self._again(self._open)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._again(lambda: self._read(len(buffer)))
        buffer[: len(data)] = data
        self.offset += len(data)
        return len(data)

    def close(self) -> None:
        self._drop()
        super().close()

    @property
    def size(self) -> int | None:
        """Return the number of bytes, if the file system says."""
        return getattr(self._file, "size", None)

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._open()
        data = self._file.read(size)
        if not data and self.size is not None and self.offset < self.size:
            raise OSError(f"the connection ended after {self.offset:,} of {self.size:,} bytes")
        return data

    def _open(self) -> None:
        files, path = file_system(self.address)
        web = scheme_of(self.address) in WEB
        # One request for all of it, where a block at a time would be a request each; to go on, parts are needed.
        ranged = self._ranges and self.offset
        self._file = files.open(path, "rb", **({"block_size": 0} if web and not ranged else {}))
        if ranged or not web:
            self._file.seek(self.offset)
            return
        left = self.offset
        while left:
            data = self._file.read(min(left, 2**20))
            if not data:
                raise OSError(f"the connection ended before byte {self.offset:,}")
            left -= len(data)

    def _again(self, attempt: Callable[[], T]) -> T:
        for number in range(self.remote.retries + 1):
            try:
                return attempt()
            except Exception as error:  # file systems fail in their own ways
                self._drop()
                if "range requests" in str(error):
                    self._ranges = False
                if number == self.remote.retries or _is_final(error):
                    raise
                pause = min(self.remote.pause_s * 2**number, LONGEST_PAUSE_S)
                _LOG.warning(
                    "%s: %s at byte %d; trying again in %g s", self.address, describe(error), self.offset, pause
                )
                time.sleep(pause)
        raise AssertionError("unreachable")

    def _drop(self) -> None:
        file, self._file = self._file, None
        with suppress(Exception):  # it is broken already
            if file is not None:
                file.close()


def _is_final(error: BaseException) -> bool:
    """Return whether trying again cannot help."""
    error = _original(error)
    status = getattr(error, "status", None)
    refused = isinstance(status, int) and 400 <= status < 500 and status not in (408, 429)
    return refused or isinstance(error, FileNotFoundError | PermissionError | ImportError | NotImplementedError)


def _place_in_cache(address: str, remote: Remote) -> Path:
    digest = hashlib.blake2b(address.encode(), digest_size=8).hexdigest()
    name = address.partition("?")[0].rstrip("/").rsplit("/", 1)[-1]
    return Path(remote.cache_dir).expanduser() / f"{digest}-{name[-80:]}"


def _open_cached(address: str, place: Path, remote: Remote) -> io.BufferedIOBase:
    """Return the shard from the cache, after putting it there; straight from its address if it cannot be kept."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(place.with_name(f".{place.name}.lock")):  # others that want it wait, and then have it
        try:
            return _opened_again(place)
        except FileNotFoundError:
            pass
        stream = _Persistent(address, remote)
        if remote.cache_gib is not None and (stream.size or 0) > remote.cache_gib * 2**30:
            return io.BufferedReader(stream, 2**20)
        try:
            with io.BufferedReader(stream, 2**20) as source, whole(place) as part, part.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
            opened = _opened_again(place)
        except OSError as error:
            if error.errno not in _FULL:
                raise
            _LOG.warning("%s is full: %s is read without being kept", place.parent, address)
            return io.BufferedReader(_Persistent(address, remote), 2**20)
    _limit(place.parent, remote.cache_gib)
    return opened


def _opened_again(place: Path) -> io.BufferedReader:
    file = place.open("rb")
    with suppress(OSError):  # a folder that may only be read keeps its times
        place.touch()
    return file


def _limit(folder: Path, gib: float | None) -> None:
    """Remove the shards that were not used for longest until the rest fits, and parts that a kill left behind.

    One that is being read stays readable where the system lets open files be removed, and is kept where it does not.
    """
    ages: list[tuple[float, int, Path]] = []
    for path in folder.iterdir():
        with suppress(OSError):  # another process has removed it
            state = path.stat()
            if path.name.endswith(PARTIAL):
                if state.st_mtime < time.time() - STALE_AFTER_S:
                    path.unlink()
            elif not path.name.startswith("."):
                ages.append((state.st_mtime, state.st_size, path))
    if gib is None:
        return
    total = sum(size for _, size, _ in ages)
    for _, size, path in sorted(ages):
        if total <= gib * 2**30:
            return
        with suppress(OSError):
            path.unlink()
            total -= size
