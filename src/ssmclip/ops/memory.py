"""Allocate memory for results: in large pages if Linux grants them, and kept between calls if the system uses glibc.

A page is cleared when it is first touched, which costs more than writing it. glibc keeps freed memory for the next
tensor, but from 32 MiB on it returns it and asks again each time: there pages of 2 MiB instead of 4 KiB take a third
off a scan's time. PyTorch asks for large pages only where the environment says so, at its start.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor

PAGE, LARGE_PAGE = 4096, 2**21
NEVER_KEPT = 2**25  # bytes; DEFAULT_MMAP_THRESHOLD_MAX of glibc on 64 bits
_ADVISE_LARGE_PAGES = 14  # MADV_HUGEPAGE
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_KEPT_UP_TO = 2**30  # bytes of one tensor


def _system_call(name: str, *arguments: type):
    """Return the C library's function, or None if it has none of that name."""
    function = getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
    if function is not None:
        function.argtypes = arguments
    return function


_madvise = _system_call("madvise", ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_mallopt = _system_call("mallopt", ctypes.c_int, ctypes.c_int)


def want_large_pages(x: Tensor) -> None:
    """Advise the system to use large pages; values do not change, and a system without them ignores it."""
    storage = x.untyped_storage()
    if _madvise is None or storage.nbytes() < NEVER_KEPT:
        return
    start = -(-storage.data_ptr() // PAGE) * PAGE
    _madvise(start, storage.data_ptr() + storage.nbytes() - start, _ADVISE_LARGE_PAGES)


def keep_freed_memory() -> bool:
    """Make this process keep freed memory for the next tensor; return False if the C library cannot do so.

    For commands that take the same step again and again, never for a library in someone else's process: resident memory
    stays at its highest. Tensors above 1 GiB are still given back, and once an allocation has failed glibc takes memory
    from an arena of at most 64 MiB, and gives back what is larger.
    """
    if _mallopt is None:
        return False
    return bool(_mallopt(_TRIM_THRESHOLD, 2**31 - 1) and _mallopt(_MMAP_THRESHOLD, _KEPT_UP_TO))
