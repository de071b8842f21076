"""ssmclip export: an image encoder -> an ONNX file."""

from __future__ import annotations

import argparse
import logging

from ssmclip.cli.options import MODEL, image_size

HELP = "an image encoder -> an ONNX file, checked against PyTorch; onnxruntime runs it on any CPU"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL)
    parser.add_argument("file", metavar="FILE", help="ONNX file to write: input image, output features")
    parser.add_argument(
        "--image-size", type=image_size, default=224, help="pixels or HEIGHTxWIDTH (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import find
    from ssmclip.models.export import export_onnx

    size = args.image_size
    difference = export_onnx(find(args.model, image_size=size, text=False).network, args.file, size)
    log.info("wrote %s; largest difference from PyTorch %.1e of the largest feature", args.file, difference)
