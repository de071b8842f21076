"""ssmclip analyze: the analyses there are."""

from __future__ import annotations

import argparse

from ssmclip.cli import efficiency as efficiency_command
from ssmclip.cli import landscape as landscape_command

HELP = "what a model costs, and what its loss looks like around it, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="subcommand", required=True, metavar="ANALYSIS")
    efficiency_command.add_analyses(kinds)
    landscape_command.add_analyses(kinds)


def run(args: argparse.Namespace) -> int:
    return args.analyse(args)
