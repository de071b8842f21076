"""Images and texts to unit vectors, in batches. Works for any open_clip model.

n images · m texts · d embedding dimensions
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import open_clip
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from ssmclip.evaluate.embeddings import cache, fingerprint, ranks
from ssmclip.models.names import Model

log = logging.getLogger(__name__)

# What opening or decoding a file that is no image, or half of one, raises.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


_HASHES: WeakKeyDictionary[Model, dict[str, dict[str, str]]] = WeakKeyDictionary()


# A model and a batch of its preprocessed images -> what is kept of each image, float32, on the CPU.
Encode = Callable[[Model, Tensor], Tensor]


def _name(function: Encode) -> str:
    return f"{function.__module__}.{function.__qualname__}"


def _once(make: Callable[..., dict[str, str]]) -> Callable[..., dict[str, str]]:
    """Decorator: computed once for each `Model`, whose weights and settings are to stay as they are."""

    @wraps(make)
    def made(clip: Model, *functions: Encode) -> dict[str, str]:
        known = _HASHES.setdefault(clip, {})
        name = " ".join([make.__name__, *map(_name, functions)])
        if name not in known:
            known[name] = make(clip, *functions)
        return known[name]

    return made


@_once
def hashes(clip: Model) -> dict[str, str]:
    """Return what a model under test is, as contents: weights and settings, preprocessing, tokenizer, arithmetic.

    Raises Unsure for parts whose settings cannot all be seen.
    """
    return {
        "model": fingerprint.model_hash(clip.network),
        "preprocess": fingerprint.preprocess_hash(clip.preprocess),
        "tokenizer": fingerprint.tokenizer_hash(clip.tokenizer),
        "arithmetic": f"{clip.dtype} on {clip.device.type}",
    }


@_once
def images_made_of(clip: Model) -> dict[str, str]:
    """Return what embeddings of images depend on other than the images, libraries and back ends included.

    Raises Unsure.
    """

    def encode(picture: Image.Image) -> Tensor:
        return clip.network.encode_image(clip.preprocess(picture)[None].to(clip.device, clip.dtype))

    parts = {part: hashes(clip)[part] for part in ("model", "preprocess", "arithmetic")}
    with inference(clip.network):
        outputs = fingerprint.outputs_hash(encode, fingerprint.probe_pictures()[: fingerprint.SHOWN])
    return parts | {"versions": fingerprint.versions(), "outputs": outputs}


@_once
def outputs_made_of(clip: Model, encode: Encode) -> dict[str, str]:
    """Return what any other outputs for images depend on, as `images_made_of` does for embeddings. Raises Unsure."""

    def output(picture: Image.Image) -> Tensor:
        return encode(clip, clip.preprocess(picture)[None])

    parts = {part: hashes(clip)[part] for part in ("model", "preprocess", "arithmetic")}
    with inference(clip.network):
        outputs = fingerprint.outputs_hash(output, fingerprint.probe_pictures()[: fingerprint.SHOWN])
    return parts | {"versions": fingerprint.versions(), "outputs": outputs, "encode": _name(encode)}


@_once
def texts_made_of(clip: Model) -> dict[str, str]:
    """Return what embeddings of texts depend on other than the texts, as `images_made_of` does. Raises Unsure."""

    def encode(text: str) -> Tensor:
        return encode_tokens(clip.network, clip.tokenizer([text]).to(clip.device))

    parts = {part: hashes(clip)[part] for part in ("model", "tokenizer", "arithmetic")}
    with inference(clip.network):
        outputs = fingerprint.outputs_hash(encode, fingerprint.TEXTS)
    return parts | {"versions": fingerprint.versions(), "outputs": outputs}


@dataclass(frozen=True)
class Settings:
    """How a task is run.

    batch_size: images or texts at a time; workers: processes that open images (0: this one);
    seed: of resampling, of the examples shown and of the subset; max_images: evaluate on a random subset of so many;
    examples: how many images go into the rows as thumbnails (0: none, for data whose pictures may not be passed on);
    truncate: captions longer than so many tokens are also evaluated cut there, if the text tower sees more of them;
    cache: a folder where embeddings are kept, for a model whose weights stay as they are while the `Model` lives.
    Raises ValueError for a number below what it can be.
    """

    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    max_images: int | None = None
    examples: int = 8
    cache: Path | None = None
    truncate: int | None = 77

    def __post_init__(self):
        least = {"batch_size": 1, "workers": 0, "max_images": 1, "examples": 0, "truncate": 1}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value < bound:
                raise ValueError(f"{name} must be at least {bound} (got {value})")


@dataclass(frozen=True)
class ImageEmbeddings:
    """features: unit vectors of the images that could be read, or other outputs for them; index: their places in the
    data set; labels: their classes (-1 where the data set has none); unreadable: place -> why, for the others;
    images_per_s: of the network, of this process, where it has been measured."""

    features: Float[Tensor, "n d"]
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    unreadable: dict[int, str]
    images_per_s: float | None = None


def embed_images(clip: Model, dataset: Any, settings: Settings, encode: Encode | None = None) -> ImageEmbeddings:
    """Embed `dataset[i]`, a PIL image or (PIL image, label), for every i, or for `settings.max_images` of them.

    encode: a named function of its own that gives other outputs than unit vectors, such as a classifier's logits.
    Images that can't be read are counted and named, never replaced. Raises ValueError when there are no images, when
    none could be read, and when an embedding is not finite. Leaves the model's train/eval modes and the global random
    state as they were, so that a training loop may call it at any step.
    """
    if not len(dataset):
        raise ValueError("the data set has no images")
    places = subset(len(dataset), settings)
    if settings.cache is None:
        return _embed_images(clip, dataset, places, settings, encode)
    made_of = cache.sure(
        lambda: {
            **(outputs_made_of(clip, encode) if encode else images_made_of(clip)),
            "data": cache.data_hash(dataset, settings.cache),
            "places": cache.texts_hash(map(str, places)),
        }
    )
    if kept := _kept(settings.cache, "images", made_of):
        tensors, unreadable = kept
        speed = tensors.pop("images_per_s", None)
        failures = {int(place): why for place, why in unreadable.items()}
        return ImageEmbeddings(**tensors, unreadable=failures, images_per_s=None if speed is None else speed.item())
    images = _embed_images(clip, dataset, places, settings, encode)
    tensors = {"features": images.features, "index": images.index, "labels": images.labels}
    if encode and images.images_per_s:
        tensors["images_per_s"] = torch.tensor(images.images_per_s, dtype=torch.float64)
    _keep(settings.cache, "images", made_of, tensors, {str(place): why for place, why in images.unreadable.items()})
    return images


def _kept(folder: Path, kind: str, made_of: cache.Made | None) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What the cache holds; None unless it holds it for every process: those that embed wait for each other."""
    kept = cache.read(cache.place(folder, kind, made_of), made_of) if made_of else None
    return kept if all(ranks.gather(kept is not None)) else None


def _keep(
    folder: Path, kind: str, made_of: cache.Made | None, tensors: dict[str, Tensor], notes: dict[str, Any]
) -> None:
    if made_of and ranks.rank()[0] == 0:
        cache.write(cache.place(folder, kind, made_of), made_of, tensors, notes)


def _embed_images(
    clip: Model, dataset: Any, places: list[int], settings: Settings, encode: Encode | None
) -> ImageEmbeddings:
    size = settings.batch_size
    batches = [list(range(start, min(start + size, len(places)))) for start in range(0, len(places), size)]
    loader = DataLoader(
        _Inputs(dataset, places, clip.preprocess),
        batch_sampler=ranks.share(batches),
        num_workers=settings.workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(settings.seed),  # else the loader draws from the global generator
    )
    encode = encode or encode_batch
    mine, unreadable, times = [], {}, []
    with inference(clip.network):
        for images, read, classes, failures in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
            unreadable.update(failures)
            if read:
                start = time.perf_counter()
                mine.append((read, classes, encode(clip, images)))
                times.append((len(read), time.perf_counter() - start))
    unreadable, found = _gathered(mine, unreadable)
    if unreadable:
        place, why = next(iter(unreadable.items()))
        log.warning("%d images could not be read; the first: %s (%s)", len(unreadable), _key(dataset, place), why)
    if not found:
        raise ValueError(
            f"none of the {len(unreadable)} images could be read; the first: {_key(dataset, place)} ({why})"
        )
    index = [place for read, _, _ in found for place in read]
    labels = [label for _, classes, _ in found for label in classes]
    features = torch.cat([encoded for _, _, encoded in found])
    require_finite(features, "image", [_key(dataset, place) for place in index])
    return ImageEmbeddings(features, torch.tensor(index), torch.tensor(labels), unreadable, _per_second(times))


def _per_second(times: list[tuple[int, float]]) -> float | None:
    """Return images a second from each batch's images and seconds, without the first batch where there are others."""
    counted = times[1:] or times
    return sum(n for n, _ in counted) / sum(seconds for _, seconds in counted) if counted else None


def _gathered(mine: list[tuple[list[int], list[int], Tensor]], unreadable: dict[int, str]):
    """Return all processes' batches in the order of the data set, and what none of them could read."""
    gathered = ranks.gather((mine, unreadable))
    found = sorted((batch for batches, _ in gathered for batch in batches), key=lambda batch: batch[0][0])
    return dict(sorted(item for _, failures in gathered for item in failures.items())), found


def embed_texts(clip: Model, texts: Sequence[str], settings: Settings) -> Float[Tensor, "m d"]:
    """Return unit vectors of the texts; equal texts are encoded once. Raises ValueError for no texts and for NaN.

    Batches are of texts of like length: what a batch is filled up to its longest text with, costs least then.
    """
    if not texts:
        raise ValueError("no texts to embed: give at least one")
    unique = list(dict.fromkeys(texts))
    place = {text: i for i, text in enumerate(unique)}
    order = torch.tensor([place[text] for text in texts])
    if settings.cache is None:
        return _embed_texts(clip, unique, settings)[order]
    made_of = cache.sure(lambda: {**texts_made_of(clip), "texts": cache.texts_hash(unique)})
    if kept := _kept(settings.cache, "texts", made_of):
        return kept[0]["features"][order]
    features = _embed_texts(clip, unique, settings)
    _keep(settings.cache, "texts", made_of, {"features": features}, {})
    return features[order]


def _embed_texts(clip: Model, unique: list[str], settings: Settings) -> Float[Tensor, "m d"]:
    by_length = sorted(range(len(unique)), key=lambda i: len(unique[i]))
    size = settings.batch_size
    batches = [by_length[start : start + size] for start in range(0, len(unique), size)]
    mine = []
    with inference(clip.network):
        for batch in tqdm(ranks.share(batches), desc="texts", unit="batch", leave=False, disable=None):
            tokens = clip.tokenizer([unique[i] for i in batch])
            mine.append((batch, _unit(encode_tokens(clip.network, tokens.to(clip.device)))))
    found = [embedded for batches in ranks.gather(mine) for embedded in batches]
    place = torch.tensor([i for batch, _ in found for i in batch])
    features = torch.cat([encoded for _, encoded in found])[place.argsort()]
    require_finite(features, "text", unique)
    return features


def encode_tokens(model: nn.Module, tokens: Int[Tensor, "b L"]) -> Float[Tensor, "b d"]:
    """Encode tokens without unused padding, so that a prompt of ten tokens costs ten, not 77.

    open_clip's CLIP attends backwards only and takes its features at the end token: what stands behind the last end
    token of the batch is left out. Every other model gets the tokens as they are. Features may have any length.
    """
    if not isinstance(model, open_clip.CLIP) or model.attn_mask is None or model.text_pool_type not in ENDS:
        return model.encode_text(tokens)
    length = int(ENDS[model.text_pool_type](tokens, model).max()) + 1
    shorter = {
        "positional_embedding": model.positional_embedding[:length],
        "attn_mask": model.attn_mask[:length, :length],
    }
    made = functional_call(model, shorter, (None, tokens[:, :length]))
    return made["text_features"] if isinstance(made, dict) else made[1]


# Where open_clip's CLIP finds the end token, by the name of its pooling.
ENDS = {
    "argmax": lambda tokens, model: tokens.argmax(dim=-1),
    "eos": lambda tokens, model: (tokens == model.text_eos_id).int().argmax(dim=-1),
}


def subset(n: int, settings: Settings) -> list[int]:
    """Return the places to evaluate: all, or a random `max_images` of them (data sets are often sorted by class)."""
    if settings.max_images is None or settings.max_images >= n:
        return list(range(n))
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    return sorted(drawn[: settings.max_images].tolist())


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Enter evaluation mode without gradients; every module's own mode is restored afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Not inference_mode: a buffer cached there could not take part in training afterwards.
        with torch.no_grad():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


class _Inputs(Dataset):
    """Preprocessed images with their places, or the reason why one cannot be read."""

    def __init__(self, dataset: Any, places: list[int], preprocess: Callable[[Image.Image], Tensor]):
        self.dataset, self.places, self.preprocess = dataset, places, preprocess

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, position: int) -> tuple[int, Tensor | None, int, str]:
        place = self.places[position]
        try:
            item = self.dataset[place]
            image, label = item if isinstance(item, tuple) else (item, -1)
            image.load()  # a truncated file shows only when it is decoded
        except UNREADABLE as error:
            return place, None, -1, f"{type(error).__name__}: {error}"
        return place, self.preprocess(image), int(label), ""


def _collate(items: list[tuple[int, Tensor | None, int, str]]):
    read = [item for item in items if item[1] is not None]
    images = torch.stack([item[1] for item in read]) if read else torch.empty(0)
    failures = {place: why for place, tensor, _, why in items if tensor is None}
    return images, [item[0] for item in read], [item[2] for item in read], failures


def encode_batch(clip: Model, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Return unit vectors of preprocessed images, float32, on the CPU. The caller sets mode and gradients."""
    return _unit(clip.network.encode_image(images.to(clip.device, clip.dtype)))


def _unit(features: Tensor) -> Tensor:
    return nn.functional.normalize(features.float(), dim=-1).cpu()


def _key(dataset: Any, place: int) -> str:
    keys = getattr(dataset, "keys", None)
    return f"{place}" if keys is None or callable(keys) else f"{keys[place]}"


def require_finite(features: Tensor, kind: str, names: Sequence[str]) -> None:
    """Raise ValueError that counts and names the rows with NaN or infinity."""
    bad = (~features.isfinite().all(dim=1)).nonzero().flatten().tolist()
    if bad:
        first = ", ".join(repr(names[i]) for i in bad[:5])
        raise ValueError(
            f"{len(bad)} of {len(names)} {kind} embeddings are not finite; the first: {first}. "
            "The model's weights or its half-precision arithmetic have overflowed"
        )
