"""With TRITON_INTERPRET=1 the Triton kernels run on the CPU: here they become a back end of it, quicker to test."""

import dataclasses

import numpy as np
from triton.runtime.interpreter import ScanOps

from ssmclip.ops import BACKENDS


def install() -> None:
    """Let the back end `triton` run on any device, and the interpreter scan whole tiles instead of numbers."""
    for backends in BACKENDS.values():
        if "triton" in backends:
            backends["triton"] = dataclasses.replace(backends["triton"], devices=())
    ScanOps.generic_scan = _scan_by_doubling
    np.seterr(over="ignore", invalid="ignore")  # growing states reach infinity, as on a GPU without a word


def _scan_by_doubling(self, inputs):
    """Hillis and Steele: after k rounds each position holds the 2^k that end with it, a tree as on the GPU."""
    rows = [np.moveaxis(x.handle.data, self.axis, 0).copy() for x in inputs]

    def tensors(arrays):  # whole tiles: the interpreter knows no others
        return [self.to_tensor(x, own.dtype) for x, own in zip(arrays, inputs, strict=True)]

    step = 1
    while step < len(rows[0]):
        before = tensors(np.roll(x, step, axis=0) for x in rows)
        for x, both in zip(rows, self.combine_fn.fn(*before, *tensors(rows)), strict=True):
            x[step:] = both.handle.data[step:]
        step *= 2
    return tensors(np.moveaxis(x, 0, self.axis) for x in rows)
