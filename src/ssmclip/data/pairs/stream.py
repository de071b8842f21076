"""Turn raw samples into batches in one reader: a worker process, or the training process if there are none.

Every random draw is a function of (seed, pass, what it is for), never of a generator that lives on. So three things say
where a reader stands: the pass, where its shuffle window starts, and how many samples of the window were taken, whether
they could be used or not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ssmclip.data.images import BadImage, open_image
from ssmclip.data.pairs.augment import TrainTransform
from ssmclip.data.pairs.samples import Sample, generator_for, permutation

MIN_SIDE = 2  # one-pixel pictures are trackers that crawls pick up, not what their captions say
PASS_START = {"start": [0, 0], "taken": 0}

# A reader whose share of a pass is all bad goes on, as each pass deals the shares anew. That none will be better is
# taken for sure after so many in a row; or after so many bad samples, so that a large source needn't be read again.
MOST_BARREN_PASSES = 100
MOST_BARREN_SAMPLES = 100_000

State = dict[str, Any]
Row = tuple[str, list[Any], list[str], torch.Tensor | None]  # key, an image's views, its captions, views' places
Place = list[int]  # of a sample: the pass, where its window starts (two numbers), its place in the window's order


class NoUsableSamples(ValueError):
    """A whole pass over the source, or many passes over one reader's share, without a usable sample."""


@dataclass(frozen=True)
class Batch:
    """keys: the B samples' names.

    images: float (B * views, 3, H, W), an image's views one after the other: views_per_image, then the transform's
    further ones and its window;
    texts: int64 (B * captions_per_image, context_length), its captions likewise;
    boxes: float (B * views_per_image, 5), where the views are in the transform's window (`TrainTransform.views`), if
    it has one.
    """

    images: torch.Tensor
    texts: torch.Tensor
    keys: list[str]
    boxes: torch.Tensor | None = None


@dataclass(frozen=True)
class Made:
    """A batch from a reader, the samples skipped for it as (reason, example), and the reader's state after it."""

    batch: Batch
    reader: int
    state: State
    skips: list[tuple[str, str]]


@dataclass(frozen=True)
class Preparation:
    """How samples become batches.

    cache_bytes: how much memory decoded pictures may take in one reader.
    distinct: no sample is in a batch twice, nor in those that other processes train on in the same step: each reader
        keeps its share of the samples, and one that the batch has already waits for the next.
    texts: what a sample's texts are, for messages.
    """

    transform: Callable[[Image.Image, torch.Generator], torch.Tensor]
    tokenize: Callable[[list[str]], torch.Tensor]
    batch_size: int
    seed: int
    captions_per_image: int = 1
    views_per_image: int = 1
    cache_bytes: int = 0
    distinct: bool = False
    texts: str = "caption"


@runtime_checkable
class Source(Protocol):
    """A source of samples."""

    identity: str
    resident: bool

    def windows(
        self, number: int, reader: int, readers: int, start: Sequence[int], deal: int | None = None
    ) -> Iterator[tuple[list[int], Sequence[Sample]]]:
        """Yield pass `number` of one reader from `start` on ([0, 0]: all), as (where a window starts, its samples).

        deal: the pass whose deal gives the readers their shares, in place of this one's.
        """


class BatchTooLarge(ValueError):
    """A batch of distinct samples is to be larger than its reader's share of them."""


class _Unusable(Exception):
    def __init__(self, reason: str, sample: Sample, detail: str = ""):
        self.reason = reason
        self.example = f"{sample.key}: {detail}" if detail else sample.key


class _Filling:
    """A batch that is being filled. distinct: samples that it has already are held for the next batch.

    So it is where a pass begins within a batch: each sample is still in one batch in every pass.
    """

    def __init__(self, distinct: bool):
        self.distinct = distinct
        self.rows: list[Row] = []
        self.held: dict[str, tuple[Row, Place]] = {}
        self._keys: set[str] = set()

    def add(self, row: Row, place: Place) -> bool:
        """Take or hold a sample; return False where it is held already: a whole pass has nothing to fill the batch."""
        key = row[0]
        if not self.distinct or key not in self._keys:
            self.rows.append(row)
            self._keys.add(key)
        elif key in self.held:
            return False
        else:
            self.held[key] = row, place
        return True

    @property
    def held_places(self) -> list[Place]:
        return [place for _, place in self.held.values()]

    def next(self) -> _Filling:
        """Return the batch after this one, begun with what was held."""
        following = _Filling(self.distinct)
        for row, place in self.held.values():
            following.add(row, place)
        return following


class ReaderBatches(IterableDataset):
    """The endless batches of one reader: number first_reader + its worker's number, of `readers` in all ranks.

    A DataLoader asks worker 0 first. `turn` is the reader whose turn it is, so worker 0 becomes that one.
    """

    def __init__(
        self,
        source: Source,
        preparation: Preparation,
        states: Sequence[State],
        turn: int,
        first_reader: int,
        readers: int,
    ):
        self.source = source
        self.preparation = preparation
        self.states = [dict(state) for state in states]
        self.turn = turn
        self.first_reader = first_reader
        self.readers = readers
        self._cache_left = preparation.cache_bytes

    def __iter__(self) -> Iterator[Made]:
        worker = get_worker_info()
        reader = ((worker.id if worker else 0) + self.turn) % len(self.states)
        skips: list[tuple[str, str]] = []
        filling = _Filling(self.preparation.distinct)
        for place in self.states[reader].get("held", ()):
            filling.add(self._prepare(self._sample_at(reader, place), place[0]), place)
        for row, state in self._usable(reader, skips):
            place = [state["pass"], *state["start"], state["taken"] - 1]
            if not filling.add(row, place):
                raise BatchTooLarge(self._too_large(len(filling.rows)))
            if len(filling.rows) == self.preparation.batch_size:
                batch, filling = filling, filling.next()
                held = {"held": batch.held_places} if batch.held else {}
                yield Made(self._batch(batch.rows), reader, {**state, **held}, list(skips))
                skips.clear()

    def _usable(self, reader: int, skips: list[tuple[str, str]]) -> Iterator[tuple[Row, State]]:
        """Yield prepared samples, pass after pass, each with the state after it. Adds unusable ones to `skips`.

        Raises NoUsableSamples.
        """
        state = self.states[reader]
        barren, unusable = 0, Counter()  # passes in a row without a usable sample, and what was wrong in them
        while True:
            whole_pass = state["taken"] == 0 and list(state["start"]) == PASS_START["start"]
            usable = False
            for sample, after in self._samples(reader, state):
                try:
                    row = self._prepare(sample, after["pass"])
                except _Unusable as problem:
                    unusable[problem.reason] += 1
                    skips.append((problem.reason, problem.example))
                    continue
                usable = True
                yield row, after
            if usable or not whole_pass:
                barren, unusable = 0, Counter()
            else:
                barren += 1
                hopeless = barren >= MOST_BARREN_PASSES or unusable.total() >= MOST_BARREN_SAMPLES
                if hopeless or self.readers == 1:
                    raise NoUsableSamples(self._nothing(reader, barren, unusable, skips))
            state = {"pass": state["pass"] + 1, **PASS_START}

    def _samples(self, reader: int, state: State) -> Iterator[tuple[Sample, State]]:
        """Yield what is left of a pass, each sample with the state after it."""
        number, taken = state["pass"], state["taken"]
        for start, window, order in self._windows(reader, number, state["start"]):
            for place in range(taken, len(window)):
                yield window[int(order[place])], {"pass": number, "start": list(start), "taken": place + 1}
            taken = 0

    def _windows(
        self, reader: int, number: int, start: Sequence[int]
    ) -> Iterator[tuple[list[int], Sequence[Sample], np.ndarray]]:
        """Yield where each window of a pass starts, its samples, and the order to take them in."""
        mine = self.first_reader + reader
        deal = 0 if self.preparation.distinct else None
        for begin, window in self.source.windows(number, mine, self.readers, start, deal):
            yield begin, window, permutation(len(window), self.preparation.seed, "window", number, mine, *begin)

    def _sample_at(self, reader: int, place: Place) -> Sample:
        number, *start, taken = place
        _, window, order = next(self._windows(reader, number, start))
        return window[int(order[taken])]

    def _prepare(self, sample: Sample, number: int) -> Row:
        """Return one sample's part of a batch. Raises _Unusable."""
        if sample.problem:
            raise _Unusable(sample.problem, sample, sample.detail)
        captions = [caption for caption in sample.captions if caption.strip()]
        if not captions:
            raise _Unusable(f"{'empty' if sample.captions else 'no'} {self.preparation.texts}", sample)
        picture = self._decode(sample)
        generator = generator_for(self.preparation.seed, number, sample.key)
        drawn = _draw_captions(captions, self.preparation.captions_per_image, generator)
        transform, count = self.preparation.transform, self.preparation.views_per_image
        if isinstance(transform, TrainTransform):
            views, boxes = transform.views(picture, generator, count)
        else:
            views, boxes = [transform(picture, generator) for _ in range(count)], None
        return sample.key, views, drawn, boxes

    def _decode(self, sample: Sample) -> Image.Image | np.ndarray:
        """Decode the picture for the transform: pixels for TrainTransform, a PIL picture for any other."""
        if isinstance(sample.image, Image.Image | np.ndarray):
            return sample.image
        try:
            picture = sample.image() if callable(sample.image) else open_image(sample.image, min_side=MIN_SIDE)
        except BadImage as error:
            raise _Unusable(error.reason, sample, error.detail) from error
        size = 4 * picture.width * picture.height  # Pillow keeps 4 bytes for an RGB pixel
        if isinstance(self.preparation.transform, TrainTransform):
            picture = np.array(picture)
        if size <= self._cache_left:
            self._cache_left -= size
            sample.image = picture
        return picture

    def _batch(self, rows: list[Row]) -> Batch:
        keys = [key for key, *_ in rows]
        pictures = [view for _, views, _, _ in rows for view in views]
        captions = [caption for _, _, drawn, _ in rows for caption in drawn]
        boxes = [each for *_, each in rows if each is not None]
        transform = self.preparation.transform
        images = transform.normalise(pictures) if isinstance(transform, TrainTransform) else torch.stack(pictures)
        return Batch(images, self.preparation.tokenize(captions), keys, torch.cat(boxes) if boxes else None)

    def _too_large(self, usable: int) -> str:
        has = f"has {usable:,}" if self.readers == 1 else f"gives reader {self.first_reader} {usable:,}"
        return (
            f"a batch of distinct samples must have as many as its reader (got {self.preparation.batch_size}, and "
            f"{self.source.identity} {has}): make it smaller, use fewer workers, or set data.distinct=false"
        )

    def _nothing(self, reader: int, passes: int, unusable: Counter[str], skips: list[tuple[str, str]]) -> str:
        counts = ", ".join(f"{count} x {reason}" for reason, count in unusable.most_common()) or "it holds none"
        example = f"; for example {skips[-1][1]}" if skips else ""
        if self.readers == 1:
            return f"a whole pass over {self.source.identity} gave no usable sample: {counts}{example}"
        return (
            f"reader {self.first_reader + reader}'s share of {self.source.identity} gave no usable sample, {passes} "
            f"passes in a row: {counts}{example}; {self.readers} readers (workers x ranks) may be too many for it: "
            "take fewer, or mend the source"
        )


def _draw_captions(captions: list[str], count: int, generator: torch.Generator) -> list[str]:
    """Draw `count` of them at random; if there are fewer, repeat all of them as often as needed, then draw some."""
    if count == 1:
        return [captions[int(torch.randint(len(captions), (), generator=generator))]]
    order = torch.randperm(len(captions), generator=generator).tolist()
    return [captions[order[i % len(order)]] for i in range(count)]
