"""Images and texts to unit vectors, in batches. Works for any open_clip model.

n images · m texts · d embedding dimensions
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

log = logging.getLogger(__name__)

# What opening or decoding a file that is no image, or half of one, raises.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass(frozen=True)
class Clip:
    """A model under test: what turns images and texts into its inputs, and the name its rows carry."""

    model: nn.Module
    preprocess: Callable[[Image.Image], Tensor]
    tokenizer: Callable[[list[str]], Tensor]
    name: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


@dataclass(frozen=True)
class Settings:
    """How a task is run.

    batch_size: images or texts at a time; workers: processes that open images (0: this one);
    seed: of resampling, of the examples shown and of the subset; max_images: evaluate on a random subset of so many;
    examples: how many images go into the rows as thumbnails (0: none, for data whose pictures may not be passed on).
    """

    batch_size: int = 64
    workers: int = 0
    seed: int = 0
    max_images: int | None = None
    examples: int = 8


@dataclass(frozen=True)
class ImageEmbeddings:
    """features: unit vectors of the images that could be read; index: their places in the data set;
    labels: their classes (-1 where the data set has none); unreadable: place -> why, for the others."""

    features: Float[Tensor, "n d"]
    index: Int[Tensor, " n"]
    labels: Int[Tensor, " n"]
    unreadable: dict[int, str]


def embed_images(clip: Clip, dataset: Any, settings: Settings) -> ImageEmbeddings:
    """Embed `dataset[i]`, a PIL image or (PIL image, label), for every i, or for `settings.max_images` of them.

    Images that can't be read are counted and named, never replaced. Raises ValueError when there are no images, when
    none could be read, and when an embedding is not finite. Leaves the model's train/eval modes and the global random
    state as they were, so that a training loop may call it at any step.
    """
    if not len(dataset):
        raise ValueError("the data set has no images")
    loader = DataLoader(
        _Inputs(dataset, subset(len(dataset), settings), clip.preprocess),
        batch_size=settings.batch_size,
        num_workers=settings.workers,
        collate_fn=_collate,
        generator=torch.Generator().manual_seed(settings.seed),  # else the loader draws from the global generator
    )
    features, index, labels, unreadable = [], [], [], {}
    with inference(clip.model):
        for images, places, classes, failures in tqdm(loader, desc="images", unit="batch", leave=False, disable=None):
            unreadable.update(failures)
            if places:
                features.append(encode_batch(clip, images))
                index += places
                labels += classes
    if unreadable:
        place, why = next(iter(unreadable.items()))
        log.warning("%d images could not be read; the first: %s (%s)", len(unreadable), _key(dataset, place), why)
    if not features:
        raise ValueError(
            f"none of the {len(unreadable)} images could be read; the first: {_key(dataset, place)} ({why})"
        )
    features = torch.cat(features)
    require_finite(features, "image", [_key(dataset, place) for place in index])
    return ImageEmbeddings(features, torch.tensor(index), torch.tensor(labels), unreadable)


def embed_texts(clip: Clip, texts: Sequence[str], settings: Settings) -> Float[Tensor, "m d"]:
    """Unit vectors of the texts, each different text encoded once. Raises ValueError for no texts and for NaN.

    Texts of like length are encoded together: a tower that stops at the longest text of its batch stops early.
    """
    if not texts:
        raise ValueError("there are no texts to embed")
    place = {text: i for i, text in enumerate(sorted(dict.fromkeys(texts), key=len))}
    unique = list(place)
    features = []
    with inference(clip.model):
        starts = range(0, len(unique), settings.batch_size)
        for start in tqdm(starts, desc="texts", unit="batch", leave=False, disable=None):
            tokens = clip.tokenizer(unique[start : start + settings.batch_size])
            features.append(_unit(clip.model.encode_text(tokens.to(clip.device))))
    features = torch.cat(features)
    require_finite(features, "text", unique)
    return features[torch.tensor([place[text] for text in texts])]


def subset(n: int, settings: Settings) -> list[int]:
    """The places to evaluate: all, or a random `max_images` of them (data sets are often sorted by class)."""
    if settings.max_images is None or settings.max_images >= n:
        return list(range(n))
    drawn = torch.randperm(n, generator=torch.Generator().manual_seed(settings.seed))
    return sorted(drawn[: settings.max_images].tolist())


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; every module's own mode is restored after."""
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
    """Preprocessed images with their places, or why one can't be read."""

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


def encode_batch(clip: Clip, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b d"]:
    """Unit vectors of preprocessed images, float32, on the CPU. The caller sees to evaluation mode and gradients."""
    dtype = next(clip.model.parameters()).dtype
    return _unit(clip.model.encode_image(images.to(clip.device, dtype)))


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
