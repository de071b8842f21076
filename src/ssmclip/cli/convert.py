"""ssmclip convert: published weights -> a folder that other libraries read."""

from __future__ import annotations

import argparse
import logging

HELP = "published weights -> a folder of safetensors and configuration, read by open_clip, timm or transformers"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, its folder, or hf-hub:OWNER/NAME[/FILE]")
    parser.add_argument("folder", metavar="DST", help="folder to write")
    parser.add_argument(
        "--weights",
        default="online",
        help="online, ema, or ema_online_bn: the average with online batch statistics (default: %(default)s)",
    )
    parser.add_argument("--text-heads", type=int, help="of CLIP's text transformer, where not 64 channels each")
    parser.add_argument("--n-groups", type=int, help="of Mamba-2 (default: what its configuration says, else 1)")


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import convert

    kind = convert(args.source, args.folder, weights=args.weights, text_heads=args.text_heads, n_groups=args.n_groups)
    log.info("wrote the %s to %s", {"clip": "CLIP"}.get(kind, kind.replace("_", " ")), args.folder)
