"""What the optimiser trains: a model, and where the objective has them, heads that are no part of the result."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

HEADS = "heads."
_MODEL = "model."


class Trainee(nn.Module):
    """A model and the heads of its objective as one module: one forward pass, which data-parallel training needs."""

    def __init__(self, model: nn.Module, heads: nn.Module):
        super().__init__()
        self.model, self.heads = model, heads

    def forward(
        self, embed: Callable[[Trainee, Tensor, Any], dict[str, Tensor]], images: Tensor, targets: Any
    ) -> dict[str, Tensor]:
        """Return embed(this, images, targets)."""
        return embed(self, images, targets)


def model_of(module: nn.Module) -> nn.Module:
    """Return the model of a trainee, or any other module itself."""
    return module.model if isinstance(module, Trainee) else module


def named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters with their names in the model; those of heads begin with HEADS."""
    for name, parameter in module.named_parameters():
        yield (name.removeprefix(_MODEL) if isinstance(module, Trainee) else name), parameter


def split_state(module: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
    """Return the states of the model and of the heads (None: there are none) in the state of a module."""
    if not isinstance(module, Trainee):
        return state, None
    model, heads = (
        {name.removeprefix(part): value for name, value in state.items() if name.startswith(part)}
        for part in (_MODEL, HEADS)
    )
    return model, heads
