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
    """(images (B, 3, H, W), texts int64 (B, context)) of `batches` batches, no sample twice, nothing augmented.

    source: what `ssmclip.data.pairs.loader.open_pairs` takes. Raises ValueError when the source has fewer samples than
    batches x batch_size, and what `open_pairs` raises.
    """
    if batches < 1 or batch_size < 2:
        raise ValueError(f"{batches} batches of {batch_size}: wanted at least 1 batch, of at least 2 pairs")
    loader = open_pairs(
        source, transform=lambda image, _: preprocess(image), tokenize=tokenizer, batch_size=batch_size, seed=seed
    )
    wanted = batches * batch_size
    if loader.num_samples is not None and loader.num_samples < wanted:
        most = loader.num_samples // batch_size
        raise ValueError(
            f"{batches} batches of {batch_size} are {wanted:,} samples, {source} has {loader.num_samples:,}: "
            + (f"ask for at most {most} batches" if most else f"a batch holds at most {loader.num_samples} of them")
        )
    for number, batch in zip(range(batches), loader, strict=False):
        if loader.cursor["states"][0]["pass"] > 0:  # it holds samples of the second pass
            raise ValueError(
                f"{source} has fewer than {(number + 1) * batch_size:,} usable samples, {wanted:,} were asked for: "
                + (f"take at most {number} batches" if number else "take smaller batches")
            )
        yield batch.images, batch.texts


def to_model(model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The batch on the model's device, images of its type."""
    p = next(model.parameters())
    return images.to(p.device, torch.promote_types(p.dtype, torch.float32)), texts.to(p.device)
