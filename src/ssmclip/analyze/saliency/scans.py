"""The attention that a state-space scan implies (Ali et al. 2024, "The Hidden Attention of Mamba Models", 2403.01590).

    y[i] = sum over j <= i of alpha[i, j] x[j] + D x[i]
    alpha[i, j] = C[i] exp(A (s[j+1] + ... + s[i])) s[j] B[j]          s: the steps, delta after its softplus

d channels · n states per channel · l positions · g groups of channels that share B and C
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssmclip import ops
from ssmclip.ops.cross_scan.plain import cross_scan, project, sequences

__all__ = ["DIRECTIONS", "LayerScans", "Scan", "recorded_scans", "scans_of_call"]

ROWS, COLUMNS = "row by row", "column by column"
BACK = "backwards"
# By their number, in the order of `ssmclip.ops.cross_scan`.
DIRECTIONS = {
    4: (ROWS, COLUMNS, f"{ROWS}, {BACK}", f"{COLUMNS}, {BACK}"),
    2: (ROWS, f"{ROWS}, {BACK}"),
    1: (ROWS,),
}
MAX_POSITIONS = 4096  # the matrices of four directions take 64 bytes a pair of positions
PART = 1 << 24  # numbers of a part of the matrices of many channels


@dataclass(frozen=True)
class Scan:
    """One direction of one sequence through a scan. steps, B and C stand in the order of its steps.

    order: the position, in the network's own order, that each step reads; inputs: x, by position; A: one column where
    all states of a channel decay alike; D: the weight of the input itself, which is no part of the matrix.
    """

    inputs: Float[Tensor, "d l"]
    steps: Float[Tensor, "d l"]
    A: Float[Tensor, "d n1"]
    B: Float[Tensor, "g n l"]
    C: Float[Tensor, "g n l"]
    order: Int[Tensor, " l"]
    D: Float[Tensor, " d"] | None = None

    @property
    def length(self) -> int:
        return len(self.order)

    def matrices(self, channels: slice = slice(None)) -> Float[Tensor, "d l l"]:
        """Return alpha of some channels: from which position (last axis) how much goes to which (the one before)."""
        steps, A = self.steps[channels], self.A[channels]
        group = torch.arange(len(self.A), device=A.device)[channels] // (len(self.A) // len(self.B))
        time = steps.double().cumsum(-1)  # whose differences count
        causal = torch.ones(self.length, self.length, dtype=torch.bool, device=A.device).tril()
        elapsed = (time[:, :, None] - time[:, None, :]).masked_fill(~causal, 0).to(steps.dtype)
        if A.shape[1] == 1:
            products = torch.einsum("gni,gnj->gij", self.C, self.B)
            alpha = products[group] * torch.exp(A[:, :, None] * elapsed)
        else:
            alpha = torch.zeros_like(elapsed)
            for state, rate in enumerate(A.unbind(1)):
                products = self.C[:, state, :, None] * self.B[:, state, None, :]
                alpha += products[group] * torch.exp(rate[:, None, None] * elapsed)
        alpha = (alpha * steps[:, None, :]).masked_fill(~causal, 0)
        place = self.order.argsort()
        return alpha[:, place[:, None], place[None, :]]

    def attention(self) -> Float[Tensor, "l l"]:
        """Return the mean over channels of alpha's magnitude. Raises ValueError for more than 4,096 positions."""
        if self.length > MAX_POSITIONS:
            raise ValueError(
                f"a layer must have at most {MAX_POSITIONS:,} positions for its matrix (got {self.length:,}): "
                "choose a later layer or a smaller image"
            )
        total = torch.zeros(self.length, self.length, dtype=self.steps.dtype, device=self.steps.device)
        part = max(PART // self.length**2, 1)
        for start in range(0, len(self.A), part):
            total += self.matrices(slice(start, start + part)).abs().sum(0)
        return total / len(self.A)


@dataclass(frozen=True)
class LayerScans:
    """layer: the module that called the scan; directions: its scans; grid: of the map, where there is one."""

    layer: str
    directions: tuple[Scan, ...]
    grid: tuple[int, int] | None = None


def recorded_scans(network: nn.Module, forward: Callable[[], Any], item: int = 0) -> list[LayerScans]:
    """Return the scans that a call computes, in their order. item: which sequence of the batch.

    The arguments are recorded where the operators of `ssmclip.ops` are called, so that the inputs of a scan are those
    that the network gave it. Empty for a network without scans.
    """
    inside: list[str] = []
    recorded: list[LayerScans] = []

    def hear(call: ops.Call) -> None:
        if scans := scans_of_call(call, item):
            recorded.append(LayerScans(inside[-1] if inside else "", *scans))

    handles = [handle for name, module in _blocks(network) for handle in _named(name, module, inside)]
    try:
        with torch.no_grad(), ops.hearing(hear):
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return recorded


def _blocks(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with children: a hook on a layer itself would keep its block from handing its weights to an operator."""
    return ((name, module) for name, module in network.named_modules() if next(module.children(), None) is not None)


def _named(name: str, module: nn.Module, inside: list[str]) -> list[Any]:
    def enter(*_: Any) -> None:
        inside.append(name)

    def leave(*_: Any) -> None:
        inside.pop()

    return [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]


def scans_of_call(call: ops.Call, item: int = 0) -> tuple[tuple[Scan, ...], tuple[int, int] | None] | None:
    """Return (directions, grid) of a recorded call for one sequence of its batch, None for an operator that scans
    nothing."""
    for name, read in READERS.items():
        if call.backends is ops.BACKENDS[name]:
            return read(item, *call.arguments)
    return None


def _selective_scan(item, u, delta, A, B, C, D, z, delta_bias, delta_softplus, *_):
    order = torch.arange(u.shape[-1], device=u.device)
    steps = _steps(_wide(delta[item]), delta_bias, delta_softplus)
    return (Scan(_wide(u[item]), steps, _wide(A), _wide(B[item]), _wide(C[item]), order, _wide(D)),), None


def _cross_selective_scan(item, x, delta, A, B, C, D, delta_bias, delta_softplus, delta_weight):
    x, delta, B, C = (_wide(tensor[item : item + 1]) for tensor in (x, delta, B, C))
    if delta_weight is not None:
        delta = project(delta, _wide(delta_weight))
    _, height, width, _ = x.shape
    places = torch.arange(height * width, device=x.device, dtype=torch.float64)
    orders = cross_scan(rearrange(places, "(h w) -> 1 1 h w", h=height), len(A))[0, :, 0].long()
    inputs = rearrange(x[0], "h w d -> d (h w)")
    delta, B, C = (sequences(maps)[0] for maps in (delta, B, C))
    scans = []
    for k, order in enumerate(orders):
        bias = None if delta_bias is None else delta_bias[k]
        steps = _steps(delta[k], bias, delta_softplus)
        skip = None if D is None else _wide(D[k])
        scans.append(Scan(inputs, steps, _wide(A[k]), B[k, None], C[k, None], order, skip))
    return tuple(scans), (height, width)


def _ssd(item, x, dt, A, B, C, D, z, dt_bias, initial_states, dt_softplus, dt_limit, *_):
    """A head's channels share their matrix: they are one channel here, whose inputs are the mean of theirs."""
    order = torch.arange(x.shape[1], device=x.device)
    steps = _steps(rearrange(_wide(dt[item]), "l h -> h l"), dt_bias, dt_softplus).clamp(*dt_limit)
    B, C = (rearrange(_wide(tensor[item]), "l g n -> g n l") for tensor in (B, C))
    inputs = rearrange(_wide(x[item]), "l h p -> h l p").mean(-1)
    return (Scan(inputs, steps, _wide(A)[:, None], B, C, order, _wide(D)),), None


READERS: dict[str, Callable[..., tuple[tuple[Scan, ...], tuple[int, int] | None]]] = {
    "selective_scan": _selective_scan,
    "cross_selective_scan": _cross_selective_scan,
    "ssd": _ssd,
}


def _steps(delta: Float[Tensor, "d l"], bias: Tensor | None, softplus: bool) -> Float[Tensor, "d l"]:
    delta = delta if bias is None else delta + repeat(_wide(bias), "d -> d l", l=delta.shape[-1])
    return F.softplus(delta) if softplus else delta


def _wide(tensor: Tensor | None) -> Any:
    """In the type of the scan's state, and apart from the network."""
    return None if tensor is None else tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
