"""With TRITON_INTERPRET=1 the Triton kernels run on the CPU: here they are made a back end of it, and quicker to test."""

import dataclasses

import numpy as np
from triton.runtime.interpreter import ScanOps

from ssmclip.ops import BACKENDS


def install() -> None:
    """Let the back end `triton` run on any device, and the interpreter scan a row at a time instead of a number."""
    for backends in BACKENDS.values():
        if "triton" in backends:
            backends["triton"] = dataclasses.replace(backends["triton"], devices=())
    ScanOps.generic_scan = _scan_by_rows


def _scan_by_rows(self, inputs):
    rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
    scanned = [np.empty_like(x) for x in rows]
    so_far = None
    for t in range(len(rows[0])):
        here = tuple(self.to_tensor(x[t], own.dtype) for x, own in zip(rows, inputs, strict=True))
        so_far = here if so_far is None else self.combine_fn.fn(*so_far, *here)
        for out, value in zip(scanned, so_far, strict=True):
            out[t] = value.handle.data
    return [self.to_tensor(np.moveaxis(x, 0, self.axis), own.dtype) for x, own in zip(scanned, inputs, strict=True)]
