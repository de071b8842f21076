"""The batches a landscape is measured on, and the losses: the same numbers for the same seed, batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ssmclip.analyze.curvature.product import call, explained
from ssmclip.data.pairs.loader import open_pairs
from ssmclip.train.objective import build_loss

TOWERS = ("whole", "image", "text")


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
    seen: set[str] = set()
    for _, batch in zip(range(batches), loader, strict=False):
        if seen & set(batch.keys) or len(set(batch.keys)) < batch_size:
            usable = len(seen | set(batch.keys))
            raise ValueError(f"{source} has {usable:,} usable samples, {wanted:,} were asked for: take fewer batches")
        seen |= set(batch.keys)
        yield batch.images, batch.texts


def contrastive_loss(model: nn.Module, images: Tensor, texts: Tensor) -> Tensor:
    """The loss the model was trained with, of these pairs: softmax over the batch, or SigLIP's where it has a bias."""
    outputs = model(images, texts)
    return build_loss("siglip" if outputs.get("logit_bias") is not None else "clip")(**outputs)


def classification_loss(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy of an image classifier, such as `timm.create_model(..., num_classes=10)`."""
    return nn.functional.cross_entropy(model(images), labels)


def tower_parameters(model: nn.Module, tower: str) -> dict[str, nn.Parameter]:
    """name -> parameter: of the image encoder, of the text encoder (neither has the logit scale), or all.

    Raises ValueError for another name.
    """
    if tower not in TOWERS:
        raise ValueError(f"tower {tower!r}: wanted one of {', '.join(TOWERS)}")
    kept = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tower == "whole":
        return kept
    chosen = {name: p for name, p in kept.items() if name.startswith("visual.") == (tower == "image")}
    return {name: p for name, p in chosen.items() if name not in ("logit_scale", "logit_bias")}


@contextmanager
def only_read_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], loss: Callable[[], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Inside, name -> tensor to differentiate `loss()` by: `parameters`, of embeddings only the rows that it reads.

    The other rows have no gradient and no curvature: what is left out of the Hessian is zero, and of a vocabulary of
    50,000 that is nearly all. The model computes with the rows given. An embedding that is used in another way as
    well (by an output layer, say), or that does more than look up, stays whole.
    """
    tables = {
        name: module
        for name, p in parameters.items()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight is p
        if module.max_norm is None and module.padding_idx is None and not (module.scale_grad_by_freq or module.sparse)
    }
    read = _rows_read(tables, loss) if tables else {}
    varied = dict(parameters)
    with ExitStack() as hooks:
        for name, rows in read.items():
            varied[name] = tables[name].weight.detach()[rows].requires_grad_()
            place = torch.zeros(tables[name].num_embeddings, dtype=torch.long, device=rows.device)
            place[rows] = torch.arange(len(rows), device=rows.device)

            def look_up(_module, args, _output, table=varied[name], place=place):
                return nn.functional.embedding(place[args[0]], table)

            hooks.callback(tables[name].register_forward_hook(look_up).remove)
        yield varied


def _rows_read(tables: Mapping[str, nn.Embedding], loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """name -> rising numbers of the rows that `loss()` looks up, of the tables whose weight it uses in no other way."""
    read: dict[str, list[Tensor]] = {}
    with ExitStack() as hooks:
        for name, module in tables.items():

            def note(_module, args, output, name=name):
                read.setdefault(name, []).append(args[0].reshape(-1))
                return output.detach().requires_grad_()  # so that only other uses of the weight have a gradient

            hooks.callback(module.register_forward_hook(note).remove)
        with explained(loss):
            weights = [tables[name].weight for name in tables]
            others = torch.autograd.grad(call(loss), weights, allow_unused=True)
    alone = {name for name, other in zip(tables, others, strict=True) if other is None}
    return {name: torch.cat(rows).unique() for name, rows in read.items() if name in alone}


def to_model(model: nn.Module, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
    """The batch on the model's device, images of its type."""
    p = next(model.parameters())
    return images.to(p.device, torch.promote_types(p.dtype, torch.float32)), texts.to(p.device)
