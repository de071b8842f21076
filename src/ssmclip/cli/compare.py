"""ssmclip compare: paired tests between the models of rows files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ssmclip.rows import Result

HELP = "paired tests between models evaluated on the same images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", type=Path, help="rows files written by `ssmclip evaluate`")
    parser.add_argument("--out", type=Path, help="rows file to write (default: none)")
    parser.add_argument(
        "--margin",
        type=float,
        help="largest difference that counts as none, as a fraction of the images: tests whether models are on par "
        "within it (two one-sided paired t tests)",
    )
    parser.add_argument(
        "--agreement", action="store_true", help="Cohen's kappa of which images the two models have right, as rows"
    )
    parser.add_argument(
        "--resamples",
        type=int,
        help="number of bootstrap resamples of the differences' intervals (default: the 1,000 of `ssmclip evaluate`)",
    )


def run(args: argparse.Namespace) -> int:
    from ssmclip.cli.options import require_writable
    from ssmclip.evaluate.statistics.paired import compared
    from ssmclip.rows import describe_run, read_rows, write_rows

    if args.out:
        require_writable(args.out, args.rows)
    found = [row for path in args.rows for row in read_rows(path)[1]]
    rows = compared(found, margin=args.margin, agreement=args.agreement, resamples=args.resamples)
    if not rows:
        raise ValueError("nothing to compare: no two models in these files have the same metric on the same images")
    if args.out:
        write_rows(args.out, rows, describe_run(0))
    sys.stdout.write("".join(map(described, rows)))
    return 0


def described(row: Result) -> str:
    """Return the line of one comparison: difference, interval, p values."""
    from ssmclip.cli.options import line

    tests = [f"p={row.extra['mcnemar_p']:.3g}"] if "mcnemar_p" in row.extra else []
    tests += [f"Holm p={row.extra['holm_p']:.3g}"] if "holm_p" in row.extra else []
    tests += [f"equivalence p={row.extra['equivalence_p']:.3g}"] if "equivalence_p" in row.extra else []
    return f"{line(row)}  {', '.join([*tests, f'minus {row.against}'])}\n"
