"""Loss surfaces along filter-normalised random directions (Li et al. 2018, arXiv:1712.09913, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ssmclip.analyze.curvature.batches import to_model
from ssmclip.rows import Result
from ssmclip.rows.condition import Where
from ssmclip.train.objective import contrastive_loss

Direction = dict[str, Tensor]
Unit = tuple[Where, Callable[[], list[Result]]]  # where something is measured, and what measures it


def filter_normalised_direction(parameters: Mapping[str, Tensor], seed: int) -> Direction:
    """Return a normal direction in which every filter (all weights of one output) has the norm of the model's own.

    Biases, norms' scales and other parameters of fewer than two dimensions stay where they are, as in the paper.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, p in parameters.items():
        d = torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device)
        if p.ndim < 2:
            direction[name] = torch.zeros_like(d)
            continue
        rows = (len(p), -1)
        length = d.reshape(rows).norm(dim=1).clamp_min(torch.finfo(p.dtype).tiny)
        scale = p.detach().reshape(rows).norm(dim=1) / length
        direction[name] = (d.reshape(rows) * scale[:, None]).reshape(p.shape)
    return direction


def loss_at(
    loss: Callable[[], Tensor], parameters: Mapping[str, Tensor], directions: list[Direction], steps: list[float]
) -> float:
    """Return loss() with every parameter moved by the sum of steps x directions, then restored exactly."""
    before = {name: p.detach().clone() for name, p in parameters.items()}
    try:
        with torch.no_grad():
            for direction, step in zip(directions, steps, strict=True):
                for name, p in parameters.items():
                    p.add_(direction[name], alpha=step)
            return float(loss())
    finally:
        with torch.no_grad():
            for name, p in parameters.items():
                p.copy_(before[name])


def grid(points: int, distance: float) -> list[float]:
    """Return `points` places from -distance to distance, rounded so that their names are short.

    >>> grid(5, 1.0)
    [-1.0, -0.5, 0.0, 0.5, 1.0]
    """
    if points < 2 or not distance > 0:
        raise ValueError(
            f"a surface needs at least 2 points and a distance above 0 (got {points} points, distance {distance})"
        )
    return [round(-distance + 2 * distance * i / (points - 1), 6) + 0.0 for i in range(points)]


def surface(
    model: nn.Module,
    batches: Sequence[tuple[Tensor, Tensor]],
    *,
    model_name: str,
    dimensions: int,
    points: int,
    distance: float = 1.0,
    seed: int = 0,
    loss_of_batch: Callable[[nn.Module, Tensor, Tensor], Tensor] = contrastive_loss,
) -> Iterator[Unit]:
    """Yield (where, a function that measures it) of every point of a surface: the mean loss of the batches.

    model: in the mode it is to be measured in; batches: (images, texts); dimensions: 1 or 2. Raises ValueError as
    `grid` does.
    """
    places = grid(points, distance)
    batches = [to_model(model, *batch) for batch in batches]
    parameters = dict(model.named_parameters())
    directions = [filter_normalised_direction(parameters, seed + i) for i in range(dimensions)]

    def loss() -> Tensor:
        return torch.stack([loss_of_batch(model, *batch) for batch in batches]).mean()

    def measure(steps: list[float], where: Where) -> list[Result]:
        value = loss_at(loss, parameters, directions, steps)
        extra = {"title": "Loss surface"}
        return [Result(model_name, f"surface_{dimensions}d", "loss", value, where=where, n=len(batches), extra=extra)]

    for x in places:
        for y in places if dimensions == 2 else [0.0]:
            where = {"x": x, "y": y} if dimensions == 2 else {"x": x}
            yield where, partial(measure, [x, y][:dimensions], where)
