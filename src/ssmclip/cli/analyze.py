"""ssmclip analyze: the cost of models and the loss around their weights."""

from __future__ import annotations

import argparse

from ssmclip.cli import efficiency, landscape

HELP = "cost of a model (operations, memory, time) and curvature of its loss, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="subcommand", required=True, metavar="ANALYSIS")
    costs = kinds.add_parser("efficiency", help=efficiency.HELP, description=efficiency.HELP)
    efficiency.add_arguments(costs)
    costs.set_defaults(analyse=efficiency.run)
    landscape.add_analyses(kinds)


def run(args: argparse.Namespace) -> int:
    return args.analyse(args)
