"""ssmclip ops: which kernels this machine can run."""

from __future__ import annotations

import argparse
from contextlib import suppress

HELP = "list of kernels: which are available here, and why the others are not"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add no arguments: every kernel is listed."""


def run(args: argparse.Namespace) -> None:
    from ssmclip.ops import available

    for op, backend, exists, why_not in available():
        print(f"{op:24} {backend:10} {'yes' if exists else 'no: ' + why_not}")
    with suppress(ImportError):  # Numba may be absent
        from ssmclip.ops.simd import REGISTER_BYTES

        print(f"The cpu kernels compute with vectors of {REGISTER_BYTES} bytes (SSMCLIP_VECTOR_BYTES overrides).")
