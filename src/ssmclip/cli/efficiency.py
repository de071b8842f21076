"""ssmclip analyze efficiency: the cost of models."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.options import MODELS, add_device, labelled, parse_image_size

HELP = "operations, memory and time of models at each image size and text length"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "--models",
        required=True,
        help=MODELS,
    )
    parser.add_argument(
        "--sizes",
        default="224,448,672,896,1024",
        help="image sizes, in pixels or as HEIGHTxWIDTH (default: %(default)s)",
    )
    parser.add_argument(
        "--lengths", default="", help="text lengths in tokens, such as 77,256,1024, for CLIPs (default: none)"
    )
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="rows file; finished measurements are skipped, timed-out ones are retried",
    )
    parser.add_argument("--count-only", action="store_true", help="count parameters and operations, without measuring")
    parser.add_argument("--no-training", action="store_true", help="skip the measurements of training")
    parser.add_argument(
        "--batch-size", type=int, default=1, help="batch size for memory and throughput (default: %(default)s)"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="duration of each timing in seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--timeout", type=float, default=1800.0, help="time limit per measurement in seconds (default: %(default)s)"
    )
    parser.add_argument(
        "--attention",
        choices=["fused", "plain"],
        default="fused",
        help="attention kernel; plain keeps the whole attention matrix in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="arithmetic (default: %(default)s)",
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from ssmclip.analyze.cost.efficiency import in_fresh_process, sweep
    from ssmclip.rows import describe_run

    if args.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1 (got {args.batch_size})")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {name: getattr(args, name) for name in ("batch_size", "seconds", "attention", "precision")}
    modes = [] if args.count_only else ["inference"] if args.no_training else ["inference", "training"]
    rows = sweep(
        labelled(args.model),
        [parse_image_size(text) for text in args.sizes.split(",") if text],
        [_number(text) for text in args.lengths.split(",") if text],
        args.out,
        settings={**settings, "device": args.device},
        modes=modes,
        run=describe_run(0, args.device, **settings),
        measure=partial(in_fresh_process, timeout=args.timeout),
    )
    for row in rows:
        note = f"  {row.extra['why']}" if row.metric == "fits" else ""
        sys.stdout.write(f"{row.model:32} {row.condition:24} {row.metric:24} {row.value:,.6g}{note}\n")
    sys.stdout.write(f"{len(rows)} rows in {args.out}\n")
    return 0


def _number(text: str) -> int:
    try:
        return int(text)
    except ValueError as error:
        raise ValueError(f"--lengths takes whole numbers of tokens (got {text!r})") from error
