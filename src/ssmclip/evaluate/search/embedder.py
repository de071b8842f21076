"""A model as a service: images and texts in, unit vectors out, in the order given, from any number of threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from ssmclip.data.images import BadImage, check_ratio, open_image, to_rgb
from ssmclip.evaluate.embeddings.embed import Settings, embed_texts, encode_batch, require_finite
from ssmclip.models import load
from ssmclip.models.names import Model
from ssmclip.models.precision import resolve

__all__ = ["Embedder"]

Picture = str | Path | Image.Image | Tensor


class Embedder:
    """Encoder of images and texts to unit vectors, which can be compared by dot product.

    model: what `ssmclip.load` takes, or what it returned; device: "cpu", "cuda", ...; dtype: of the model's arithmetic,
    as a type, or "float32", "bfloat16" or "auto", whichever of the two is faster on the device (vectors are float32
    whatever it is); batch_size: images or texts at a time; image_size: pixels, or (height, width), in place of the
    model's own. A model that was handed over is moved to the device and type, and put into evaluation mode.

    Threads may share one: opening and preprocessing run side by side, the model serves a batch at a time.

    >>> embedder = Embedder("CLIP-VMamba-Nano")
    >>> images = embedder.encode_images([Image.new("RGB", (80, 60), colour) for colour in ("red", "blue")])
    >>> (images @ embedder.encode_texts(["a red square"]).T).shape
    torch.Size([2, 1])
    """

    def __init__(
        self,
        model: str | Path | Model | tuple[Any, Any, Any],
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | str = torch.float32,
        batch_size: int = 64,
        image_size: int | tuple[int, int] | None = None,
    ):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 (got {batch_size})")
        if isinstance(dtype, str):
            dtype = getattr(torch, resolve(dtype, device))
        if not dtype.is_floating_point:
            raise ValueError(
                f"dtype must be a floating-point type, such as torch.float32 or torch.bfloat16 (got {dtype})"
            )
        if isinstance(model, (str, Path)):
            found = load(model, image_size=image_size)
        elif image_size is not None:
            raise ValueError(
                "image_size cannot be changed after loading: give the model's name, or pass image_size to load()"
            )
        else:
            found = model if isinstance(model, Model) else Model(*model, label=type(model[0]).__name__)
        self.clip = replace(found, network=found.network.to(device, dtype).eval())
        self.batch_size, self.image_size = batch_size, image_size
        self._serving = threading.Lock()  # Numba's simplest threading layer dies of two calls at once

    def encode_images(self, images: Picture | Iterable[Picture]) -> Float[Tensor, "n d"]:
        """Return unit vectors of n images, float32, on the CPU.

        images: one or an iterable of paths, PIL images or preprocessed tensors (3, H, W), in any mixture. The
        result for an image does not depend on whether it is opened here or before.
        Those of one shape are encoded together; no more than a batch of each shape is held in memory.
        Raises BadImage naming the first that cannot be read or is too thin, ValueError for no images, for other tensors
        and for NaN, TypeError for anything else, including arrays.
        """
        one = isinstance(images, (str, Path, Image.Image)) or (isinstance(images, Tensor) and images.ndim == 3)
        if one or not isinstance(images, Iterable):
            images = [images]
        found: dict[int, Tensor] = {}
        waiting: dict[torch.Size, dict[int, Tensor]] = {}
        for place, image in enumerate(images):
            pixels = self._prepare(image)
            batch = waiting.setdefault(pixels.shape, {})
            batch[place] = pixels
            if len(batch) == self.batch_size:
                self._encode(waiting.pop(pixels.shape), found)
        for batch in waiting.values():
            self._encode(batch, found)
        if not found:
            raise ValueError("no images to embed: give at least one")
        places = range(len(found))
        features = torch.stack([found[place] for place in places])
        require_finite(features, "image", [str(place) for place in places])
        return features

    def encode_texts(self, texts: str | Iterable[str]) -> Float[Tensor, "m d"]:
        """Return unit vectors of m texts, or of one, float32, on the CPU; texts of similar length share a batch.

        Raises ValueError for no texts and for NaN.
        """
        texts = [texts] if isinstance(texts, str) else list(texts)
        with self._serving:
            return embed_texts(self.clip, texts, Settings(batch_size=self.batch_size))

    def _prepare(self, image: Picture) -> Tensor:
        if isinstance(image, Tensor):
            if image.ndim != 3 or len(image) != 3 or not image.is_floating_point():
                raise ValueError(
                    "an image tensor must be preprocessed floating-point values of shape (3, height, width) (got "
                    f"{tuple(image.shape)} of {image.dtype}); pass raw pixels as a PIL image, made by "
                    "torchvision.transforms.functional.to_pil_image"
                )
            return image
        if isinstance(image, (str, Path)):
            try:
                return self.clip.preprocess(open_image(image))
            except BadImage as error:
                detail = error.detail if str(image) in error.detail else f"{image}: {error.detail}"
                raise BadImage(error.reason, detail) from error
        if isinstance(image, Image.Image):
            check_ratio(image)
            return self.clip.preprocess(to_rgb(image))
        raise TypeError(
            f"an image must be a path, a PIL image or a tensor (3, height, width) (got {type(image).__name__}); "
            "PIL.Image.fromarray converts an array"
        )

    @torch.no_grad()
    def _encode(self, batch: dict[int, Tensor], found: dict[int, Tensor]) -> None:
        with self._serving:
            features = encode_batch(self.clip, torch.stack(list(batch.values())))
        for place, feature in zip(batch, features, strict=True):
            found[place] = feature
