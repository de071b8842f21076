"""ssmclip compare: paired tests between the models of rows files."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

HELP = "paired tests between models evaluated on the same images"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", type=Path, help="rows files written by `ssmclip evaluate`")
    parser.add_argument("--out", type=Path, help="rows file to write (default: none)")


def run(args: argparse.Namespace) -> int:
    from ssmclip.cli.options import line, require_writable
    from ssmclip.evaluate.statistics.paired import paired_rows
    from ssmclip.rows import describe_run, read_rows, write_rows

    if args.out:
        require_writable(args.out, args.rows)
    rows = paired_rows([row for path in args.rows for row in read_rows(path)[1]])
    if not rows:
        raise ValueError("nothing to compare: no two models in these files have the same metric on the same images")
    if args.out:
        write_rows(args.out, rows, describe_run(0))
    sys.stdout.write("".join(f"{line(row)}  p={row.extra['mcnemar_p']:.3g}, minus {row.against}\n" for row in rows))
    return 0
