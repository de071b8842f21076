"""Endless batches of image-caption pairs that can be stopped anywhere and continued with exactly the next one.

The contents of a batch and the format of a cursor are defined in `stream.py`; the sources of samples in
`shards.py` and `tables.py`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from ssmclip.data.images import open_image
from ssmclip.data.pairs.augment import TrainTransform, train_transform
from ssmclip.data.pairs.hub_datasets import PREFIX as STREAMED
from ssmclip.data.pairs.hub_datasets import streamed_source
from ssmclip.data.pairs.labelled import (
    DATASET,
    data_set,
    data_set_samples,
    folder_samples,
    is_class_folders,
    label_format,
)
from ssmclip.data.pairs.mixture import Mixture, Part, Weighted, check_weights
from ssmclip.data.pairs.reinforced import SYNTHETIC_CAPTIONS
from ssmclip.data.pairs.remote import Remote
from ssmclip.data.pairs.shards import TAR_SUFFIXES, ShardFormat, ShardSource, find_shards, is_local
from ssmclip.data.pairs.stream import (
    PASS_START,
    Batch,
    Made,
    NoUsableSamples,
    Preparation,
    ReaderBatches,
    Source,
    State,
)
from ssmclip.data.pairs.tables import (
    TABLE_SUFFIXES,
    RowSource,
    TableFormat,
    is_table,
    synthetic_source,
    table_source,
    tables_in,
)
from ssmclip.data.pairs.workers import outlive_signals

__all__ = [
    "Batch",
    "NoUsableSamples",
    "PairLoader",
    "Remote",
    "TableFormat",
    "Weighted",
    "open_image",
    "open_pairs",
    "train_transform",
]

SYNTHETIC = "synthetic:"
EXAMPLES_PER_REASON = 5


def open_pairs(
    source: str | Path | Sequence[Weighted],
    *,
    transform: Callable[[Image.Image, torch.Generator], torch.Tensor],
    tokenize: Callable[[list[str]], torch.Tensor],
    batch_size: int,
    seed: int,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
    cursor: dict[str, Any] | None = None,
    shuffle_buffer: int = 2048,
    captions_per_image: int = 1,
    views_per_image: int = 1,
    cache_mib: int = 512,
    table_format: TableFormat | None = None,
    distinct: bool = False,
    resample: bool = False,
    caption_shares: Mapping[str, int | float] | None = None,
    stored_teacher: bool = False,
    sizes: Sequence[tuple[int, int]] = (),
    length_buckets: int = 0,
    pad_id: int = 0,
    remote: Remote | None = None,
    labelled: bool = False,
) -> PairLoader:
    """Open an endless, reshuffled stream of batches from `source`.

    source: webdataset shards ("dir/{0000..0012}.tar", a folder of tars, a tar, a glob, a URL such as s3://, gs://,
        https:// or hf://), a csv, tsv or parquet table of (image, caption) or several ("dir/train-*.parquet"),
        "hf-datasets:NAME" for a repository or folder that Hugging Face's `datasets` reads, or "synthetic:NAME"; or
        several of these with weights, of which one is drawn for each sample.
    transform(picture, generator) -> (3, H, W), drawing from that generator only.
    tokenize(n texts) -> int64 (n, context_length).
    workers: processes that prepare batches, 0: none. rank, world_size: this process among those that train together.
    cursor: a PairLoader's `.cursor`; the new loader continues with the batch after it, bit for bit. It takes the same
        source, seed, batch size, number of workers (0 and 1 are the same) and world size.
    shuffle_buffer: samples of a shard stream that are shuffled together, per reader.
    captions_per_image: how many are drawn each time an image is seen, none twice while it has others.
    views_per_image: how many times an image is transformed each time it is seen.
    cache_mib: memory for keeping the decoded pictures of a small source, over all workers; 0 keeps none.
        It never changes the batches.
    distinct: keep a sample from being in a batch twice, as it may be where a batch begins in one pass and ends in the
        next, and from being in batches of several ranks in one step. One that its batch has already waits for the next,
        and each of the readers (workers x ranks) keeps its share of the samples, in a new order in each pass.
    resample: each reader draws shards, or rows of a table, with replacement.
    caption_shares: the probability of each caption field: columns of a table; of shards, keys of the .json or suffixes
        of text files ("txt"). What a sample lacks is counted in `.missing`, and the other fields' are scaled up.
    stored_teacher: read DataCompDR's format: images augmented as a teacher saw them, its features in `Batch.teacher`.
    sizes: (height, width) of which one is drawn for each batch, the same in all ranks, for a TrainTransform.
    length_buckets: how many batches are filled together and then divided by the length of their texts; padding
        (`pad_id`) beyond the longest text of a batch is cut. 0: texts as they come, all padding kept.
    remote: how shards elsewhere are fetched, and where they are kept.
    labelled: take the labels of classes (see `labelled.py`) in place of captions; `source` may be class folders then.

    Samples that can't be used are counted in `.skipped`, not raised. A pass without one that can be raises
    NoUsableSamples; where several readers share the source, many such passes of one of them in a row.
    Raises FileNotFoundError for a missing file or shard, ValueError for a file of an unknown kind and for a table or
    cursor that can't be used, UnknownName for an unknown synthetic source. While iterating, BatchTooLarge where a
    reader has fewer samples than a batch of distinct ones.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1 (got {rank} of {world_size})")
    _check_combination(transform, resample, distinct, sizes, stored_teacher, caption_shares or {})
    if labelled and (caption_shares or stored_teacher or length_buckets):
        raise ValueError(
            "a label has no caption fields, no teacher and no length: leave data.captions, "
            "data.stored_teacher and data.length_buckets out"
        )
    readers = max(workers, 1)
    cache_bytes = cache_mib * 2**20 // readers
    shard_format = ShardFormat(tuple(caption_shares or ()), stored_teacher, labelled)
    table_format = replace(table_format or TableFormat(), captions=shard_format.captions)
    reading = _Reading(
        seed,
        shuffle_buffer,
        cache_bytes,
        label_format(table_format) if labelled else table_format,
        shard_format,
        resample,
        remote or Remote(),
    )
    single = isinstance(source, str | Path)
    opened = _open_source(str(source), reading) if single else _open_mixture(source, reading)
    cache_bytes = cache_bytes if opened.resident else 0
    preparation = Preparation(
        transform,
        tokenize,
        batch_size,
        seed,
        captions_per_image,
        views_per_image,
        cache_bytes,
        distinct,
        caption_shares=dict(caption_shares or {}),
        resample=resample,
        sizes=tuple(sizes),
        length_buckets=length_buckets,
        pad_id=pad_id,
        texts="label" if labelled else "caption",
    )
    return PairLoader(opened, preparation, workers, rank, world_size, cursor)


def _check_combination(
    transform: Any,
    resample: bool,
    distinct: bool,
    sizes: Sequence[tuple[int, int]],
    stored_teacher: bool,
    caption_shares: Mapping[str, int | float],
) -> None:
    if resample and distinct:
        raise ValueError("distinct must be false with resample, which may draw a sample twice: leave one out")
    if (sizes or stored_teacher) and not isinstance(transform, TrainTransform):
        raise ValueError(
            f"sizes and stored_teacher need a TrainTransform (got {type(transform).__name__}): use train_transform"
        )
    known = ("txt", SYNTHETIC_CAPTIONS)
    if stored_teacher and (unknown := [name for name in caption_shares if name not in known]):
        raise ValueError(f"stored_teacher has features of the captions {' and '.join(known)} only (got {unknown[0]})")
    for name, share in caption_shares.items():
        if not (share > 0 and math.isfinite(share)):
            raise ValueError(
                f"the probability of the caption field {name!r} must be above 0 (got {share}): leave it out"
            )


@dataclass(frozen=True)
class _Reading:
    """How any source is read: see `open_pairs`. window: samples of a stream that are shuffled together."""

    seed: int
    window: int
    resident_bytes: int
    table_format: TableFormat
    shard_format: ShardFormat
    resample: bool
    remote: Remote


def _open_mixture(sources: Sequence[Weighted], reading: _Reading) -> Mixture:
    """Open the sources whose weight is not 0. Raises ValueError that names an empty one, and what opening raises."""
    check_weights(sources)
    total = math.fsum(each.weight for each in sources)
    parts = []
    for each in sources:
        if each.weight:
            part = Part(each.label, _open_source(str(each.source), reading), each.weight / total)
            if part.source.is_empty():
                raise ValueError(f"the source {each.label} has no samples: remove it, or give it the weight 0")
            parts.append(part)
    return Mixture(parts)


def _open_source(source: str, reading: _Reading) -> Source:
    seed, resample = reading.seed, reading.resample
    if reading.shard_format.stored and (source.startswith((SYNTHETIC, STREAMED)) or is_table(source)):
        raise ValueError(
            f"a teacher's stored features are read from shards alone (got {source}): set data.stored_teacher=none"
        )
    if reading.shard_format.labelled and source.startswith(DATASET):
        samples = data_set_samples(data_set(source))
        identity = f"{source.split(':')[1]} {len(samples)}"
        return RowSource(samples, seed=seed, identity=identity, resample=resample)
    if reading.shard_format.labelled and is_class_folders(source):
        pictures = folder_samples(Path(source))
        identity = f"{Path(source).name} {len(pictures)}"
        return RowSource(pictures, seed=seed, identity=identity, resample=resample)
    if source.startswith(SYNTHETIC):
        return synthetic_source(source.removeprefix(SYNTHETIC), seed=seed, resample=resample)
    if source.startswith(STREAMED):
        if resample:
            raise ValueError(f"{source} is read in order and cannot be resampled: set data.resample=false")
        return streamed_source(source.removeprefix(STREAMED), reading.table_format, seed=seed, window=reading.window)
    files = tables_in(Path(source)) or ([source] if is_table(source) else find_shards(source))
    tables = [file for file in files if file.lower().endswith(TABLE_SUFFIXES)]
    if tables and len(tables) < len(files):
        others = [file for file in files if file not in tables]
        raise ValueError(f"{source} must be tables or shards, not both: it has {tables[0]} and {others[0]}")
    if tables:
        return table_source(
            files, reading.table_format, seed=seed, resident_bytes=reading.resident_bytes, resample=resample
        )
    if unknown := [file for file in files if is_local(file) and not file.lower().endswith(TAR_SUFFIXES)]:
        raise ValueError(
            f"{unknown[0]} is of unknown type: pass shards ({', '.join(TAR_SUFFIXES)}), a table "
            f"({', '.join(TABLE_SUFFIXES)}) or {SYNTHETIC}NAME"
        )
    return ShardSource(
        files,
        seed=seed,
        window=reading.window,
        resident_bytes=reading.resident_bytes,
        resample=resample,
        shard_format=reading.shard_format,
        remote=reading.remote,
    )


_DEFAULTS = {"distinct": False, "resample": False, "sizes": [], "length_buckets": 0}


def _unusual(preparation: Preparation) -> dict[str, Any]:
    """Return what else decides which samples a batch has, where it is not as always, as JSON-able values."""
    entries = {
        "resample": preparation.resample,
        "sizes": [list(size) for size in preparation.sizes],
        "length_buckets": preparation.length_buckets,
    }
    return {name: value for name, value in entries.items() if value}


def _first_state(source: Source | Mixture) -> State:
    start = {"pass": 0, "start": list(PASS_START["start"]), "taken": PASS_START["taken"]}
    if not isinstance(source, Mixture):
        return start
    return {"drawn": 0, "sources": [dict(start) for _ in source.parts]}


class PairLoader:
    """Iterate it for Batches; it never ends. Made by `open_pairs`.

    skipped: how often each reason for not using a sample occurred, counted again in every pass.
    skipped_examples: a few names for each reason.
    drawn: how many samples are from each source of a mixture. missing: how many had no caption of a field.
    cursor: where it stands after the batch last yielded, as JSON-able values.
    """

    def __init__(
        self,
        source: Source | Mixture,
        preparation: Preparation,
        workers: int,
        rank: int,
        world_size: int,
        cursor: dict[str, Any] | None,
    ):
        readers = max(workers, 1)
        self.skipped: Counter[str] = Counter()
        self.skipped_examples: dict[str, list[str]] = {}
        self.drawn: Counter[str] = Counter({part.name: 0 for part in getattr(source, "parts", ())})
        self.missing: Counter[str] = Counter()
        self._made_of = {
            "source": source.identity,
            "seed": preparation.seed,
            "batch_size": preparation.batch_size,
            "workers": readers,
            "rank": rank,
            "world_size": world_size,
            "distinct": preparation.distinct,
            **_unusual(preparation),
        }
        self._states = [_first_state(source) for _ in range(readers)]
        self._next = 0
        if cursor is not None:
            self._continue_from(cursor)
        self._source = source
        self._workers = workers
        self._make = lambda: ReaderBatches(
            source, preparation, self._states, self._next, rank * readers, world_size * readers
        )
        self._stream: Iterator[Made] | None = None

    @property
    def num_samples(self) -> int | None:
        """Return the number of samples in the source over all ranks; None if it is not on this machine.

        Asked for the first time it may read every shard's headers. Raises ValueError for a broken sizes.json.
        """
        return self._source.num_samples

    @property
    def cursor(self) -> dict[str, Any]:
        return {
            **self._made_of,
            "next": self._next,
            "states": [dict(state) for state in self._states],
            "skipped": dict(self.skipped),
            "skipped_examples": {reason: list(names) for reason, names in self.skipped_examples.items()},
            **({"drawn": dict(self.drawn)} if self.drawn else {}),
            **({"missing": dict(self.missing)} if self.missing else {}),
        }

    def __iter__(self) -> PairLoader:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._start()
        made = next(self._stream)
        self._states[made.reader] = made.state
        self._next = (made.reader + 1) % len(self._states)
        self.drawn.update(made.sources)
        self.missing.update(made.missing)
        for reason, example in made.skips:
            self.skipped[reason] += 1
            examples = self.skipped_examples.setdefault(reason, [])
            if example not in examples and len(examples) < EXAMPLES_PER_REASON:
                examples.append(example)
        return made.batch

    def close(self) -> None:
        """End the worker processes at once. Iterating again continues after the batch last yielded."""
        for worker in getattr(self._stream, "_workers", ()):  # which would first finish the batches they are making
            worker.terminate()
        self._stream = None

    def _start(self) -> Iterator[Made]:
        batches = self._make()
        if not self._workers:
            return iter(batches)
        # Its own generator: a DataLoader would draw from the global one, whose state belongs to the training run.
        return iter(
            DataLoader(
                batches,
                batch_size=None,
                num_workers=self._workers,
                generator=torch.Generator(),
                worker_init_fn=outlive_signals,
            )
        )

    def _continue_from(self, cursor: dict[str, Any]) -> None:
        if missing := [name for name in ("states", "next", "skipped", "skipped_examples") if name not in cursor]:
            raise ValueError(f"the cursor must be one of a PairLoader (it lacks {', '.join(missing)})")
        for name in dict.fromkeys([*self._made_of, *_DEFAULTS]):
            default = _DEFAULTS.get(name)  # older cursors have no such entry, nor has one of a usual stream
            here, made_with = self._made_of.get(name, default), cursor.get(name, default)
            if made_with != here:
                raise ValueError(
                    f"{name} must be the cursor's, {made_with!r} (got {here!r}), or the batches would differ: "
                    "pass the same value, or start without a cursor"
                )
        self._states = [dict(state) for state in cursor["states"]]
        self._next = cursor["next"]
        self.skipped.update(cursor["skipped"])
        self.drawn.update(cursor.get("drawn", {}))
        self.missing.update(cursor.get("missing", {}))
        self.skipped_examples = {reason: list(names) for reason, names in cursor["skipped_examples"].items()}
