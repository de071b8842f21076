"""State-space recurrences over sequences and images. `reference` is the definition; every back end agrees with it.

Back ends: `reference` (a loop), `chunked` (plain PyTorch, any device), `cpu` (Numba, vectorised and threaded;
BLAS where there are matrix products), `triton` (CUDA GPUs).
`backend="auto"` takes the fastest that exists for the tensors given; `with using("reference"):` forces one.
`python -m ssmclip ops` prints which exist on this machine.
"""

import torch.fx

from ssmclip.ops.causal_conv import causal_conv1d
from ssmclip.ops.cross_scan import cross_merge, cross_scan, cross_selective_scan
from ssmclip.ops.dispatch import Backend, Call, hearing, using
from ssmclip.ops.selective_scan import selective_scan
from ssmclip.ops.ssd import ssd

__all__ = [
    "BACKENDS",
    "Backend",
    "Call",
    "available",
    "causal_conv1d",
    "cross_merge",
    "cross_scan",
    "cross_selective_scan",
    "hearing",
    "selective_scan",
    "ssd",
    "using",
]

from ssmclip.ops.causal_conv import BACKENDS as _CONV
from ssmclip.ops.cross_scan import BACKENDS as _CROSS
from ssmclip.ops.selective_scan import BACKENDS as _SCAN
from ssmclip.ops.ssd import BACKENDS as _SSD

# Which back end runs is decided call by call: torch.fx records the call, for whatever tracer, and does not look inside.
for _operator in ("causal_conv1d", "cross_merge", "cross_scan", "cross_selective_scan", "selective_scan", "ssd"):
    torch.fx.wrap(_operator)

BACKENDS = {"selective_scan": _SCAN, "cross_selective_scan": _CROSS, "ssd": _SSD, "causal_conv1d": _CONV}


def available(device: str | None = None) -> list[tuple[str, str, bool, str]]:
    """Return the back ends as (operator, back end, available, why not), best first. `why not` is "" if available.

    device: the type of device to run on, None for any that this machine has.
    """
    return [
        (op, name, not (reason := backend.why_not_here() if device is None else backend.why_not(device)), reason)
        for op, backends in BACKENDS.items()
        for name, backend in backends.items()
    ]
