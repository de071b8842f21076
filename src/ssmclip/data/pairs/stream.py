"""Turn raw samples into batches in one reader: a worker process, or the training process if there are none.

Every random draw is a function of (seed, pass, what it is for), never of a generator that lives on. So three things say
where a reader stands: the pass, where its shuffle window starts, and how many samples of the window were taken, whether
they could be used or not. A reader of a mixture stands somewhere in each source, and has drawn some number of samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset, get_worker_info

from ssmclip.data.images import BadImage, open_image
from ssmclip.data.pairs.augment import TrainTransform
from ssmclip.data.pairs.captions import draw_by_field, draw_captions
from ssmclip.data.pairs.mixture import Mixture, Part
from ssmclip.data.pairs.samples import Sample, draw_seed, generator_for, permutation

MIN_SIDE = 2  # one-pixel pictures are trackers that crawls pick up, not what their captions say
PASS_START = {"start": [0, 0], "taken": 0}

# A reader whose share of a pass is all bad goes on, as each pass deals the shares anew. That none will be better is
# taken for sure after so many in a row; or after so many bad samples, so that a large source needn't be read again.
MOST_BARREN_PASSES = 100
MOST_BARREN_SAMPLES = 100_000

State = dict[str, Any]
# Of a sample: the pass, where its window starts (two numbers, or more), its place in the window's order. In a mixture
# these follow the number of the source.
Place = list[Any]


class NoUsableSamples(ValueError):
    """A whole pass over the source, or many passes over one reader's share, without a usable sample."""


@dataclass(frozen=True)
class Teacher:
    """A teacher's stored features of a batch, float32, in the order of the batch's images and texts.

    images: (B * views_per_image, E); texts: (B * captions_per_image, E).
    """

    images: torch.Tensor
    texts: torch.Tensor


@dataclass(frozen=True)
class Batch:
    """keys: the B samples' names.

    images: float (B * views, 3, H, W), an image's views one after the other: views_per_image, then the transform's
    further ones and its window;
    texts: int64 (B * captions_per_image, context_length), its captions likewise;
    boxes: float (B * views_per_image, 5), where the views are in the transform's window (`TrainTransform.views`), if
    it has one;
    teacher: a teacher's features of both, where the source stores them and they are asked for.
    """

    images: torch.Tensor
    texts: torch.Tensor
    keys: list[str]
    boxes: torch.Tensor | None = None
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Row:
    """One sample's part of a batch: its key, its image's views, the captions drawn.

    boxes: where the views are in the window, if there is one; source: the mixture's source it is from; missing: caption
    fields that it lacks; teacher: see `Teacher`.
    """

    key: str
    views: list[Any]
    captions: list[str]
    boxes: torch.Tensor | None = None
    source: str = ""
    missing: tuple[str, ...] = ()
    teacher: Teacher | None = None


@dataclass(frozen=True)
class Made:
    """A batch from a reader, the samples skipped for it as (reason, example), and the reader's state after it.

    sources: how many of its samples are from each source of a mixture; missing: how many lack each caption field.
    """

    batch: Batch
    reader: int
    state: State
    skips: list[tuple[str, str]]
    sources: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Preparation:
    """How samples become batches.

    cache_bytes: how much memory decoded pictures may take in one reader.
    distinct: no sample is in a batch twice, nor in those that other processes train on in the same step: each reader
        keeps its share of the samples, and one that the batch has already waits for the next.
    caption_shares: the probability of each caption field; {}: fields do not count.
    resample: the source draws with replacement, so that a sample may be seen twice in a pass, differently.
    sizes: (height, width) of which one is drawn for each batch, the same in all ranks; (): the transform's own.
    length_buckets: batches that are filled together and then divided by the length of their texts, whose padding is cut
        to each batch's longest; 0: as they come, with all padding. pad_id: the token that fills up a text.
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
    caption_shares: Mapping[str, int | float] = field(default_factory=dict)
    resample: bool = False
    sizes: Sequence[tuple[int, int]] = ()
    length_buckets: int = 0
    pad_id: int = 0
    texts: str = "caption"

    @property
    def pool(self) -> int:
        """Return how many batches are filled together."""
        return max(self.length_buckets, 1)

    def transform_at(self, number: int) -> Callable[..., torch.Tensor]:
        """Return the transform for a process's batch `number`, or its pool of batches: to one of `sizes`, if any."""
        if not self.sizes:
            return self.transform
        return replace(self.transform, image_size=self.sizes[draw_seed(self.seed, "size", number) % len(self.sizes)])


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
        key = row.key
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

    def next(self, again: Callable[[Place], Row] | None = None) -> _Filling:
        """Return the batch after this one, begun with what was held. again: prepares it again, for another size."""
        following = _Filling(self.distinct)
        for row, place in self.held.values():
            following.add(again(place) if again else row, place)
        return following


class ReaderBatches(IterableDataset):
    """The endless batches of one reader: number first_reader + its worker's number, of `readers` in all ranks.

    A DataLoader asks worker 0 first. `turn` is the reader whose turn it is, so worker 0 becomes that one.
    """

    def __init__(
        self,
        source: Source | Mixture,
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

    @property
    def parts(self) -> list[Part]:
        """Return the sources of a mixture, or the one there is, without a name."""
        return self.source.parts if isinstance(self.source, Mixture) else [Part("", self.source, 1.0)]

    def __iter__(self) -> Iterator[Made]:
        worker = get_worker_info()
        reader = ((worker.id if worker else 0) + self.turn) % len(self.states)
        begin = dict(self.states[reader])
        emitted = begin.pop("emitted", 0)  # batches that were made of the first pool before
        skips: list[tuple[str, str]] = []
        filling = _Filling(self.preparation.distinct)
        self._set_transform(reader, begin)
        for place in begin.get("held", ()):
            filling.add(self._row_at(reader, place), place)
        for row, place, state in self._rows(reader, begin, skips):
            if not filling.add(row, place):
                raise BatchTooLarge(self._too_large(len(filling.rows)))
            if len(filling.rows) == self.preparation.batch_size * self.preparation.pool:
                held = {"held": filling.held_places} if filling.held else {}
                after = {**state, **held, **self._counted(begin)}
                yield from self._pool(reader, filling.rows, begin, after, emitted, skips)
                begin, emitted = after, 0
                self._set_transform(reader, begin)
                filling = filling.next(partial(self._row_at, reader) if self.preparation.sizes else None)

    def _set_transform(self, reader: int, state: State) -> None:
        """Choose the size of the next pool's images: by its number, which is the same in all ranks."""
        pools = state.get("batches", 0) // self.preparation.pool
        self._transform = self.preparation.transform_at(pools * len(self.states) + reader)

    def _counted(self, state: State) -> State:
        """Return how many batches the reader has made after the next pool, where that matters."""
        if not self.preparation.sizes and self.preparation.pool == 1:
            return {}
        return {"batches": state.get("batches", 0) + self.preparation.pool}

    def _pool(
        self, reader: int, rows: list[Row], begin: State, after: State, emitted: int, skips: list[tuple[str, str]]
    ) -> Iterator[Made]:
        """Yield the batches made of rows that were filled together, but for the first `emitted`.

        Within a pool, a state is that at its beginning, and how many batches were made of it. So what is skipped while
        it is filled counts with its first batch.
        """
        for number, (part, texts) in enumerate(self._divided(reader, rows, begin)):
            if number < emitted:
                continue
            state = after if number == self.preparation.pool - 1 else {**begin, "emitted": number + 1}
            sources = Counter(row.source for row in part if row.source)
            missing = Counter(name for row in part for name in row.missing)
            yield Made(self._batch(part, texts), reader, state, [] if number else list(skips), sources, missing)
        skips.clear()

    def _divided(self, reader: int, rows: list[Row], begin: State) -> Iterator[tuple[list[Row], torch.Tensor]]:
        """Yield the rows of each batch with their tokens; of several batches, rows with texts of similar length."""
        texts = self.preparation.tokenize([caption for row in rows for caption in row.captions])
        pool, each = self.preparation.pool, self.preparation.captions_per_image
        if not self.preparation.length_buckets:
            yield rows, texts
            return
        tokens = texts.unflatten(0, (len(rows), each))
        lengths = text_lengths(texts, self.preparation.pad_id).view(len(rows), each).amax(1)
        buckets = lengths.argsort(stable=True).view(pool, -1)
        mine = self.first_reader + reader
        for bucket in permutation(pool, self.preparation.seed, "buckets", mine, begin.get("batches", 0)):
            chosen = buckets[int(bucket)].sort().values  # in the order of the stream
            width = int(lengths[chosen].max())
            yield [rows[i] for i in chosen.tolist()], tokens[chosen, :, :width].flatten(0, 1)

    def _rows(self, reader: int, state: State, skips: list[tuple[str, str]]) -> Iterator[tuple[Row, Place, State]]:
        """Yield prepared samples without end: a row, its place, the state after it. Raises NoUsableSamples."""
        parts = self.parts
        if not isinstance(self.source, Mixture):
            for row, after in self._usable(parts[0], reader, state, skips):
                yield row, [after["pass"], *after["start"], after["taken"] - 1], after
            return
        states, number = [dict(each) for each in state["sources"]], state["drawn"]
        streams = [self._usable(part, reader, each, skips) for part, each in zip(parts, states, strict=True)]
        while True:
            i = self.source.choose(self.preparation.seed, self.first_reader + reader, number)
            row, after = next(streams[i])
            number, states = number + 1, [*states[:i], after, *states[i + 1 :]]
            place = [i, after["pass"], *after["start"], after["taken"] - 1]
            yield row, place, {"drawn": number, "sources": states}

    def _usable(
        self, part: Part, reader: int, state: State, skips: list[tuple[str, str]]
    ) -> Iterator[tuple[Row, State]]:
        """Yield prepared samples, pass after pass, each with the state after it. Adds unusable ones to `skips`.

        Raises NoUsableSamples.
        """
        barren, unusable = 0, Counter()  # passes in a row without a usable sample, and what was wrong in them
        while True:
            whole_pass = state["taken"] == 0 and list(state["start"]) == PASS_START["start"]
            usable = False
            for sample, after in self._samples(part, reader, state):
                try:
                    row = self._prepare(sample, after["pass"], part.name, (*after["start"][:2], after["taken"] - 1))
                except _Unusable as problem:
                    unusable[problem.reason] += 1
                    skips.append((problem.reason, f"{part.name}: {problem.example}" if part.name else problem.example))
                    continue
                usable = True
                yield row, after
            if usable or not whole_pass:
                barren, unusable = 0, Counter()
            else:
                barren += 1
                hopeless = barren >= MOST_BARREN_PASSES or unusable.total() >= MOST_BARREN_SAMPLES
                if hopeless or self.readers == 1:
                    raise NoUsableSamples(self._nothing(part, reader, barren, unusable, skips))
            state = {"pass": state["pass"] + 1, **PASS_START}

    def _samples(self, part: Part, reader: int, state: State) -> Iterator[tuple[Sample, State]]:
        """Yield what is left of a pass, each sample with the state after it."""
        number, taken = state["pass"], state["taken"]
        for start, window, order in self._windows(part, reader, number, state["start"]):
            for place in range(taken, len(window)):
                yield window[int(order[place])], {"pass": number, "start": list(start), "taken": place + 1}
            taken = 0

    def _windows(
        self, part: Part, reader: int, number: int, start: Sequence[Any]
    ) -> Iterator[tuple[list[Any], Sequence[Sample], np.ndarray]]:
        """Yield where each window of a pass starts, its samples, and the order to take them in."""
        mine = self.first_reader + reader
        deal = 0 if self.preparation.distinct else None
        for begin, window in part.source.windows(number, mine, self.readers, start, deal):
            yield begin, window, permutation(len(window), self.preparation.seed, "window", number, mine, *begin[:2])

    def _row_at(self, reader: int, place: Place) -> Row:
        """Prepare the sample at a place again."""
        part = self.parts[place[0] if isinstance(self.source, Mixture) else 0]
        number, *start, taken = place[1:] if isinstance(self.source, Mixture) else place
        _, window, order = next(self._windows(part, reader, number, start))
        return self._prepare(window[int(order[taken])], number, part.name, (*start[:2], taken))

    def _prepare(self, sample: Sample, number: int, source: str = "", place: Sequence[int] = ()) -> Row:
        """Return one sample's part of a batch.

        source: its name in a mixture; place: where it is in the pass, which may have it again. Raises _Unusable.
        """
        if sample.problem:
            raise _Unusable(sample.problem, sample, sample.detail)
        usable = [i for i, caption in enumerate(sample.captions) if caption.strip()]
        if not usable:
            raise _Unusable(f"{'empty' if sample.captions else 'no'} {self.preparation.texts}", sample)
        picture = self._decode(sample)
        key = f"{source}/{sample.key}" if source else sample.key
        generator = generator_for(self.preparation.seed, number, key, *(place if self.preparation.resample else ()))
        fields = [sample.fields[i] for i in usable] if sample.fields else []
        chosen = [usable[i] for i in self._draw(fields, len(usable), generator)]
        views, boxes, teacher = self._views(sample, picture, chosen, generator)
        missing = tuple(name for name in self.preparation.caption_shares if name not in fields)
        return Row(key, views, [sample.captions[i] for i in chosen], boxes, source, missing, teacher)

    def _draw(self, fields: Sequence[str], among: int, generator: torch.Generator) -> list[int]:
        """Return which of a sample's captions are taken. fields: of each, where they are drawn by probability."""
        count = self.preparation.captions_per_image
        if not fields:
            return draw_captions(count, among, generator)
        return draw_by_field(count, fields, self.preparation.caption_shares, generator)

    def _views(
        self, sample: Sample, picture: Image.Image | np.ndarray, captions: list[int], generator: torch.Generator
    ) -> tuple[list[torch.Tensor], torch.Tensor | None, Teacher | None]:
        """Return the image's views and their places in a window, if there is one; and where a teacher saw views of its
        own, those, with what it said of them."""
        count, transform = self.preparation.views_per_image, self._transform
        if sample.stored is None:
            if isinstance(transform, TrainTransform):
                return *transform.views(picture, generator, count), None
            return [transform(picture, generator) for _ in range(count)], None, None
        try:
            stored = sample.stored()
            chosen = draw_captions(count, len(stored.augmentations), generator)
            views = [transform.repeated(picture, stored.augmentations[i]) for i in chosen]
        except ValueError as error:
            raise _Unusable("broken teacher data", sample, str(error)) from error
        return views, None, Teacher(stored.images[chosen], stored.texts[captions])

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

    def _batch(self, rows: list[Row], texts: torch.Tensor) -> Batch:
        views = [view for row in rows for view in row.views]
        transform = self._transform
        images = transform.normalise(views) if isinstance(transform, TrainTransform) else torch.stack(views)
        boxes = [row.boxes for row in rows if row.boxes is not None]
        teacher = _joined([row.teacher for row in rows])
        return Batch(images, texts, [row.key for row in rows], torch.cat(boxes) if boxes else None, teacher)

    def _too_large(self, usable: int) -> str:
        asked = self.preparation.batch_size * self.preparation.pool
        has = f"has {usable:,}" if self.readers == 1 else f"gives reader {self.first_reader} {usable:,}"
        return (
            f"a batch of distinct samples must have as many as its reader (got {asked}, and "
            f"{self.source.identity} {has}): make it smaller, use fewer workers, or set data.distinct=false"
        )

    def _nothing(
        self, part: Part, reader: int, passes: int, unusable: Counter[str], skips: list[tuple[str, str]]
    ) -> str:
        counts = ", ".join(f"{count} x {reason}" for reason, count in unusable.most_common()) or "it holds none"
        example = f"; for example {skips[-1][1]}" if skips else ""
        name = f"{part.name} ({part.source.identity})" if part.name else part.source.identity
        if self.readers == 1:
            return f"a whole pass over {name} gave no usable sample: {counts}{example}"
        return (
            f"reader {self.first_reader + reader}'s share of {name} gave no usable sample, {passes} "
            f"passes in a row: {counts}{example}; {self.readers} readers (workers x ranks) may be too many for it: "
            "take fewer, or mend the source"
        )


def text_lengths(tokens: torch.Tensor, pad_id: int) -> torch.Tensor:
    """Return the place after the last token of each text (B, L) that is not padding, int64 (B,); at least 1."""
    padding = (tokens == pad_id).int().flip(1)
    return (tokens.shape[1] - torch.where(padding.all(1), tokens.shape[1], padding.argmin(1))).clamp(min=1)


def _joined(teachers: list[Teacher | None]) -> Teacher | None:
    known = [teacher for teacher in teachers if teacher is not None]
    if not known:
        return None
    return Teacher(torch.cat([each.images for each in known]), torch.cat([each.texts for each in known]))
