"""ssmclip ops: which kernels this machine can run."""

from __future__ import annotations

import argparse

HELP = "the kernels there are, and why one is missing here"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add nothing: every kernel is listed."""


def run(args: argparse.Namespace) -> None:
    from ssmclip.ops import available

    for op, backend, exists, why_not in available():
        print(f"{op:24} {backend:10} {'yes' if exists else 'no: ' + why_not}")
