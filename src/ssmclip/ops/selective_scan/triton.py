"""The scan on a GPU, in Triton: no compiler to install, no (batch, dim, length, state) tensor, any strides.

It reads float32, bfloat16 and float16 as they come and keeps a float32 state (float64 for float64); each input is read
once and each result written once. So far it has been run in Triton's interpreter only, on a CPU: the values are tested
there, and the kernels compile for sm_90; the sizes in `tile` are reasoned, not measured on a card.

Operators of their own beside those of `cpu`: torch.compile keeps them whole, and the second derivative is that of the
gradient `chunked` gives.
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
    forward pass needs 150 registers a thread, the backward pass 247 with one state and all 255 with 16.
    """
    columns = _power_of_two(states)
    steps = min(steps_of(states), _power_of_two(length))
    elements = 4096 if kernel == "backward" and states > 4 else 2048
    channels = min(_power_of_two(width), max(1, elements // (steps * columns)))
    return Tile(channels, steps, columns, 4 if kernel == "forward" else 8)


def steps_of(states):
    return 64 if states <= 4 else 32 if states <= 16 else 16


def _power_of_two(count: int) -> int:
    return 1 << max(count - 1, 0).bit_length()


def _state_type(u: Tensor) -> torch.dtype:
    return torch.promote_types(u.dtype, torch.float32)


def _constants(u: Tensor, sizes: Tile, delta_softplus: bool) -> dict:
    """The constants of the compilation. TERMS: of the softplus's series, to the type's last digit."""
    import triton.language as tl

    double = u.dtype == torch.float64
    return {
        "SOFTPLUS": delta_softplus,
        "TYPE": tl.float64 if double else tl.float32,
        "TERMS": 17 if double else 8,
        "CHANNELS": sizes.channels,
        "STEPS": sizes.steps,
        "STATES": sizes.states,
        "num_warps": sizes.warps,
        "enable_fp_fusion": True,
    }


def _strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if x is None else x.stride()


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.contiguous() for x in tensors]


def _new_outputs(u, A, want_last, save):
    """Memory for (y, last, saved); saved is (batch, chunk, channel, state)."""
    batch, dim, length = u.shape
    state, states = _state_type(u), A.shape[1]
    # Sizes may be symbols here; a chunk longer than the sequence is one chunk all the same.
    chunks = (length + steps_of(states) - 1) // steps_of(states)
    last = u.new_empty((batch, dim, states) if want_last else (0,), dtype=state)
    saved = u.new_empty((batch, chunks, dim, states) if save else (0,), dtype=state)
    return cpu.like(u), last, saved


@torch.library.impl(_library, "selective_scan_triton", "CUDA")
@torch.library.impl(_library, "selective_scan_triton", "CPU")  # Triton's interpreter
def _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, want_last, save):
    y, last, saved = _new_outputs(u, A, want_last, save)
    (batch, dim, length), groups, states = u.shape, B.shape[1], A.shape[1]
    if u.numel() == 0:
        return y, last.zero_(), saved
    from ssmclip.ops.selective_scan import triton_kernels

    sizes = tile("forward", dim // groups, length, states)
    blocks = -(-(dim // groups) // sizes.channels)
    A, D, delta_bias = _contiguous(A, D, delta_bias)
    with torch.cuda.device_of(u):
        triton_kernels.forward[(batch * groups * blocks,)](
            *(u, delta, A, B, C, D, z, delta_bias),
            *(y, last if want_last else None, saved if save else None),
            *(groups, dim // groups, length, states, blocks),
            *(*u.stride(), *delta.stride(), *B.stride(), *C.stride(), *_strides(z, 3), *y.stride()),
            **_constants(u, sizes, delta_softplus),
        )
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
    from ssmclip.ops.selective_scan import triton_kernels

    if saved.numel() == 0:
        saved = _forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, False, True)[2]
    du, ddelta, dA, dB, dC, dD, dz, dbias = gradients
    (batch, dim, length), groups, states = u.shape, B.shape[1], A.shape[1]
    sizes = tile("backward", dim // groups, length, states)
    blocks = -(-(dim // groups) // sizes.channels)
    # One sum per batch element or block of channels, added up afterwards in a fixed order.
    each_a = saved.new_empty(batch, dim, states)
    each_d, each_bias = saved.new_empty(2, batch, dim)
    each_b, each_c = saved.new_empty(2, blocks, batch, groups, length, states)
    contiguous_a, contiguous_d, contiguous_bias, dlast = _contiguous(A, D, delta_bias, dlast)
    with torch.cuda.device_of(u):
        triton_kernels.backward[(batch * groups * blocks,)](
            *(dy, dlast, u, delta, contiguous_a, B, C, contiguous_d, z, contiguous_bias, saved),
            *(du, ddelta, each_a, each_b, each_c, each_d, None if z is None else dz, each_bias),
            *(groups, dim // groups, length, states, blocks, batch),
            *(*dy.stride(), *u.stride(), *delta.stride(), *B.stride(), *C.stride(), *_strides(z, 3)),
            *(*du.stride(), *ddelta.stride(), *(_strides(None, 3) if z is None else dz.stride())),
            **_constants(u, sizes, delta_softplus),
        )
    dA.copy_(each_a.sum(0))
    dB.copy_(each_b.sum(0).transpose(2, 3))
    dC.copy_(each_c.sum(0).transpose(2, 3))
    if D is not None:
        dD.copy_(each_d.sum(0))
    if delta_bias is not None:
        dbias.copy_(each_bias.sum(0))
    return gradients


@torch.library.register_fake("ssmclip::selective_scan_triton_backward", lib=_library)
def _backward_fake(dy, dlast, u, delta, A, B, C, D, z, delta_bias, saved, delta_softplus):
    return _new_gradients(u, delta, A, B, C, D, z, delta_bias)


cpu.register_derivatives("selective_scan_triton", _library)
