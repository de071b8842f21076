"""ssmclip convert: published weights -> a folder that other libraries read."""

from __future__ import annotations

import argparse
import logging

from ssmclip.cli.options import image_size

HELP = "published weights -> a folder of safetensors and configuration, read by open_clip, timm or transformers"

# The fields of `Hints`, of the readers of published weights.
HINTS = {
    "--text-heads": dict(type=int, help="attention heads of CLIP's text transformer"),
    "--quick-gelu": dict(
        action=argparse.BooleanOptionalAction, help="activation of CLIP's transformers: QuickGELU rather than GELU"
    ),
    "--image-size": dict(type=image_size, help="image size of a CLIP: pixels or HEIGHTxWIDTH"),
    "--n-groups": dict(type=int, help="groups of heads that share B and C in a Mamba-2"),
    "--layer-norm-epsilon": dict(type=float, help="epsilon of a Mamba language model's norms"),
    "--act-layer": dict(help="activation of a MambaOut: gelu or silu"),
    "--conv-act": dict(
        action=argparse.BooleanOptionalAction, help="GELU after the convolutions of a VMamba's stem and halvings"
    ),
}

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="checkpoint file, its folder, or hf-hub:OWNER/NAME[/FILE]")
    parser.add_argument("folder", metavar="DST", help="folder to write")
    parser.add_argument(
        "--weights",
        default="online",
        help="online, ema, or ema_online_bn: the average with online batch statistics (default: %(default)s)",
    )
    hints = parser.add_argument_group(
        "what the shapes of weights cannot tell",
        "Each defaults to what a configuration in the same folder says, else to what the package's own model of these "
        "shapes has, else to a guess, which is reported.",
    )
    for flag, how in HINTS.items():
        hints.add_argument(flag, default=None, **how)


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import convert

    hints = {name: getattr(args, name) for name in (flag.removeprefix("--").replace("-", "_") for flag in HINTS)}
    kind = convert(args.source, args.folder, weights=args.weights, **hints)
    log.info("wrote the %s to %s", {"clip": "CLIP"}.get(kind, kind.replace("_", " ")), args.folder)
