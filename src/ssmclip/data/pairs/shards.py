"""Samples in webdataset shards: tars in which a picture and its .txt or .json (of labelled ones .cls) share a name."""

from __future__ import annotations

import bz2
import glob
import gzip
import json
import lzma
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

from braceexpand import braceexpand
from webdataset.gopen import gopen
from webdataset.tariterators import group_by_keys, tar_file_expander

from ssmclip.data.images import SUFFIXES
from ssmclip.data.pairs.reinforced import SYNTHETIC_CAPTIONS, read_stored
from ssmclip.data.pairs.remote import Remote, check_reachable, describe, expand, open_shard, scheme_of
from ssmclip.data.pairs.samples import Sample, permutation, with_replacement
from ssmclip.data.tars import TAR_SUFFIXES, read_keys, repeats, short_names, split_name

END_OF_ARCHIVE = bytes(512)
READS_AFTER_END = 100
COMPARED_WHOLE = 2**28  # bytes of shards whose headers are all read when a source is opened, in about a second
UNPACKERS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ\x00": lzma.open}  # by a file's first bytes


@dataclass(frozen=True)
class ShardFormat:
    """What is read of a sample's files.

    captions: fields that captions are drawn from, each the suffix of a text file or else a key of a .json; (): the
        .json's list of captions, else the .txt, else the .json's one.
    stored: whether a teacher's features are read, see `reinforced`; its synthetic captions count among the captions.
    labelled: whether the labels of classes (.cls) are read in place of captions.
    """

    captions: tuple[str, ...] = ()
    stored: bool = False
    labelled: bool = False


def find_shards(source: str | Path) -> list[str]:
    """Return the shards of a tar, a folder of tars, a glob, a brace pattern ("dir/{0000..0012}.tar") or a URL.

    In a glob ** stands for any number of folders. A file that is there is taken as it is named, brackets and all.
    A remote folder ends in a slash. Raises FileNotFoundError naming what is missing and what exists instead; a pattern
    of URLs is not checked.
    """
    source = str(source)
    if scheme_of(source):
        return expand(source)
    if Path(source).is_dir():
        visible = (path for path in Path(source).iterdir() if not path.name.startswith("."))
        found = sorted(str(path) for path in visible if path.name.lower().endswith(TAR_SUFFIXES))
        if not found:
            raise FileNotFoundError(f"{source} contains no .tar, only {_listing(Path(source))}")
        return found
    shards = list(braceexpand(source))
    if not is_local(source):
        return shards
    shards = [path for pattern in shards for path in _matches(pattern)]
    if missing := [shard for shard in shards if not Path(shard).is_file()]:
        some = ", ".join(missing[:5]) + (" ..." if len(missing) > 5 else "")
        raise FileNotFoundError(
            f"{len(missing)} of {len(shards)} shards are missing: {some}; {_nearby(Path(missing[0]))}"
        )
    return shards


def _matches(pattern: str) -> list[str]:
    if Path(pattern).is_file() or not any(char in pattern for char in "*?["):
        return [pattern]
    found = sorted(glob.glob(pattern, recursive=True))
    if not found:
        raise FileNotFoundError(f"no file matches {pattern}; {_nearby(Path(pattern))}")
    return found


class ShardSource:
    """Samples in shards. A pass reads the shards in a new order, `window` samples at a time; each window is shuffled.

    Shards are dealt out to the readers. When there are fewer shards than readers, every reader reads all of them and
    takes each n-th sample.

    A sample's key is its key in the shard, from which all its random draws come. Shards may begin again at the same
    key: in a shard that has a key of an earlier one, all are SHARD/KEY. The earlier shard's stay as they are, so that
    wherever keys differ anyway the draws are those of older versions, whose runs go on here.

    resample: each reader draws its shards from all of them with replacement, as many in a pass as its share would be,
    and all keys are SHARD/KEY.
    Raises FileNotFoundError when remote shards cannot be reached.
    """

    def __init__(
        self,
        shards: Sequence[str],
        *,
        seed: int,
        window: int,
        resident_bytes: int,
        resample: bool = False,
        shard_format: ShardFormat | None = None,
        remote: Remote | None = None,
    ):
        self.resample, self.format, self.remote = resample, shard_format or ShardFormat(), remote or Remote()
        if fetched := [shard for shard in shards if scheme_of(shard)]:
            check_reachable(fetched, self.remote)
        self.shards = list(shards)
        self.seed = seed
        self.window = window
        self.local = all(is_local(shard) for shard in self.shards)
        self.num_bytes = sum(Path(shard).stat().st_size for shard in self.shards) if self.local else None
        self.resident = self.local and self.num_bytes <= resident_bytes
        self._kept: dict[str, list[Sample]] = {}
        self._names = dict(zip(self.shards, short_names(self.shards), strict=True))
        self._repeating = self._shards_that_repeat()

    def _shards_that_repeat(self) -> set[str]:
        """Return the shards that have a key of one before them.

        Of large shards only the first keys are compared, which are alike where numbering begins again; remote ones
        would have to be fetched for it. What is missed so is told apart within a window, by `windows`.
        """
        if self.resample:
            return set(self.shards) if len(self.shards) > 1 else set()
        if not self.local or len(self.shards) == 1:
            return set()
        most = None if self.num_bytes <= COMPARED_WHOLE else 1
        keys = (_leading_keys(shard, most) for shard in self.shards)
        return {shard for shard, repeated in zip(self.shards, repeats(keys), strict=True) if repeated}

    @cached_property
    def num_samples(self) -> int | None:
        """Return the number of samples, counted on first use, which may read every shard. Raises as `count_samples`."""
        return sum(count_samples(shard) for shard in self.shards) if self.local else None

    @property
    def identity(self) -> str:
        names = [shard.rsplit("/", 1)[-1] for shard in self.shards]
        if len(set(names)) < len(names):  # elsewhere file names alone, as in the cursors of older versions
            names = list(self._names.values())
        return f"{len(self.shards)} shards {zlib.crc32(' '.join(names).encode()):08x}"

    def windows(
        self, number: int, reader: int, readers: int, start: Sequence[int], deal: int | None = None
    ) -> Iterator[tuple[list[int], Sequence[Sample]]]:
        """Yield pass `number` of one reader, from `start` on: (where the window starts, its samples).

        deal: see `stream.Source`.
        """
        mine = self._shards_of(number, reader, readers, deal)
        dealt = self.resample or len(self.shards) >= readers
        first, skip = start
        begin, window, keys = [first, skip], [], set()
        for place in range(first, len(mine)):
            for index, sample in enumerate(self._read(mine[place])):
                if place == first and index < skip:
                    continue
                if not dealt and index % readers != reader:
                    continue
                if len(window) == self.window:
                    yield begin, window
                    begin, window, keys = [place, index], [], set()
                if sample.key in keys and not sample.problem and not self.resample:
                    sample = replace(sample, key=f"{self._names[mine[place]]}/{sample.key}")
                keys.add(sample.key)
                window.append(sample)
        if window:
            yield begin, window

    def _shards_of(self, number: int, reader: int, readers: int, deal: int | None) -> list[str]:
        """Return one reader's shards in the order of pass `number`."""
        if self.resample:
            count = -(-len(self.shards) // readers)
            drawn = with_replacement(len(self.shards), count, self.seed, "drawn shards", number, reader)
            return [self.shards[i] for i in drawn]
        order = permutation(len(self.shards), self.seed, "shards", number if deal is None else deal)
        shards = [self.shards[i] for i in order]
        mine = shards[reader::readers] if len(shards) >= readers else shards
        if deal is not None:
            mine = [mine[i] for i in permutation(len(mine), self.seed, "own shards", number, reader)]
        return mine

    def is_empty(self) -> bool:
        """Return whether no shard on this machine has a sample; False where some are elsewhere."""
        return self.local and not any(_leading_keys(shard, 1) for shard in self.shards)

    def _read(self, shard: str) -> Iterator[Sample] | list[Sample]:
        prefix = f"{self._names[shard]}/" if shard in self._repeating else ""
        read = partial(read_shard, shard, prefix, self.format, self.remote)
        if not self.resident:
            return read()
        if shard not in self._kept:
            self._kept[shard] = list(read())
        return self._kept[shard]


def _leading_keys(shard: str, most: int | None) -> list[str]:
    with open(shard, "rb") as file:
        return list(islice(read_keys(file), most))


def read_shard(
    shard: str, prefix: str = "", shard_format: ShardFormat | None = None, remote: Remote | None = None
) -> Iterator[Sample]:
    """Yield the samples of one shard, in order, nothing decoded. prefix: what is put before their keys.

    A shard that can't be opened, or that ends too early, gives one last Sample with that as its problem. The sample
    that was being read when it ended is incomplete and left out.
    """
    failures: list[Exception] = []
    repeated: list[Exception] = []
    try:
        stream = open_shard(shard, remote or Remote()) if scheme_of(shard) else gopen(shard)
    except Exception as error:  # of any kind: files, pipes and web addresses fail in their own ways
        yield Sample(shard, None, [], "missing shard", describe(error) if scheme_of(shard) else str(error))
        return
    with _closing(stream, failures):
        watched = _Watched(stream)
        files = tar_file_expander([{"url": shard, "stream": watched}], handler=_noting(failures))
        last: dict = {}
        read = 0
        for fields in group_by_keys(files, split_name, handler=_noting(repeated)):
            if last:
                yield make_sample(last, prefix, shard_format)
                read += 1
            last = fields
    if not failures and not watched.ended:
        failures.append(tarfile.ReadError("no end-of-archive mark"))
    if last and not failures:
        yield make_sample(last, prefix, shard_format)
    for error in repeated:
        yield Sample(shard, None, [], "repeated file in shard", f"{shard}: {error.args[0]}")
    if failures:
        yield Sample(shard, None, [], "truncated shard", f"{shard} after {read} samples ({_first_words(failures[0])})")


@contextmanager
def _closing(stream, failures: list[Exception]) -> Iterator[None]:
    """Close the stream at the end; only then can a failed pipe command be detected."""
    try:
        yield
    finally:
        try:
            stream.close()
        except OSError as error:
            failures.append(error)


class _Watched:
    """A stream that records how it ended, as tarfile accepts a tar that was cut between two files.

    Unpacked here and not by tarfile, as the end is that of the tar. By its first bytes: a name may say anything.
    """

    def __init__(self, stream):
        self.stream = stream
        self.unpacked = None
        self.ended = False
        self.reads_after_end = 0

    def read(self, size: int) -> bytes:
        self.unpacked = self.unpacked or _unpacked(self.stream)
        data = self.unpacked.read(size)
        if data:
            self.ended = data.endswith(END_OF_ARCHIVE)
        else:  # tarfile reads on up to the size that a header claims, block after block, however large it is
            self.reads_after_end += 1
            if self.reads_after_end > READS_AFTER_END:
                raise tarfile.ReadError("unexpected end of data")
        return data


class _Begun:
    """A stream whose first bytes have already been read."""

    def __init__(self, begin: bytes, stream):
        self.begin = begin
        self.stream = stream

    def read(self, size: int) -> bytes:
        if not self.begin:
            return self.stream.read(size)
        data, self.begin = self.begin[:size], self.begin[size:]
        return data


def _unpacked(stream):
    begin = stream.read(max(map(len, UNPACKERS)))
    whole = _Begun(begin, stream)
    return next((unpacker(whole) for mark, unpacker in UNPACKERS.items() if begin.startswith(mark)), whole)


def _first_words(error: Exception) -> str:
    """Return an error's message without the stream's address, which webdataset adds, so it is reproducible."""
    return str(error.args[0] if error.args else error).split(" @ ")[0]


def _noting(errors: list[Exception]) -> Callable[[Exception], bool]:
    """Return a webdataset handler that records the error and continues."""

    def note(error: Exception) -> bool:
        errors.append(error)
        return True

    return note


def make_sample(fields: dict, prefix: str = "", shard_format: ShardFormat | None = None) -> Sample:
    """Return webdataset's dictionary of one sample (suffix -> bytes) as a Sample whose key begins with `prefix`."""
    key = prefix + fields["__key__"]
    image = next((fields[suffix] for suffix in SUFFIXES if suffix in fields), None)
    if image is None:
        suffixes = ", ".join(name for name in fields if not name.startswith("__"))
        return Sample(key, None, [], "no image", f"it has {suffixes}")
    shard_format = shard_format or ShardFormat()
    try:
        if shard_format.labelled:
            return Sample(key, image, _labels(fields))
        if shard_format.captions or shard_format.stored:
            return _sample_by_fields(key, image, fields, shard_format)
        return Sample(key, image, _captions(fields))
    except UnicodeDecodeError as error:
        return Sample(key, None, [], "caption is not utf-8", str(error))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        return Sample(key, None, [], "broken json", str(error))


def _captions(fields: dict) -> list[str]:
    """Return the json's list of captions, else the text file, else the json's one caption; null means none.

    Raises TypeError for captions that are not text.
    """
    described = json.loads(fields["json"].decode("utf-8-sig")) if "json" in fields else {}
    captions = described.get("captions")
    if not captions and "txt" in fields:
        captions = fields["txt"].decode("utf-8-sig")
    if captions is None:
        captions = described.get("caption")
    if captions is None:
        return []
    return _texts(captions)


def _texts(captions: Any) -> list[str]:
    captions = captions if isinstance(captions, list) else [captions]
    if other := [type(caption).__name__ for caption in captions if not isinstance(caption, str | None)]:
        raise TypeError(f"a caption must be text (got {other[0]})")
    return [caption for caption in captions if caption is not None]


def _labels(fields: dict) -> list[str]:
    """Return the one label that a classifier is to give, from .cls; [] if there is none."""
    return [fields["cls"].decode("utf-8-sig").strip()] if "cls" in fields else []


def _sample_by_fields(key: str, image: bytes, files: dict, shard_format: ShardFormat) -> Sample:
    """Return a sample whose captions know their field, and that can read a teacher's features of all of them.

    The features are of all written captions, then all synthetic ones: those that are not drawn are blank here.
    """
    if not shard_format.stored:
        by_field = [(name, text) for name in shard_format.captions for text in _field(files, name)]
        return Sample(key, image, [text for _, text in by_field], fields=[name for name, _ in by_field])
    written, synthetic = _texts(_written(files)), _field(files, SYNTHETIC_CAPTIONS)
    fields = ["txt"] * len(written) + [SYNTHETIC_CAPTIONS] * len(synthetic)
    names = shard_format.captions or ("txt", SYNTHETIC_CAPTIONS)
    captions = [text if name in names else "" for name, text in zip(fields, [*written, *synthetic], strict=True)]
    data = {suffix: files[suffix] for suffix in ("npz", "pth.gz", "paug.json") if suffix in files}
    stored = partial(read_stored, data, len(written), len(synthetic))
    return Sample(key, image, captions, fields=fields if shard_format.captions else (), stored=stored)


def _written(files: dict) -> str | None:
    return files["txt"].decode("utf-8-sig") if "txt" in files else None


def _field(files: dict, name: str) -> list[str]:
    """Return the captions of a field: the text file of that suffix, else a key of the first .json that has it."""
    if name in files and not name.endswith("json"):
        return [files[name].decode("utf-8-sig")]
    for suffix in sorted((suffix for suffix in files if suffix.split(".")[-1] == "json"), key=len):
        described = json.loads(files[suffix].decode("utf-8-sig"))
        if described.get(name) is not None:
            return _texts(described[name])
    return []


def count_samples(shard: str) -> int:
    """Return a local shard's number of samples, from a `sizes.json` next to it ({shard: samples}) or its headers.

    Raises ValueError for a sizes.json of another form.
    """
    sizes = Path(shard).with_name("sizes.json")
    if sizes.is_file():
        counted = _read_sizes(sizes)
        if Path(shard).name in counted:
            count = counted[Path(shard).name]
            if type(count) is not int or count < 0:  # True is an int too
                raise ValueError(
                    f"{sizes}: {Path(shard).name} must have a number of samples (got {count!r}): fix or remove the file"
                )
            return count
    return sum(1 for _ in read_keys(shard))


def _read_sizes(path: Path) -> dict[str, Any]:
    try:
        counted = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # no JSON, or no text, or nested too deep
        raise ValueError(f"{path} is not JSON ({error}): fix or remove it") from error
    if not isinstance(counted, dict):
        raise ValueError(f"{path} must be {{shard: samples}} (got {type(counted).__name__}): fix or remove it")
    return counted


def is_local(shard: str) -> bool:
    return "://" not in shard and not shard.startswith("pipe:")


def _nearby(path: Path) -> str:
    folder = path.parent
    while not folder.is_dir():
        folder = folder.parent
    return f"{folder.resolve()} holds {_listing(folder)}"


def _listing(folder: Path, most: int = 8) -> str:
    names = sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())
    return (
        ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
        if names
        else "nothing"
    )
