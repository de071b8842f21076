"""Mamba-2's scan on a GPU, in Triton: one kernel forward and one backward, any strides, no (length, length) tensor.

It reads x, B and C in float32, bfloat16 or float16 as they come; the state is float32 (float64 for float64). Products
are in TensorFloat-32, which has the digits of float16 and more than bfloat16: one where the inputs have no more digits
themselves, three, which keep float32's, for float32. So this needs a card of 2020 or later (sm_80). So far run in
Triton's interpreter only, on a CPU, whose products are float32's; see `ssmclip.ops.selective_scan.triton`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ssmclip.ops.selective_scan.cpu import second_gradient
from ssmclip.ops.selective_scan.triton import power_of_two, state_type
from ssmclip.ops.ssd import chunked

CHUNK = 32  # positions; beside the whole state of 64 channels x 128 in registers there is room for no more
SMALLEST = 16  # rows or columns of a matrix product

_INPUTS = "Tensor x, Tensor step, Tensor A, Tensor B, Tensor C, Tensor? initial"
_library = torch.library.Library("ssmclip", "FRAGMENT")
_library.define(f"ssd_triton({_INPUTS}, bool want_last, bool save) -> (Tensor y, Tensor last, Tensor saved)")
_library.define(
    f"ssd_triton_backward(Tensor dy, Tensor? dlast, {_INPUTS}, Tensor saved) -> "
    "(Tensor dx, Tensor dstep, Tensor dA, Tensor dB, Tensor dC, Tensor dinitial)"
)


def ssd(*inputs, **options):
    """See `ssmclip.ops.ssd`."""
    return chunked.around(_scan, *inputs, **options, widen=False)


def _scan(x, step, A, B, C, initial, want_last):
    inputs = x, step, A, B, C, initial
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, last, _ = torch.ops.ssmclip.ssd_triton(*inputs, want_last, save)
    return y, last


def _constants(kernel: str, x: Tensor, states: int) -> dict:
    """The constants of the compilation. The backward pass holds twice as many tiles: it takes half the channels.

    The states saved by one pass are those the other starts from: both cut the length alike. For bfloat16 at 64 channels
    x 128 states the forward pass spills 144 bytes a thread on sm_90 (896 in chunks of 64), the backward pass 2752.
    """
    import triton.language as tl

    double = x.dtype == torch.float64
    precision = {torch.float64: "ieee", torch.float32: "tf32x3"}.get(x.dtype, "tf32")
    # Channels by states is what a block holds in shared memory: 256 states at 64 channels are more than cards have.
    most = (64 if kernel == "forward" else 32) * 128 // max(128, power_of_two(states))
    return {
        "TYPE": tl.float64 if double else tl.float32,
        "PRECISION": precision,
        "Q": CHUNK,
        "P": max(SMALLEST, min(most, power_of_two(x.shape[3]))),
        "N": max(SMALLEST, power_of_two(states)),
        "num_warps": 8,
        "num_stages": 1,
        "enable_fp_fusion": True,
    }


def _new_outputs(x, B, want_last, save):
    """Memory for (y, last, saved); saved is (batch, chunk, head, channel, state)."""
    (batch, length, heads, width), states = x.shape, B.shape[3]
    last = (batch, heads, width, states) if want_last else (0,)
    saved = (batch, (length + CHUNK - 1) // CHUNK, heads, width, states) if save else (0,)
    return tuple(x.new_empty(shape, dtype=state_type(x)) for shape in (x.shape, last, saved))


@torch.library.impl(_library, "ssd_triton", "CUDA")
@torch.library.impl(_library, "ssd_triton", "CPU")  # Triton's interpreter
def _forward(x, step, A, B, C, initial, want_last, save):
    y, last, saved = _new_outputs(x, B, want_last, save)
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    if x.numel() == 0:
        return y, last.zero_() if initial is None or not want_last else last.copy_(initial), saved
    from ssmclip.ops.ssd import triton_kernels

    constants = _constants("forward", x, states)
    blocks = -(-width // constants["P"])
    with torch.cuda.device_of(x):
        triton_kernels.forward[(batch * heads * blocks,)](
            *(x, step, A.contiguous(), B, C, None if initial is None else initial.contiguous()),
            *(y, last if want_last else None, saved if save else None),
            *(heads, heads // groups, width, length, states, blocks),
            *(*x.stride(), *step.stride(), *B.stride(), *C.stride()),
            **constants,
        )
    return y, last, saved


@torch.library.register_fake("ssmclip::ssd_triton", lib=_library)
def _forward_fake(x, step, A, B, C, initial, want_last, save):
    return _new_outputs(x, B, want_last, save)


def _new_gradients(x, step, A, B, C, initial):
    """Memory for the gradients of the inputs, in their types, without elements for an initial state not given."""
    dinitial = step.new_empty((0,) if initial is None else initial.shape)
    return *(t.new_empty(t.shape) for t in (x, step, A, B, C)), dinitial


@torch.library.impl(_library, "ssd_triton_backward", "CUDA")
@torch.library.impl(_library, "ssd_triton_backward", "CPU")
def _backward(dy, dlast, x, step, A, B, C, initial, saved):
    gradients = _new_gradients(x, step, A, B, C, initial)
    dx, dstep, dA, dB, dC, dinitial = gradients
    (batch, length, heads, width), (groups, states) = x.shape, B.shape[2:]
    if x.numel() == 0:
        for t in gradients:
            t.zero_()
        if initial is not None and dlast is not None:
            dinitial.copy_(dlast)
        return gradients
    from ssmclip.ops.ssd import triton_kernels

    if saved.numel() == 0:
        saved = _forward(x, step, A, B, C, initial, False, True)[2]
    constants = _constants("backward", x, states)
    blocks = -(-width // constants["P"])
    # One sum per block of channels and head, added up afterwards in a fixed order.
    each_step = step.new_empty(blocks, *step.shape)
    each_a = step.new_empty(blocks, batch, heads)
    each_b, each_c = step.new_empty(2, blocks, batch, length, heads, states)
    with torch.cuda.device_of(x):
        triton_kernels.backward[(batch * heads * blocks,)](
            *(dy, None if dlast is None else dlast.contiguous(), x, step, A.contiguous(), B, C, saved),
            *(dx, each_step, each_a, each_b, each_c, None if initial is None else dinitial),
            *(batch, heads, heads // groups, width, length, states, blocks),
            *(*dy.stride(), *x.stride(), *step.stride(), *B.stride(), *C.stride()),
            **constants,
        )
    dstep.copy_(each_step.sum(0))
    dA.copy_(each_a.sum((0, 1)))
    for gradient, each in ((dB, each_b), (dC, each_c)):
        gradient.copy_(each.unflatten(3, (groups, -1)).sum((0, 4)))
    return gradients


@torch.library.register_fake("ssmclip::ssd_triton_backward", lib=_library)
def _backward_fake(dy, dlast, x, step, A, B, C, initial, saved):
    return _new_gradients(x, step, A, B, C, initial)


def _remember(ctx, inputs, output):
    *tensors, _, _ = inputs
    saved = output[2]
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, saved)


def _gradient(ctx, dy, dlast, _):
    *inputs, saved = ctx.saved_tensors
    if dy is None:
        dy = torch.zeros_like(inputs[0])
    grads = torch.ops.ssmclip.ssd_triton_backward(dy, dlast, *inputs, saved)
    return *(None if x is None else g for x, g in zip(inputs, grads, strict=True)), None, None


def _remember_gradient(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _second_gradient(ctx, *grads_of_grads):
    """The derivative of what `chunked` gives as the gradient; in its turn differentiable."""
    dy, dlast, *inputs, _ = ctx.saved_tensors

    def scan(x, step, A, B, C, initial):
        x, B, C = (t.to(step.dtype) for t in (x, B, C))
        return chunked.scan(x, step, A, B, C, initial, dlast is not None)

    return *second_gradient(scan, [dy, dlast], inputs, grads_of_grads, ctx), None


torch.library.register_autograd("ssmclip::ssd_triton", _gradient, setup_context=_remember, lib=_library)
torch.library.register_autograd(
    "ssmclip::ssd_triton_backward", _second_gradient, setup_context=_remember_gradient, lib=_library
)
