"""The command line: `ssmclip COMMAND`, or `python -m ssmclip COMMAND`. Each stage describes its own command."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial

from ssmclip import quickstart
from ssmclip.evaluate import command as evaluate
from ssmclip.evaluate import listing
from ssmclip.report import command as report
from ssmclip.train import command as train


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. What the user can put right is told in one line, no traceback."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("ssmclip").setLevel(logging.INFO)
    try:
        return args.run(args) or 0
    except (ValueError, KeyError, OSError) as error:
        if args.verbose:
            raise
        print(f"ssmclip {args.command}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"ssmclip {args.command}: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssmclip", description=__import__("ssmclip").__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="log more, and show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "quickstart", quickstart.HELP, quickstart.run, quickstart.add_arguments)
    _add(commands, "train", train.HELP, partial(train.run, validation=quickstart.build_validation), train.add_arguments)
    _add(commands, "evaluate", evaluate.HELP, evaluate.run, evaluate.add_arguments)
    _add(commands, "datasets", listing.DATASETS, listing.datasets, listing.add_data)
    _add(commands, "captions", listing.CAPTIONS, listing.captions, listing.add_captions)
    _add(commands, "compare", listing.COMPARE, listing.compare, listing.add_rows)
    _add(commands, "report", report.HELP, report.run, report.add_arguments)
    _add(commands, "models", "the CLIP models there are, with their parameters", _models)
    _add(commands, "ops", "the kernels there are, and why one is missing here", _ops)
    return parser


def _add(commands, name: str, help: str, run, add_arguments=lambda parser: None) -> None:
    parser = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def _models(args: argparse.Namespace) -> None:
    import torch

    from ssmclip.models import clip_config, create_clip, list_clips

    print(f"{'name':26} {'image tower':24} {'image M':>8} {'text M':>8}")
    for name in list_clips():
        config = clip_config(name)
        with torch.device("meta"):
            model = create_clip(config)
        total = sum(p.numel() for p in model.parameters())
        image = sum(p.numel() for p in model.visual.parameters())
        trunk = config["model_cfg"]["vision_cfg"]["timm_model_name"]
        print(f"{name:26} {trunk:24} {image / 1e6:8.2f} {(total - image) / 1e6:8.2f}")


def _ops(args: argparse.Namespace) -> None:
    from ssmclip import ops

    for op, backend, exists, why_not in ops.available():
        print(f"{op:24} {backend:10} {'yes' if exists else 'no: ' + why_not}")


if __name__ == "__main__":
    sys.exit(main())
