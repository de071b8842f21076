"""ssmclip ood: what models answer to distorted images, and how near they come to people."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.evaluate.command import line, require_writable

HELP = "out-of-distribution images: scores of models beside people"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="ood_command", required=True, metavar="COMMAND")
    score = commands.add_parser("score", help="accuracy, consistency with people and shape bias, as rows")
    score.add_argument(
        "--decisions", required=True, nargs="+", type=Path, help="parquet or csv files, or folders of them, of models"
    )
    score.add_argument("--humans", required=True, nargs="+", type=Path, help="the same of people")
    score.add_argument("--out", required=True, type=Path, help="the rows file to write (JSON lines)")
    score.add_argument(
        "--resamples", type=int, default=1000, help="of the bootstrap intervals; 0: none (default: %(default)s)"
    )
    score.add_argument("--seed", type=int, default=0, help="of the intervals (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    return {"score": _score}[args.ood_command](args)


def _score(args: argparse.Namespace) -> int:
    from ssmclip.data.trials import read_trials
    from ssmclip.evaluate.ood import LEVEL, TASK, score_decisions
    from ssmclip.results import describe_run, write_rows

    require_writable(args.out)
    rows = score_decisions(
        read_trials(args.humans), read_trials(args.decisions), resamples=args.resamples, seed=args.seed
    )
    write_rows(args.out, rows, describe_run(args.seed, resamples=args.resamples))
    shown = [row for row in rows if row.task == TASK] or [row for row in rows if not row.condition.startswith(LEVEL)]
    sys.stdout.write("\n".join(line(row) for row in shown) + f"\n{len(rows)} rows in {args.out}\n")
    return 0
