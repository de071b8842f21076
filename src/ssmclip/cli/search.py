"""ssmclip search: a text -> the most similar images of an index."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.options import MODEL, add_device

HELP = "images of an index that are most similar to a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help='text to search for, such as "a dog on a beach"')
    parser.add_argument("index", type=Path, help="index written by `ssmclip embed`")
    parser.add_argument("-k", type=int, default=10, help="number of results (default: %(default)s)")
    parser.add_argument("--model", help=f"model to use instead of the one named in the index: {MODEL}")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from ssmclip.evaluate.search.index import embedder_for, made_by, nearest, read_index

    if not args.text.strip():
        raise ValueError("nothing to search for: the text is empty")
    index = read_index(args.index)
    embedder = embedder_for(index, args.model, device=args.device)
    if not made_by(index, embedder):
        raise ValueError(
            f"{embedder.clip.label} does not have the weights, settings or preprocessing of {args.index}: they cannot "
            "be compared. A model without pretrained weights is initialised at random each time: pass a folder"
        )
    scores, places = nearest(index.vectors, embedder.encode_texts([args.text]).numpy(), args.k)
    folder = Path(index.about["folder"])
    for score, place in zip(scores[0], places[0], strict=True):
        sys.stdout.write(f"{score:7.4f}  {folder / index.paths[place]}\n")
    return 0
