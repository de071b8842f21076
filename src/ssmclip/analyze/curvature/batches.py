"""The batches a landscape is measured on, and the losses: the same numbers for the same seed, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmclip.data.pairs.loader import open_pairs


def read_batches(
    source: str | Path,
    preprocess: Callable,
    tokenizer: Callable,
    *,
    batches: int,
    batch_size: int,
    seed: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images (B, 3, H, W), texts int64 (B, context)) of `batches` batches, without repetition or augmentation.

    source: what `ssmclip.data.pairs.loader.open_pairs` takes. Raises ValueError when the source has fewer samples than
    batches x batch_size, and what `open_pairs` raises.
    """
    if batches < 1 or batch_size < 2:
        raise ValueError(f"at least 1 batch of at least 2 pairs is needed (got {batches} batches of {batch_size})")
    loader = open_pairs(
        source, transform=lambda image, _: preprocess(image), tokenize=tokenizer, batch_size=batch_size, seed=seed
    )
    needed = batches * batch_size
    if loader.num_samples is not None and loader.num_samples < needed:
        most = loader.num_samples // batch_size
        raise ValueError(
            f"{batches} batches of {batch_size} need {needed:,} samples, but {source} has {loader.num_samples:,}: "
            + (f"use at most {most} batches" if most else f"use batches of at most {loader.num_samples}")
        )
    for number, batch in zip(range(batches), loader, strict=False):
        if loader.cursor["states"][0]["pass"] > 0:  # it holds samples of the second pass
            raise ValueError(
                f"{source} has fewer than {(number + 1) * batch_size:,} usable samples, but {needed:,} are needed: "
                + (f"use at most {number} batches" if number else "use smaller batches")
            )
        yield batch.images, batch.texts


def to_model(model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the batch on the model's device, with images of its type."""
    p = next(model.parameters())
    return images.to(p.device, torch.promote_types(p.dtype, torch.float32)), texts.to(p.device)
