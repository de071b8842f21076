"""Hessian-vector products of any loss, by differentiating twice, and the check that they are those of a Hessian.

H v is the gradient of the gradient's inner product with v: reverse over reverse, on one graph that is kept for all
products. (Forward over reverse is no cheaper on a CPU, and wrong through layer norm in `torch.func`'s nestings.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssmclip.analyze.curvature.convolution import grouped_convolutions_by_convolutions

DTYPES = (torch.float32, torch.float64)


class NotTwiceDifferentiable(ValueError):
    """The second derivative that autograd gives is not one. The message names the module whose backward is at fault."""


class OutOfMemory(ValueError):
    """The graph of a Hessian-vector product does not fit into memory."""


class Hessian:
    """The Hessian of `loss` at the parameters' present values, as a product with flat vectors.

    loss() -> scalar tensor, called with attention that can be differentiated twice; dropout and batch norm are what the
    modules' modes say, and one draw of dropout serves all products. It is called once for all products, and twice more
    to compare the first with differences of the gradient.
    parameters: a module, tensors, (name, tensor) pairs or a mapping; those that ask for no gradient are left out.

    size: n, the number of parameters; names, shapes: of the tensors, in the order of the flat vector;
    value: the loss; gradient: (n,); products: how many were taken so far.

    Raises TypeError and ValueError for a loss that is no scalar tensor, for parameters that are none, of half precision
    or on several devices; ValueError naming the parameter for a loss or gradient that is not finite;
    NotTwiceDifferentiable; OutOfMemory.
    """

    def __init__(self, loss: Callable[[], Tensor], parameters: Any):
        named = named_parameters(parameters)
        self.names, self.parameters = list(named), list(named.values())
        self.shapes = [p.shape for p in self.parameters]
        self.size = sum(p.numel() for p in self.parameters)
        self.device = self.parameters[0].device
        self.dtype = torch.float64 if any(p.dtype == torch.float64 for p in self.parameters) else torch.float32
        self.products = 0
        self._loss = loss
        with explained(loss):
            value = call(loss)
            gradients = torch.autograd.grad(value, self.parameters, create_graph=True, allow_unused=True)
        self.value = float(value.detach())
        self.gradient = self._flat(gradients)
        self._require_finite(self.gradient, "the gradient")
        if all(g is None for g in gradients):
            raise ValueError("the loss does not depend on any of the given parameters")
        self._firsts = [(i, g) for i, g in enumerate(gradients) if g is not None and g.requires_grad]

    def __call__(self, vector: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Return H @ vector, with the parameters' type and device. Raises ValueError if it is not finite."""
        self.products += 1
        product = self._product(vector)
        if self.products == 1:
            self._compare_with_differences(vector, product)
        return product

    def _product(self, vector: Tensor) -> Tensor:
        if not self._firsts:
            return torch.zeros_like(vector)
        places, firsts = zip(*self._firsts, strict=True)
        pieces = vector.split([math.prod(shape) for shape in self.shapes])
        directions = [pieces[i].view(self.shapes[i]).to(g.dtype) for i, g in zip(places, firsts, strict=True)]
        with explained(self._loss):
            result = torch.autograd.grad(firsts, self.parameters, directions, retain_graph=True, allow_unused=True)
        product = self._flat(result)
        if not product.sum().isfinite():  # cheaper than looking at each
            self._require_finite(product, "the Hessian's product with a finite vector")
        return product

    def _compare_with_differences(self, vector: Tensor, product: Tensor) -> None:
        """Raise NotTwiceDifferentiable if the gradient's change along the vector differs and a module is the cause.

        A backward without a graph in the last module of all gives a matrix that is symmetric, and wrong.
        """
        eps = torch.finfo(self.dtype).eps
        length = sum(float(p.detach().square().sum()) for p in self.parameters) ** 0.5 or 1.0
        step = eps ** (1 / 3) * length / (float(vector.norm()) or 1.0)
        pieces = vector.split([math.prod(shape) for shape in self.shapes])
        directions = [piece.view(p.shape).to(p.dtype) for piece, p in zip(pieces, self.parameters, strict=True)]

        def gradient() -> Tensor:
            with explained(self._loss):
                return self._flat(torch.autograd.grad(call(self._loss), self.parameters, allow_unused=True))

        try:
            with moved(self.parameters, directions, step):
                ahead = gradient()
            with moved(self.parameters, directions, -step):
                behind = gradient()
        except ValueError as error:
            if isinstance(error, OutOfMemory):
                raise
            return  # not finite a step away: that says nothing of the derivative here
        differences = (ahead - behind) / (2 * step)
        error = float((differences - product).norm())
        rounding = 100 * eps * float(self.gradient.norm()) / step
        # Differences may be far off for a rough loss, or one that is random: only a module found wrong is refused.
        if error > max(0.05 * float(differences.norm()), rounding) and (culprit := find_culprit(self._loss)):
            raise NotTwiceDifferentiable(culprit)

    def _flat(self, tensors: Iterable[Tensor | None]) -> Tensor:
        parts = [
            torch.zeros(shape.numel(), dtype=self.dtype, device=self.device)
            if t is None
            else t.detach().reshape(-1).to(self.dtype)
            for t, shape in zip(tensors, self.shapes, strict=True)
        ]
        return torch.cat(parts)

    def _require_finite(self, flat: Tensor, what: str) -> None:
        pieces = flat.split([math.prod(shape) for shape in self.shapes])
        bad = [name for name, piece in zip(self.names, pieces, strict=True) if not piece.isfinite().all()]
        if bad:
            raise ValueError(
                f"{what} is not finite in {len(bad)} of {len(self.names)} parameters, the first: {bad[0]}. "
                "Causes are a square root or norm at zero and overflowing activations: try float64"
            )

    def refuse(self, asymmetry: float) -> None:
        """Raise NotTwiceDifferentiable for products that are not those of a symmetric matrix, naming the module."""
        culprit = find_culprit(self._loss) or "No single module is at fault: check the other operations of the loss"
        raise NotTwiceDifferentiable(
            f"u'Hv and v'Hu differ by {asymmetry:.1e} of |Hv|, so this is not a Hessian. {culprit}"
        )


def named_parameters(parameters: Any) -> dict[str, Tensor]:
    """Return name -> tensor of those with requires_grad, each tensor once. Raises TypeError and ValueError."""
    if isinstance(parameters, Tensor):
        pairs: Iterable[Any] = [parameters]
    elif isinstance(parameters, nn.Module):
        pairs = parameters.named_parameters()
    elif isinstance(parameters, Mapping):
        pairs = parameters.items()
    else:
        pairs = parameters
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for place, entry in enumerate(pairs):
        name, tensor = entry if isinstance(entry, tuple) else (f"parameter {place}", entry)
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"parameters must be tensors or a module that has some (got a {type(tensor).__name__} as {name})"
            )
        if tensor.requires_grad and id(tensor) not in seen and tensor.numel():
            seen.add(id(tensor))
            named[name] = tensor
    if not named:
        raise ValueError("nothing to differentiate: no parameter has requires_grad set")
    if wrong := {str(p.dtype) for p in named.values()} - {str(dtype) for dtype in DTYPES}:
        raise ValueError(
            f"parameters must be float32 or float64 for second derivatives (got {', '.join(sorted(wrong))})"
        )
    if len(devices := {str(p.device) for p in named.values()}) > 1:
        raise ValueError(f"parameters must be on one device (got {', '.join(sorted(devices))})")
    return named


def call(loss: Callable[[], Tensor]) -> Tensor:
    """Return loss(), made of operations that can be differentiated twice. Raises TypeError, ValueError."""
    with torch.enable_grad(), made_for_second_derivatives():
        value = loss()
    if not isinstance(value, Tensor) or value.numel() != 1:
        given = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"{type(value).__name__}"
        raise TypeError(f"loss() must return a scalar tensor (got {given})")
    if not value.isfinite():
        raise ValueError(f"the loss must be finite (got {value.item()}): check the weights and the batch")
    if not value.requires_grad:
        raise ValueError("loss() must return a tensor with a graph: it was computed under no_grad, or detached")
    with torch.enable_grad():
        return value.reshape(())


@contextmanager
def made_for_second_derivatives() -> Iterator[None]:
    """Use plain attention, as the fused one has no second derivative, and fast second derivatives of convolutions."""
    with sdpa_kernel(SDPBackend.MATH), grouped_convolutions_by_convolutions():
        yield


@contextmanager
def explained(loss: Callable[[], Tensor]) -> Iterator[None]:
    """Turn autograd's and the allocator's errors into ones that say where they arose and what to do."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        said = str(error)
        if is_out_of_memory(error):
            raise OutOfMemory(f"out of memory: {said.splitlines()[0] if said else type(error).__name__}") from error
        if "not implemented" in said or "differentiate twice" in said or "once_differentiable" in said:
            where = find_culprit(loss) or "no single module is at fault"
            raise NotTwiceDifferentiable(f"{where} ({said.splitlines()[0]})") from error
        if "not have been used in the graph" in said or "does not require grad" in said:
            raise ValueError("the loss does not depend on any of the given parameters") from error
        raise


def is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "allocate memory" in str(error)


def find_culprit(loss: Callable[[], Tensor]) -> str:
    """Return, as a sentence, the innermost module whose second derivative raises or is wrong; "" if there is none.

    Every module is run again by itself on the inputs it had. The product of its own Hessian (of a curved function of
    its outputs, by inputs and parameters) is compared with differences of the gradient, which needs no second graph.
    """
    calls: list[tuple[nn.Module, tuple, dict]] = []

    def record(module: nn.Module, args: tuple, kwargs: dict, _: Any) -> None:
        calls.append((module, args, kwargs))

    hook = nn.modules.module.register_module_forward_hook(record, with_kwargs=True)
    try:
        call(loss)
    finally:
        hook.remove()
        # torch leaves this entry behind, and then tells every later torch.compile that there are global hooks.
        nn.modules.module._global_forward_hooks_with_kwargs.pop(hook.id, None)
    names: dict[int, str] = {}
    for module, _, _ in reversed(calls):  # the outermost ends last
        for name, child in module.named_modules():
            names.setdefault(id(child), name or type(module).__name__)
    for module, args, kwargs in calls:  # children end before their parents
        if wrong := _second_derivative_is_wrong(module, args, kwargs):
            return f"module {names[id(module)]!r} ({type(module).__name__}) {wrong}"
    return ""


def _second_derivative_is_wrong(module: nn.Module, args: tuple, kwargs: dict) -> str:
    """Return what is wrong with the module's second derivative, "" if nothing is."""
    args = tuple(_leaf(a) for a in args)
    kwargs = {key: _leaf(a) for key, a in kwargs.items()}
    leaves = [a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.requires_grad]
    leaves += [p for p in module.parameters() if p.requires_grad]
    if not leaves:
        return ""

    def gradient(create_graph: bool) -> list[Tensor]:
        with torch.enable_grad(), made_for_second_derivatives():
            # Copies: a module that works in place must not write into leaves.
            own = [_copy(a) for a in args], {key: _copy(a) for key, a in kwargs.items()}
            outputs = [y for y in _tensors(module(*own[0], **own[1])) if y.is_floating_point() and y.requires_grad]
            curved = sum(((y + random_like(y, 1)).square() / y.numel() ** 0.5).sum() for y in outputs)
        if not outputs:
            return []
        found = torch.autograd.grad(curved, leaves, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, leaves, strict=True)]

    directions = [random_like(x, 2) * (x.detach().norm() / x.numel() ** 0.5 + 0.1) for x in leaves]
    try:
        firsts = gradient(True)
        pairs = [(g, d) for g, d in zip(firsts, directions, strict=False) if g.requires_grad]
        if not firsts:
            return ""
        found: Iterable[Tensor | None] = [None] * len(leaves)
        if pairs:
            found = torch.autograd.grad([g for g, _ in pairs], leaves, [d for _, d in pairs], allow_unused=True)
    except RuntimeError as error:
        said = str(error).splitlines()[0]
        twice = "not implemented" in said or "differentiate twice" in said
        return f"cannot be differentiated twice: {said}" if twice else ""
    step = 1e-2 if leaves[0].dtype == torch.float32 else 1e-4

    def difference(step: float) -> list[Tensor]:
        with moved(leaves, directions, step):
            ahead = gradient(False)
        with moved(leaves, directions, -step):
            behind = gradient(False)
        return [(a - b) / (2 * step) for a, b in zip(ahead, behind, strict=True)]

    differences, closer = difference(step), difference(step / 4)
    products = [torch.zeros_like(x) if h is None else h for h, x in zip(found, leaves, strict=True)]
    error = float(sum((h - d).square().sum() for h, d in zip(products, differences, strict=True))) ** 0.5
    size = float(sum(d.square().sum() for d in differences)) ** 0.5
    doubt = float(sum((c - d).square().sum() for c, d in zip(closer, differences, strict=True))) ** 0.5
    # Where differences depend on their step they prove nothing; a backward without a graph loses much more than that.
    wrong = error > 0.1 * size and doubt < 0.1 * error
    return f"has a backward pass whose own derivative is wrong by {error / size:.0%}" if wrong else ""


def random_like(x: Tensor, seed: int) -> Tensor:
    """Return normal numbers that depend on the shape and the seed only."""
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype).to(x.device)


@contextmanager
def moved(tensors: Iterable[Tensor], directions: Iterable[Tensor], step: float) -> Iterator[None]:
    """Move every tensor to x + step d inside the context, and restore it exactly afterwards."""
    tensors = list(tensors)
    before = [x.detach().clone() for x in tensors]
    try:
        # Through .data: autograd would take graphs that hold these tensors for stale, though they come back unchanged.
        for x, d in zip(tensors, directions, strict=True):
            x.data.add_(d, alpha=step)
        yield
    finally:
        for x, old in zip(tensors, before, strict=True):
            x.data.copy_(old)


def _leaf(value: Any) -> Any:
    return value.detach().clone().requires_grad_() if isinstance(value, Tensor) and value.is_floating_point() else value


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)
