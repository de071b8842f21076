"""Image-caption pairs streamed through Hugging Face's `datasets`: a repository of the hub, or a local folder."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ssmclip.data.pairs.samples import Sample, draw_seed
from ssmclip.data.pairs.tables import CAPTION_COLUMNS, IMAGE_COLUMNS, TableFormat, column_named

PREFIX = "hf-datasets:"


def streamed_source(name: str, table_format: TableFormat, *, seed: int, window: int) -> StreamedSource:
    """Return the split of a data set as a source. name: a repository or a folder, "#SPLIT" after it (train if not).

    Raises ImportError without the package `datasets`; FileNotFoundError for a data set or split that is not there;
    ValueError for one without an image or caption column.
    """
    try:
        import datasets
    except ImportError as error:
        raise ImportError(f"{PREFIX}{name} needs the package datasets: pip install 'ssmclip[datasets]'") from error
    repository, _, split = name.partition("#")
    folder = Path(repository).expanduser()
    try:
        dataset = datasets.load_dataset(
            str(folder) if folder.exists() else repository, split=split or "train", streaming=True
        )
        names = list(dataset.features or next(iter(dataset), {}))
    except (OSError, ValueError) as error:  # datasets raises both for repositories and for splits
        raise FileNotFoundError(f"{PREFIX}{name} cannot be opened: {str(error).splitlines()[0][:300]}") from error
    except datasets.exceptions.DatasetsError as error:
        raise FileNotFoundError(f"{PREFIX}{name} cannot be opened: {error}") from error
    where = f"{PREFIX}{name}"
    image = column_named(where, names, "image", table_format.image_column, IMAGE_COLUMNS)
    wanted = table_format.captions or (table_format.caption_column,)
    captions = [column_named(where, names, "caption", caption, CAPTION_COLUMNS) for caption in wanted]
    if isinstance((dataset.features or {}).get(image), datasets.Image):
        dataset = dataset.cast_column(image, datasets.Image(decode=False))
    dataset = dataset.select_columns(list(dict.fromkeys([image, *captions])))
    fields = dict(zip(captions, table_format.captions or [""] * len(captions), strict=True))
    return StreamedSource(dataset, where, image, fields, folder=folder, seed=seed, window=window)


class StreamedSource:
    """Samples of a `datasets.IterableDataset`. A pass reads its files in a new order; each window is shuffled.

    Its files are dealt out to the readers. When there are fewer files than readers, every reader reads all of them and
    takes each n-th sample. Where a window starts is three values: 0, the number of samples read, and the data set's own
    `state_dict` there. A sample's key is the digest of its picture, as a stream numbers nothing.
    """

    resident = False
    num_samples = None

    def __init__(
        self, dataset: Any, name: str, image: str, captions: dict[str, str], *, folder: Path, seed: int, window: int
    ):
        """captions: the field that each caption column stands for, "" where captions are not drawn by field."""
        self.dataset, self.image, self.captions, self.folder = dataset, image, captions, folder
        self.seed, self.window = seed, window
        self.identity = f"{name} in {dataset.num_shards} files"

    def is_empty(self) -> bool:
        """Return whether there is no sample, which reads the first one."""
        return next(iter(self.dataset), None) is None

    def windows(
        self, number: int, reader: int, readers: int, start: Sequence[Any], deal: int | None = None
    ) -> Iterator[tuple[list[Any], Sequence[Sample]]]:
        """Yield pass `number` of one reader, from `start` on: (where the window starts, its samples).

        deal: see `stream.Source`.
        """
        dataset, dealt = self._share(number if deal is None else deal, reader, readers)
        _, count, *states = start
        for state in states:
            dataset.load_state_dict(state)
        begin, window, keys = list(start), [], set()
        # In batches of one: a plain loop in a worker of a DataLoader takes the worker's share of the files, once more.
        for batch in dataset.iter(batch_size=1):
            count += 1
            if dealt or (count - 1) % readers == reader:
                sample = self._sample({name: values[0] for name, values in batch.items()}, keys)
                keys.add(sample.key)
                window.append(sample)
            if len(window) == self.window:
                yield begin, window
                begin, window, keys = [0, count, dataset.state_dict()], [], set()
        if window:
            yield begin, window

    def _share(self, deal: int, reader: int, readers: int) -> tuple[Any, bool]:
        """Return the data set in the order of a pass, and whether it is this reader's files alone."""
        shuffled = self.dataset.shuffle(seed=draw_seed(self.seed, "files", deal) % 2**32, buffer_size=1)
        dealt = self.dataset.num_shards >= readers
        return (shuffled.shard(num_shards=readers, index=reader) if dealt else shuffled), dealt

    def _sample(self, row: dict[str, Any], keys: set[str]) -> Sample:
        image = row[self.image]
        data = (image.get("bytes") or image.get("path")) if isinstance(image, dict) else image
        columns = {name: row[name] if isinstance(row[name], list) else [row[name]] for name in self.captions}
        texts = [(self.captions[name], text) for name, column in columns.items() for text in column if text is not None]
        if other := [type(text).__name__ for _, text in texts if not isinstance(text, str)]:
            return Sample(_key(data), None, [], "caption is not text", f"a caption must be text (got {other[0]})")
        fields = [field for field, _ in texts] if any(self.captions.values()) else ()
        problem = "" if data else "no image"
        picture = self.folder / data if isinstance(data, str) else data
        return Sample(_key(data), picture or None, [text for _, text in texts], problem, fields=fields)


def _key(data: bytes | str | None) -> str:
    raw = data.encode() if isinstance(data, str) else data or b""
    return hashlib.blake2b(raw, digest_size=8).hexdigest()
