"""ssmclip embed: a folder of images -> an index."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ssmclip.cli.options import MODEL, add_device, add_precision, image_size, require_writable

HELP = "index of all images in a folder (unit vectors, Parquet) for `ssmclip search`"
NAMED = 20  # unreadable images whose names are printed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="folder of images, searched recursively")
    parser.add_argument("--model", required=True, help=MODEL)
    parser.add_argument("--out", required=True, type=Path, help="index to write (Parquet)")
    parser.add_argument(
        "--image-size", type=image_size, help="image size, in pixels or as HEIGHTxWIDTH (default: the model's own)"
    )
    parser.add_argument("--batch-size", type=int, default=64, help="number of images in a batch (default: %(default)s)")
    add_device(parser)
    add_precision(parser)


def run(args: argparse.Namespace) -> int:
    from ssmclip.evaluate.search.embedder import Embedder
    from ssmclip.evaluate.search.index import build_index

    require_writable(args.out)
    how = {"dtype": args.precision, "batch_size": args.batch_size, "image_size": args.image_size}
    embedder = Embedder(args.model, device=args.device, **how)
    start = time.perf_counter()
    index = build_index(args.folder, embedder, args.out)
    seconds = time.perf_counter() - start
    say = sys.stdout.write
    unreadable = index.about["unreadable"]
    if unreadable:
        say(f"{len(unreadable)} images could not be read:\n")
        say("".join(f"  {path}: {why}\n" for path, why in list(unreadable.items())[:NAMED]))
        say(f"  ... and {len(unreadable) - NAMED} more, listed in the index\n" if len(unreadable) > NAMED else "")
    say(f"{len(index.paths)} images in {args.out}, {len(index.paths) / seconds:.1f} images per second\n")
    return 0
