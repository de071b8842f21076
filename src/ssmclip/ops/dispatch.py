"""Choose the implementation of an operator from its table of back ends."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

from ssmclip.registry import UnknownName

KNOWN = ("reference", "chunked", "cpu", "triton")

_forced: ContextVar[str] = ContextVar("ssmclip_ops_backend", default="auto")


@dataclass(frozen=True)
class Backend:
    """One implementation of an operator.

    run: the function; devices: the device types it runs on, empty for all; needs: the package it imports, "" for none.
    """

    run: Callable
    devices: tuple[str, ...] = ()
    needs: str = ""

    def why_not(self, device: str) -> str:
        """Return why it cannot run on this type of device, "" when it can."""
        # Tensors of shapes alone go through the same registered operators as those on the CPU.
        if self.devices and (device if device != "meta" else "cpu") not in self.devices:
            return f"runs on {', '.join(self.devices)}, not on {device}"
        # PyTorch would take the missing forward-mode derivative of a registered operator for zero, silently.
        if self.devices and _differentiating():
            return "has no derivative for torch.func or forward mode"
        if self.needs and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed (pip install {self.needs})"
        return ""

    def why_not_here(self) -> str:
        """Return why it can run on no device of this machine, "" when it can."""
        gpu = torch.cuda.is_available()
        if self.devices == ("cuda",) and not gpu:
            return "no GPU"
        reasons = [self.why_not(device) for device in (("cuda", "cpu") if gpu else ("cpu",))]
        return "" if "" in reasons else reasons[-1 if "cpu" in self.devices else 0]


def _differentiating() -> bool:
    """Return whether a differentiating transform of torch.func, or forward mode, is active."""
    if forward_ad._current_level >= 0:
        return True
    if torch.compiler.is_compiling():  # which cannot look at the layers of transforms
        return torch._C._are_functorch_transforms_active()
    layers = torch._C._functorch.get_interpreter_stack() or ()
    return any(layer.key() in (TransformType.Grad, TransformType.Jvp) for layer in layers)


@dataclass(frozen=True)
class Call:
    """A call of an operator: the table of its back ends, and the arguments that each of them takes, in their order."""

    backends: Mapping[str, Backend]
    arguments: tuple[Any, ...]


_hearer: ContextVar[Callable[[Call], None] | None] = ContextVar("ssmclip_ops_hearer", default=None)


@contextmanager
def hearing(hear: Callable[[Call], None]) -> Iterator[None]:
    """Call `hear` with every call of an operator inside, before it is computed. Its tensors are those of the network.

    >>> import torch
    >>> from ssmclip.ops import BACKENDS, hearing, selective_scan
    >>> calls, u, A, B = [], torch.ones(1, 1, 3), torch.zeros(1, 1), torch.ones(1, 1, 1, 3)
    >>> with hearing(calls.append):
    ...     y = selective_scan(u, u, A, B, B)
    >>> calls[0].backends is BACKENDS["selective_scan"], calls[0].arguments[0] is u
    (True, True)
    """
    token = _hearer.set(hear)
    try:
        yield
    finally:
        _hearer.reset(token)


@contextmanager
def using(backend: str) -> Iterator[None]:
    """Make every operator inside that is called with backend="auto" use this back end ("auto" restores the choice).

    >>> import torch
    >>> from ssmclip.ops import selective_scan, using
    >>> u, A, B = torch.ones(1, 1, 3), torch.zeros(1, 1), torch.ones(1, 1, 1, 3)
    >>> with using("reference"):
    ...     selective_scan(u, u, A, B, B)
    tensor([[[1., 2., 3.]]])

    Raises UnknownName if there is no such back end.
    """
    if backend not in (*KNOWN, "auto"):
        raise UnknownName("back end", backend, (*KNOWN, "auto"))
    token = _forced.set(backend)
    try:
        yield
    finally:
        _forced.reset(token)


def choose(backends: Mapping[str, Backend], asked: str, device: str) -> Callable:
    """Return the function to run: the requested one, else the one `using` forces, else the first that can run.

    Raises UnknownName for an unknown back end, RuntimeError for one that cannot run here.
    """
    run = _choose(backends, asked, device)
    hear = _hearer.get()
    return run if hear is None else _heard(run, backends, hear)


def _heard(run: Callable, backends: Mapping[str, Backend], hear: Callable[[Call], None]) -> Callable:
    def call(*arguments: Any) -> Any:
        hear(Call(backends, arguments))
        return run(*arguments)

    return call


def _choose(backends: Mapping[str, Backend], asked: str, device: str) -> Callable:
    name = _forced.get() if asked == "auto" else asked
    if name == "auto":
        return next(backend.run for backend in backends.values() if not backend.why_not(device))
    if name not in backends:
        raise UnknownName("back end", name, (*backends, "auto"))
    if reason := backends[name].why_not(device):
        raise RuntimeError(f"back end {name!r} cannot run here: it {reason}. Others: {', '.join(backends)}, auto")
    return backends[name].run
