"""Endless batches of image-caption pairs that can be stopped anywhere and continued with exactly the next one.

The contents of a batch and the format of a cursor are defined in `stream.py`; the sources of samples in
`shards.py` and `tables.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.utils.data import DataLoader

from ssmclip.data.images import open_image
from ssmclip.data.pairs.augment import train_transform
from ssmclip.data.pairs.labelled import (
    DATASET,
    data_set,
    data_set_samples,
    folder_samples,
    is_class_folders,
    label_format,
)
from ssmclip.data.pairs.shards import TAR_SUFFIXES, ShardSource, find_shards, is_local
from ssmclip.data.pairs.stream import Batch, Made, NoUsableSamples, Preparation, ReaderBatches
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

__all__ = ["Batch", "NoUsableSamples", "PairLoader", "TableFormat", "open_image", "open_pairs", "train_transform"]

SYNTHETIC = "synthetic:"
EXAMPLES_PER_REASON = 5


def open_pairs(
    source: str | Path,
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
    labelled: bool = False,
) -> PairLoader:
    """Open an endless, reshuffled stream of batches from `source`.

    source: webdataset shards ("dir/{0000..0012}.tar", a folder of tars, a tar, a glob, a URL),
        a csv, tsv or parquet table of (image, caption) or several ("dir/train-*.parquet"), or "synthetic:NAME".
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

    labelled: take the labels of classes (see `labelled.py`) in place of captions; `source` may be class folders then.

    Samples that can't be used are counted in `.skipped`, not raised. A pass without one that can be raises
    NoUsableSamples; where several readers share the source, many such passes of one of them in a row.
    Raises FileNotFoundError for a missing file or shard, ValueError for a file of an unknown kind and for a table or
    cursor that can't be used, UnknownName for an unknown synthetic source. While iterating, BatchTooLarge where a
    reader has fewer samples than a batch of distinct ones.
    """
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be from 0 to world_size - 1 (got {rank} of {world_size})")
    readers = max(workers, 1)
    cache_bytes = cache_mib * 2**20 // readers
    opened = _open_source(str(source), seed, shuffle_buffer, cache_bytes, table_format or TableFormat(), labelled)
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
        "label" if labelled else "caption",
    )
    return PairLoader(opened, preparation, workers, rank, world_size, cursor)


def _open_source(
    source: str, seed: int, window: int, resident_bytes: int, table_format: TableFormat, labelled: bool
) -> ShardSource | RowSource:
    if labelled and source.startswith(DATASET):
        samples = data_set_samples(data_set(source))
        return RowSource(samples, seed=seed, identity=f"{source.split(':')[1]} {len(samples)}")
    if labelled and is_class_folders(source):
        pictures = folder_samples(Path(source))
        return RowSource(pictures, seed=seed, identity=f"{Path(source).name} {len(pictures)}")
    table_format = label_format(table_format) if labelled else table_format
    if source.startswith(SYNTHETIC):
        return synthetic_source(source.removeprefix(SYNTHETIC), seed=seed)
    files = tables_in(Path(source)) or ([source] if is_table(source) else find_shards(source))
    tables = [file for file in files if file.lower().endswith(TABLE_SUFFIXES)]
    if tables and len(tables) < len(files):
        others = [file for file in files if file not in tables]
        raise ValueError(f"{source} must be tables or shards, not both: it has {tables[0]} and {others[0]}")
    if tables:
        return table_source(files, table_format, seed=seed, resident_bytes=resident_bytes)
    if unknown := [file for file in files if is_local(file) and not file.lower().endswith(TAR_SUFFIXES)]:
        raise ValueError(
            f"{unknown[0]} is of unknown type: pass shards ({', '.join(TAR_SUFFIXES)}), a table "
            f"({', '.join(TABLE_SUFFIXES)}) or {SYNTHETIC}NAME"
        )
    return ShardSource(files, seed=seed, window=window, resident_bytes=resident_bytes, labelled=labelled)


class PairLoader:
    """Iterate it for Batches; it never ends. Made by `open_pairs`.

    skipped: how often each reason for not using a sample occurred, counted again in every pass.
    skipped_examples: a few names for each reason.
    cursor: where it stands after the batch last yielded, as JSON-able values.
    """

    def __init__(
        self,
        source: ShardSource | RowSource,
        preparation: Preparation,
        workers: int,
        rank: int,
        world_size: int,
        cursor: dict[str, Any] | None,
    ):
        readers = max(workers, 1)
        self.skipped: Counter[str] = Counter()
        self.skipped_examples: dict[str, list[str]] = {}
        self._made_of = {
            "source": source.identity,
            "seed": preparation.seed,
            "batch_size": preparation.batch_size,
            "workers": readers,
            "rank": rank,
            "world_size": world_size,
            "distinct": preparation.distinct,
        }
        self._states = [{"pass": 0, "start": [0, 0], "taken": 0} for _ in range(readers)]
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
        }

    def __iter__(self) -> PairLoader:
        return self

    def __next__(self) -> Batch:
        if self._stream is None:
            self._stream = self._start()
        made = next(self._stream)
        self._states[made.reader] = made.state
        self._next = (made.reader + 1) % len(self._states)
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
        for name, here in self._made_of.items():
            made_with = cursor.get(name, False if name == "distinct" else None)  # older cursors have no such entry
            if made_with != here:
                raise ValueError(
                    f"{name} must be the cursor's, {made_with!r} (got {here!r}), or the batches would differ: "
                    "pass the same value, or start without a cursor"
                )
        self._states = [dict(state) for state in cursor["states"]]
        self._next = cursor["next"]
        self.skipped.update(cursor["skipped"])
        self.skipped_examples = {reason: list(names) for reason, names in cursor["skipped_examples"].items()}
