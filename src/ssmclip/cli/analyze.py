"""ssmclip analyze: the analyses there are."""

from __future__ import annotations

import argparse

from ssmclip.cli import efficiency, landscape

HELP = "what a model costs, and what its loss looks like around it, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="subcommand", required=True, metavar="ANALYSIS")
    costs = kinds.add_parser("efficiency", help=efficiency.HELP, description=efficiency.HELP)
    efficiency.add_arguments(costs)
    costs.set_defaults(analyse=efficiency.run)
    landscape.add_analyses(kinds)


def run(args: argparse.Namespace) -> int:
    return args.analyse(args)
