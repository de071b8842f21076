"""New memory for results, in large pages where Linux grants them.

A page is cleared when it is first touched, which costs more than writing it. glibc keeps freed memory for the next
tensor, but from 32 MiB on it gives it back and asks anew each time: there pages of 2 MiB instead of 4 KiB take a third
off a scan's time. PyTorch asks for large pages only where the environment says so, at its start.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

PAGE, LARGE_PAGE = 4096, 2**21
NEVER_KEPT = 2**25  # bytes; DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64 bits
_ADVISE_LARGE_PAGES = 14  # MADV_HUGEPAGE


def _system_call():
    if sys.platform != "linux":
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return madvise


_madvise = _system_call()


def want_large_pages(x: Tensor) -> None:
    """Advice only: it changes no value, and a system that has no large pages ignores it."""
    storage = x.untyped_storage()
    if _madvise is None or storage.nbytes() < NEVER_KEPT:
        return
    start = -(-storage.data_ptr() // PAGE) * PAGE
    _madvise(start, storage.data_ptr() + storage.nbytes() - start, _ADVISE_LARGE_PAGES)
