"""The parameters of a Hessian."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ssmclip.analyze.curvature.product import call, explained
from ssmclip.models.towers import LOGITS

TOWERS = ("whole", "image", "text")


def tower_parameters(model: nn.Module, tower: str) -> dict[str, nn.Parameter]:
    """Return name -> parameter of the image encoder, the text encoder (both without the logit scale), or all.

    Raises ValueError for another name.
    """
    if tower not in TOWERS:
        raise ValueError(f"tower must be one of {', '.join(TOWERS)} (got {tower!r})")
    kept = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if tower == "whole":
        return kept
    chosen = {name: p for name, p in kept.items() if name.startswith("visual.") == (tower == "image")}
    return {name: p for name, p in chosen.items() if name not in LOGITS}


@contextmanager
def only_read_rows(
    model: nn.Module, parameters: Mapping[str, Tensor], loss: Callable[[], Tensor]
) -> Iterator[dict[str, Tensor]]:
    """Yield name -> tensor to differentiate `loss()` by: `parameters`, with only the rows that are read of embeddings.

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
    """Return name -> sorted rows that `loss()` looks up, for tables whose weight it uses in no other way."""
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
