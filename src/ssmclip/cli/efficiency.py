"""ssmclip analyze efficiency: what models cost."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.options import MODELS, add_device, labelled, parse_image_size

HELP = "what models cost: operations, memory and time at each image size and text length"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        "--models",
        required=True,
        help=MODELS,
    )
    parser.add_argument(
        "--sizes", default="224,448,672,896,1024", help="pixels, or HEIGHTxWIDTH (default: %(default)s)"
    )
    parser.add_argument("--lengths", default="", help="tokens, such as 77,256,1024, for CLIPs (default: none)")
    parser.add_argument(
        "--out",
        required=True,
        type=Path,
        help="the rows file; what it has already is not repeated, what did not end in time is",
    )
    parser.add_argument("--count-only", action="store_true", help="parameters and operations, nothing measured")
    parser.add_argument("--no-training", action="store_true", help="inference only")
    parser.add_argument("--batch-size", type=int, default=1, help="of memory and throughput (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each timing (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=1800.0, help="seconds a size may take (default: %(default)s)")
    parser.add_argument(
        "--attention",
        choices=["fused", "plain"],
        default="fused",
        help="plain: all pairs in memory (default: %(default)s)",
    )
    parser.add_argument(
        "--precision", choices=["float32", "bfloat16", "float16"], default="float32", help="default: %(default)s"
    )
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from functools import partial

    from ssmclip.analyze.cost.efficiency import in_fresh_process, sweep
    from ssmclip.rows import describe_run

    if args.batch_size < 1:
        raise ValueError(f"--batch-size {args.batch_size}: at least 1")
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
        raise ValueError(f"{text!r} is no whole number") from error
