"""ssmclip push: a model folder -> the Hugging Face hub."""

from __future__ import annotations

import argparse
import logging

HELP = "upload of a model folder to the Hugging Face hub"

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "folder", metavar="DST", help="folder written by convert, or a checkpoint folder of a training run"
    )
    parser.add_argument("repo", metavar="REPO", help="repository OWNER/NAME, created if it does not exist")
    parser.add_argument("--private", action="store_true", help="create the repository as private")


def run(args: argparse.Namespace) -> None:
    from ssmclip.models import push

    log.info("%s", push(args.folder, args.repo, private=args.private))
