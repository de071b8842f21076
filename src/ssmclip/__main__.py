"""The command line: `ssmclip COMMAND`, or `python -m ssmclip COMMAND`. Each stage describes its own command."""

from __future__ import annotations

import argparse
import logging
import sys
from functools import partial

from ssmclip.cli import analyze, captions, compare, distort, evaluate, models, ood, quickstart, report, train
from ssmclip.cli import datasets as listing
from ssmclip.cli import search as index


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. What the user can put right is told in one line, no traceback."""
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("ssmclip").setLevel(logging.INFO)
    name = " ".join(filter(None, ["ssmclip", args.command, getattr(args, "subcommand", None)]))
    try:
        return args.run(args) or 0
    except (ValueError, KeyError, OSError) as error:
        if args.verbose:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssmclip", description=__import__("ssmclip").__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="log more, and show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    _add(commands, "quickstart", quickstart.HELP, quickstart.run, quickstart.add_arguments)
    _add(commands, "train", train.HELP, partial(train.run, validation=quickstart.build_validation), train.add_arguments)
    _add(commands, "evaluate", evaluate.HELP, evaluate.run, evaluate.add_arguments)
    _add(commands, "ood", ood.HELP, ood.run, ood.add_arguments)
    _add(commands, "distort", distort.HELP, distort.run, distort.add_arguments)
    _add(commands, "analyze", analyze.HELP, analyze.run, analyze.add_arguments)
    _add(commands, "embed", index.EMBED_HELP, index.run_embed, index.add_embed_arguments)
    _add(commands, "search", index.SEARCH_HELP, index.run_search, index.add_search_arguments)
    _add(commands, "datasets", listing.DATASETS, listing.datasets, listing.add_data)
    _add(commands, "captions", captions.CAPTIONS, captions.captions, captions.add_captions)
    _add(commands, "compare", compare.COMPARE, compare.compare, compare.add_rows)
    _add(commands, "report", report.HELP, report.run, report.add_arguments)
    _add(commands, "models", models.MODELS_HELP, _models)
    _add(commands, "convert", models.CONVERT_HELP, models.run_convert, models.add_convert_arguments)
    _add(commands, "export", models.EXPORT_HELP, models.run_export, models.add_export_arguments)
    _add(commands, "push", models.PUSH_HELP, models.run_push, models.add_push_arguments)
    _add(commands, "ops", "the kernels there are, and why one is missing here", _ops)
    return parser


def _add(commands, name: str, help: str, run, add_arguments=lambda parser: None) -> None:
    parser = commands.add_parser(
        name, help=help, description=help, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.set_defaults(run=run)


def _models(args: argparse.Namespace) -> None:
    from ssmclip.analyze.cost.macs import count_macs

    models.run_models(args, count_macs)


def _ops(args: argparse.Namespace) -> None:
    from ssmclip import ops

    for op, backend, exists, why_not in ops.available():
        print(f"{op:24} {backend:10} {'yes' if exists else 'no: ' + why_not}")


if __name__ == "__main__":
    sys.exit(main())
