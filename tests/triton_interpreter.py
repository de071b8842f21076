"""With TRITON_INTERPRET=1 the Triton kernels run on the CPU: here they become a back end of it, quicker to test."""

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
    np.seterr(over="ignore", invalid="ignore")  # growing states reach infinity, as on a GPU without a word


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
