"""The scan on a GPU, in Triton: no compiler to install, no (batch, dim, length, state) tensor, any strides.

It reads float32, bfloat16 and float16 as they come and keeps a float32 state (float64 for float64); each input is read
once and each result written once. So far it has been run in Triton's interpreter only, on a CPU: the values are tested
there, and the kernels compile for sm_90; the sizes in `tile` are reasoned, not measured on a card.

They are operators separate from those of `cpu`: torch.compile keeps them whole, and the second derivative is that
of the gradient `chunked` gives.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ssmclip.ops.selective_scan import cpu

_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define(
    f"selective_scan_triton({cpu.INPUTS}, bool delta_softplus, bool want_last, bool save) -> "
    "(Tensor y, Tensor last, Tensor saved)"
)
_library.define(
    f"selective_scan_triton_backward(Tensor dy, Tensor? dlast, {cpu.INPUTS}, Tensor saved, bool delta_softplus) -> "
    "(Tensor du, Tensor ddelta, Tensor dA, Tensor dB, Tensor dC, Tensor dD, Tensor dz, Tensor dbias)"
)


def selective_scan(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False):
    """See `ssmclip.ops.selective_scan`. B and C have four dimensions here."""
    inputs = u, delta, A, B, C, D, z, delta_bias
    save = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, last, _ = torch.ops.ssmclip.selective_scan_triton(*inputs, delta_softplus, return_last_state, save)
    return (y, last) if return_last_state else y


@dataclass(frozen=True)
class Tile:
    """What a program holds at once: channels x steps x states (powers of two), by so many warps of 32 threads."""

    channels: int
    steps: int
    states: int
    warps: int


def tile(kernel: str, width: int, length: int, states: int) -> Tile:
    """Chunks of 64 positions for few states (49 and 196 waste little), 32 for 16.

    The backward pass adds up dB and dC over the channels of a program, so with many states it takes twice the channels.
    Both passes cut the length alike: the states saved by one are those the other starts from. Compiled for sm_90, the
    forward pass needs 146 to 254 registers a thread, the backward pass 252 to 255; 16 states spill 8 bytes.
    """
    columns = power_of_two(states)
    steps = min(steps_of(states), power_of_two(length))
    elements = 4096 if kernel == "backward" and states > 4 else 2048
    channels = min(power_of_two(width), max(1, elements // (steps * columns)))
    return Tile(channels, steps, columns, 4 if kernel == "forward" else 8)


def steps_of(states):
    return 64 if states <= 4 else 32 if states <= 16 else 16


def power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


@dataclass(frozen=True)
class Scans:
    """What is scanned: sequences, groups x width channels each; or maps (rows, columns), a group for each direction."""

    batch: int
    groups: int
    width: int
    length: int
    states: int
    delta_softplus: bool
    map: tuple[int, int] | None = None

    def blocks(self, sizes: Tile) -> int:
        """Of channels, in a group."""
        return -(-self.width // sizes.channels)

    def numbers(self, sizes: Tile, *more: int) -> tuple[int, ...]:
        """As the kernels take them, more of them before those of the map."""
        own = self.groups, self.width, self.length, self.states, self.blocks(sizes)
        return *own, *more, *(self.map or (0, 0))


def state_type(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


def _constants(scans: Scans, sizes: Tile, state: torch.dtype) -> dict:
    """The constants of the compilation. TERMS: of the softplus's series, to the type's last digit."""
    import triton.language as tl

    double = state == torch.float64
    return {
        "MAP": scans.groups if scans.map is not None else 0,
        "SOFTPLUS": scans.delta_softplus,
        "TYPE": tl.float64 if double else tl.float32,
        "TERMS": 17 if double else 8,
        "CHANNELS": sizes.channels,
        "STEPS": sizes.steps,
        "STATES": sizes.states,
        "num_warps": sizes.warps,
        "enable_fp_fusion": True,
    }


# A tensor goes to the kernels with its strides over (batch, group, channel, position), or over (batch, group, position,
# state) where it has states; None is (None, no strides).
Strided = tuple[Tensor | None, tuple[int, ...]]


def _sequence(x: Tensor | None, width: int) -> Strided:
    """(batch, dim, length)"""
    if x is None:
        return None, (0, 0, 0, 0)
    return x, (x.stride(0), width * x.stride(1), x.stride(1), x.stride(2))


def _per_state(x: Tensor) -> Strided:
    """(batch, group, state, length)"""
    return x, (x.stride(0), x.stride(1), x.stride(3), x.stride(2))


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def new_states(u: Tensor, batch, channels, length, states, want: bool) -> Tensor:
    """Memory for the states before each chunk, (batch, chunk, channel, state)."""
    # Sizes may be symbols here; a chunk longer than the sequence is one chunk all the same.
    chunks = (length + steps_of(states) - 1) // steps_of(states)
    return u.new_empty((batch, chunks, channels, states) if want else (0,), dtype=state_type(u))


def forward(scans: Scans, u: Strided, delta: Strided, A, B: Strided, C: Strided, D, z: Strided, bias, y, last, saved):
    """Writes y, and last and saved where they have elements."""
    from ssmclip.ops.selective_scan import triton_kernels

    sizes = tile("forward", scans.width, scans.length, scans.states)
    strided = u, delta, B, C, z, y
    u, delta, B, C, z, y = (x for x, _ in strided)
    A, D, bias = _contiguous(A, D, bias)
    with torch.cuda.device_of(u):
        triton_kernels.forward[(scans.batch * scans.groups * scans.blocks(sizes),)](
            *(u, delta, A, B, C, D, z, bias, y, *(x if x.numel() else None for x in (last, saved))),
            *scans.numbers(sizes),
            *(stride for _, strides in strided for stride in strides),
            **_constants(scans, sizes, saved.dtype),
        )


def backward(
    scans: Scans,
    *tensors: Strided,
    dlast: Tensor | None,
    parameters: tuple[Tensor | None, ...],
    saved: Tensor,
    results: tuple[Strided, ...],
):
    """Writes the results (du, ddelta, dz); returns the gradients of A, B, C, D and the bias, in the state's type.

    tensors: dy, u, delta, B, C, z; parameters: A, D, bias. Those of B and C come as (batch, group, position, state).
    """
    from ssmclip.ops.selective_scan import triton_kernels

    sizes = tile("backward", scans.width, scans.length, scans.states)
    blocks, channels = scans.blocks(sizes), scans.groups * scans.width
    # One sum per batch element or block of channels, added up afterwards in a fixed order.
    each_a = saved.new_empty(scans.batch, channels, scans.states)
    each_d, each_bias = saved.new_empty(2, scans.batch, channels)
    each_b, each_c = saved.new_empty(2, blocks, scans.batch, scans.groups, scans.length, scans.states)
    dy, u, delta, B, C, z = (x for x, _ in tensors)
    du, ddelta, dz = (x for x, _ in results)
    A, D, bias, dlast = _contiguous(*parameters, dlast)
    with torch.cuda.device_of(u):
        triton_kernels.backward[(scans.batch * scans.groups * blocks,)](
            *(dy, dlast, u, delta, A, B, C, D, z, bias, saved),
            *(du, ddelta, each_a, each_b, each_c, each_d, dz, each_bias),
            *scans.numbers(sizes, scans.batch),
            *(stride for _, strides in (*tensors, *results) for stride in strides),
            **_constants(scans, sizes, saved.dtype),
        )
    return tuple(x.sum(0) for x in (each_a, each_b, each_c, each_d, each_bias))


def _scans(u: Tensor, A: Tensor, B: Tensor, delta_softplus: bool) -> Scans:
    groups = B.shape[1]
    return Scans(u.shape[0], groups, u.shape[1] // groups, u.shape[2], A.shape[1], delta_softplus)


def _new_outputs(u, A, want_last, save):
    """Memory for (y, last, saved)."""
    last = u.new_empty((u.shape[0], *A.shape) if want_last else (0,), dtype=state_type(u))
    return cpu.like(u), last, new_states(u, *u.shape, A.shape[1], save)


@torch.library.impl(_library, "selective_scan_triton", "CUDA")
@torch.library.impl(_library, "selective_scan_triton", "CPU")  # Triton's interpreter
def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, want_last, save):
    y, last, saved = _new_outputs(u, A, want_last, save)
    if u.numel() == 0:
        return y, last.zero_(), saved
    scans = _scans(u, A, B, delta_softplus)
    u, delta, z, strided_y = (_sequence(x, scans.width) for x in (u, delta, z, y))
    forward(scans, u, delta, A, _per_state(B), _per_state(C), D, z, delta_bias, strided_y, last, saved)
    return y, last, saved


@torch.library.register_fake("ssmclip::selective_scan_triton", lib=_library)
def _forward_fake(u, delta, A, B, C, D, z, delta_bias, delta_softplus, want_last, save):
    return _new_outputs(u, A, want_last, save)


def _new_gradients(u, delta, A, B, C, D, z, delta_bias):
    """Memory for the gradients of the inputs, in their types; without elements for those that are not there."""
    dA, dB, dC, dD, dbias = (u.new_empty(0) if x is None else x.new_empty(x.shape) for x in (A, B, C, D, delta_bias))
    return cpu.like(u), cpu.like(delta), dA, dB, dC, dD, u.new_empty(0) if z is None else cpu.like(z), dbias


@torch.library.impl(_library, "selective_scan_triton_backward", "CUDA")
@torch.library.impl(_library, "selective_scan_triton_backward", "CPU")
def _backward(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus):
    gradients = _new_gradients(u, delta, A, B, C, D, z, delta_bias)
    if u.numel() == 0:
        return tuple(x.zero_() for x in gradients)
    if saved.numel() == 0:
        saved = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, False, True)[2]
    du, ddelta, dA, dB, dC, dD, dz, dbias = gradients
    scans = _scans(u, A, B, delta_softplus)
    width = scans.width
    each_a, each_b, each_c, each_d, each_bias = backward(
        scans,
        *(_sequence(x, width) for x in (dy, u, delta)),
        *(_per_state(B), _per_state(C), _sequence(z, width)),
        dlast=dlast,
        parameters=(A, D, delta_bias),
        saved=saved,
        results=(_sequence(du, width), _sequence(ddelta, width), _sequence(None if z is None else dz, width)),
    )
    dA.copy_(each_a)
    dB.copy_(each_b.transpose(2, 3))
    dC.copy_(each_c.transpose(2, 3))
    if D is not None:
        dD.copy_(each_d)
    if delta_bias is not None:
        dbias.copy_(each_bias)
    return gradients


@torch.library.register_fake("ssmclip::selective_scan_triton_backward", lib=_library)
def _backward_fake(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus):
    return _new_gradients(u, delta, A, B, C, D, z, delta_bias)


cpu.register_derivatives("selective_scan_triton", _library)
