"""ssmclip export: an image encoder -> an ONNX file."""

from __future__ import annotations

import argparse
import logging

from ssmclip.cli.options import MODEL, image_size

HELP = "export of an image encoder to ONNX, checked against PyTorch"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("file", metavar="FILE", help="ONNX file to write, with input `image` and output `features`")
    parser.add_argument(
        "--image-size",
        type=image_size,
        default=224,
        help="image size, in pixels or as HEIGHTxWIDTH (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import find
    from ssmclip.models.export import export_onnx

    size = args.image_size
    difference = export_onnx(find(args.model, image_size=size, text=False).network, args.file, size)
    log.info("wrote %s; the largest difference from PyTorch is %.1e of the largest feature", args.file, difference)
