"""Draw the captions of a sample: uniformly, or first a field by its probability. All draws come from one generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch


def draw_captions(count: int, among: int, generator: torch.Generator) -> list[int]:
    """Draw `count` of `among` captions at random; if there are fewer, repeat all as often as needed, then draw some."""
    if count == 1:
        return [int(torch.randint(among, (), generator=generator))]
    order = torch.randperm(among, generator=generator).tolist()
    return [order[i % among] for i in range(count)]


def draw_by_field(
    count: int, fields: Sequence[str], shares: Mapping[str, int | float], generator: torch.Generator
) -> list[int]:
    """Draw `count` captions: each time a field by its share, then a caption of it, none twice while others are left.

    fields: the field of each caption; shares: probability of each field. Fields without a caption that is left do not
    count, and the others' probabilities are scaled up to a sum of 1.
    """
    drawn: list[int] = []
    left: list[int] = []
    for _ in range(count):
        left = left or list(range(len(fields)))
        names = [name for name in shares if any(fields[i] == name for i in left)]
        weights = torch.tensor([shares[name] for name in names], dtype=torch.float64)
        place = torch.rand((), generator=generator, dtype=torch.float64) * weights.sum()
        name = names[min(int(torch.searchsorted(weights.cumsum(0), place, right=True)), len(names) - 1)]
        among = [i for i in left if fields[i] == name]
        choice = among[int(torch.randint(len(among), (), generator=generator))]
        left.remove(choice)
        drawn.append(choice)
    return drawn
