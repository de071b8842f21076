"""ssmclip blend: two models of one architecture -> models between them."""

from __future__ import annotations

import argparse

from ssmclip.cli.options import MODEL

HELP = "interpolation of two models' weights, such as those of a CLIP before and after fine-tuning (WiSE-FT)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("first", metavar="A", help=f"model at weight 0: {MODEL}")
    parser.add_argument("second", metavar="B", help="model at weight 1, of the same architecture")
    parser.add_argument(
        "--weight",
        type=shares,
        default=(0.5,),
        metavar="W",
        help="share of B, from 0 to 1; several, separated by commas, for a curve (default: 0.5)",
    )
    parser.add_argument(
        "--out", required=True, metavar="FOLDER", help="folder to write; one for each of several weights lies in it"
    )


def shares(text: str) -> tuple[float, ...]:
    """Parse numbers separated by commas for argparse. Raises ArgumentTypeError."""
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"W must be numbers separated by commas (got {text!r})") from error


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import blend

    for folder in blend(args.first, args.second, args.weight, args.out):
        print(folder)
