"""The command line: `ssmclip COMMAND`, or `python -m ssmclip COMMAND`.

A command is a module of `cli` of its name: HELP, one line; add_arguments(parser); run(args) -> exit status, None for 0.
What is slow to import, run imports: building the parser needs no torch.
"""

from __future__ import annotations

import argparse
import io
import logging
import sys

import ssmclip
from ssmclip.cli import (
    analyze,
    blend,
    captions,
    classify,
    compare,
    convert,
    datasets,
    demo,
    distort,
    embed,
    evaluate,
    explain,
    export,
    models,
    ood,
    ops,
    push,
    quickstart,
    report,
    search,
    train,
)

# In the order of the help text.
COMMANDS = {
    "quickstart": quickstart,
    "train": train,
    "evaluate": evaluate,
    "ood": ood,
    "distort": distort,
    "analyze": analyze,
    "demo": demo,
    "classify": classify,
    "explain": explain,
    "embed": embed,
    "search": search,
    "datasets": datasets,
    "captions": captions,
    "compare": compare,
    "report": report,
    "models": models,
    "blend": blend,
    "convert": convert,
    "export": export,
    "push": push,
    "ops": ops,
}


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status. A mistake the user can correct is one line, without a traceback."""
    _write_any_text()
    args = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO if args.verbose else logging.WARNING, format="%(message)s")
    logging.getLogger("ssmclip").setLevel(logging.INFO)
    name = " ".join(filter(None, ["ssmclip", args.command, getattr(args, "subcommand", None)]))
    try:
        return COMMANDS[args.command].run(args) or 0
    except (ValueError, KeyError, OSError, ImportError) as error:
        if args.verbose:
            raise
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{name}: stopped", file=sys.stderr)
        return 130


def _write_any_text() -> None:
    """Have names that a stream's encoding lacks written with escapes, where they would stop the command halfway."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="ssmclip", description=ssmclip.__doc__.splitlines()[0])
    parser.add_argument("--verbose", action="store_true", help="log more, and show the traceback of an error")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        as_written = argparse.RawDescriptionHelpFormatter
        command.add_arguments(
            commands.add_parser(name, help=command.HELP, description=command.HELP, formatter_class=as_written)
        )
    return parser


if __name__ == "__main__":
    sys.exit(main())
