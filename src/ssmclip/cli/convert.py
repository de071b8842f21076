"""ssmclip convert: published weights -> a folder that other libraries read."""

from __future__ import annotations

import argparse
import logging

from ssmclip.cli.options import image_size

HELP = "conversion of published weights to a folder that open_clip, timm or transformers can load"

# The fields of `Hints`, of the readers of published weights.
HINTS = {
    "--text-heads": dict(type=int, help="number of attention heads in CLIP's text transformer"),
    "--quick-gelu": dict(
        action=argparse.BooleanOptionalAction, help="activation of CLIP's transformers: QuickGELU instead of GELU"
    ),
    "--image-size": dict(type=image_size, help="image size of a CLIP, in pixels or as HEIGHTxWIDTH"),
    "--n-groups": dict(type=int, help="number of head groups that share B and C in Mamba-2"),
    "--layer-norm-epsilon": dict(type=float, help="epsilon of the norms in a Mamba language model"),
    "--act-layer": dict(help="activation of MambaOut: gelu or silu"),
    "--conv-act": dict(
        action=argparse.BooleanOptionalAction,
        help="GELU after the convolutions of VMamba's stem and downsampling layers",
    ),
}

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, its folder, or hf-hub:OWNER/NAME[/FILE]")
    parser.add_argument("folder", metavar="DST", help="folder to write")
    parser.add_argument(
        "--weights",
        default="online",
        help="weights to convert: online; ema, their moving average; or ema_online_bn, the average with online batch "
        "statistics (default: %(default)s)",
    )
    hints = parser.add_argument_group(
        "settings that weight shapes do not determine",
        "Each is read from a configuration in the same folder, else taken from the built-in model with these shapes, "
        "else guessed; a guess is reported.",
    )
    for flag, how in HINTS.items():
        hints.add_argument(flag, default=None, **how)


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import convert

    hints = {name: getattr(args, name) for name in (flag.removeprefix("--").replace("-", "_") for flag in HINTS)}
    kind = convert(args.source, args.folder, weights=args.weights, **hints)
    log.info("wrote the %s to %s", {"clip": "CLIP"}.get(kind, kind.replace("_", " ")), args.folder)
