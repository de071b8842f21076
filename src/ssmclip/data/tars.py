"""Group the files of a tar into samples, by webdataset's rule, for training, evaluation and counting."""

from __future__ import annotations

import lzma
import re
import tarfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from io import BufferedIOBase
from pathlib import Path

TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

# Files that webdataset leaves out as notes about the shard, and those that macOS packs beside every file it packs.
_NO_SAMPLE = re.compile(r"__[^/]*__(/|$)|(.*/)?__MACOSX/|(.*/)?\.[^/]*$", re.DOTALL)


def split_name(member: str) -> tuple[str, str] | tuple[None, None]:
    """Return (key, suffix) of a file by its path in the tar: folders and all up to the name's first dot, what follows.

    (None, None) for a file that belongs to no sample: one without a suffix, a hidden one and macOS's ._NAME.

    >>> split_name("train/v1.0/a.b.JPG"), split_name("train/._a.jpg")
    (('train/v1.0/a', 'b.jpg'), (None, None))
    """
    folder, slash, name = member.rpartition("/")
    stem, dot, suffix = name.partition(".")
    if not dot or _NO_SAMPLE.match(member):
        return None, None
    return f"{folder}{slash}{stem}", suffix.lower()


@dataclass(frozen=True)
class Member:
    """The place of a file in a tar: its bytes start at `offset`."""

    shard: Path
    offset: int
    size: int

    def read(self) -> bytes:
        """Return the file's contents."""
        with self.shard.open("rb") as file:
            file.seek(self.offset)
            return file.read(self.size)


def index_samples(shard: Path) -> dict[str, dict[str, Member]]:
    """Return the files of each sample of a tar that is not packed: key -> suffix -> place.

    Raises ValueError for a damaged tar and for one that holds a file twice.
    """
    samples: dict[str, dict[str, Member]] = {}
    try:
        end = shard.stat().st_size
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.issparse() and member.offset_data + member.size > end:
                    raise tarfile.ReadError("unexpected end of data")
                key, suffix = split_name(member.name)
                if key is None or not member.isreg():
                    continue
                files = samples.setdefault(key, {})
                if suffix in files:
                    raise ValueError(f"the shard {shard} contains {member.name} twice: pack it again")
                files[suffix] = Member(shard, member.offset_data, member.size)
    except (tarfile.TarError, EOFError) as error:
        raise ValueError(f"the shard {shard} is damaged after {len(samples)} samples: {error}") from error
    return samples


def read_keys(shard: str | BufferedIOBase) -> Iterator[str]:
    """Yield the key of each sample of a tar, a path or an open file, by its headers.

    The tar may be packed. Of a damaged one those before the damage: reading the samples counts it.
    """
    last = None
    try:
        with tarfile.open(shard) if isinstance(shard, str) else tarfile.open(fileobj=shard) as tar:
            for member in tar:
                key, _ = split_name(member.name)
                if key is not None and key != last and member.isreg():
                    yield key
                    last = key
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError, ValueError, OverflowError):
        pass  # the last two for a size of more bytes than any file has


def repeats(keys_of_shards: Iterable[Iterable[str]]) -> list[bool]:
    """Return for each shard whether it repeats a key of an earlier one, so that its keys alone are ambiguous.

    >>> repeats([["0000", "0001"], ["0000", "0001"], ["0002"]])
    [False, True, False]
    """
    seen: set[str] = set()
    repeated = []
    for keys in map(set, keys_of_shards):
        repeated.append(not seen.isdisjoint(keys))
        seen |= keys
    return repeated


def short_names(shards: Iterable[str]) -> list[str]:
    """Return the shards' names without the folders that all of them have in common.

    >>> short_names(["data/a/0.tar", "data/b/0.tar"])
    ['a/0.tar', 'b/0.tar']
    """
    paths = [shard.split("/") for shard in shards]
    common = 0
    while all(len(path) > common + 1 and path[common] == paths[0][common] for path in paths) and paths:
        common += 1
    return ["/".join(path[common:]) for path in paths]
