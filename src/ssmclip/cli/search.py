"""ssmclip search: a text -> the pictures of an index nearest to it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.options import MODEL, add_device

HELP = "the pictures of an index that are nearest to a text"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help='what is looked for, such as "a dog on a beach"')
    parser.add_argument("index", type=Path, help="what ssmclip embed wrote")
    parser.add_argument("-k", type=int, default=10, help="results (default: %(default)s)")
    parser.add_argument("--model", help=f"model to use in place of the one that the index names: {MODEL}")
    add_device(parser)


def run(args: argparse.Namespace) -> int:
    from ssmclip.evaluate.search.embedder import Embedder
    from ssmclip.evaluate.search.index import made_by, nearest, read_index

    if not args.text.strip():
        raise ValueError("nothing to look for: the text is empty")
    index = read_index(args.index)
    name = args.model or index.about["model"]
    size = index.about["image_size"]
    embedder = Embedder(name, device=args.device, image_size=tuple(size) if isinstance(size, list) else size)
    if not made_by(index, embedder):
        raise ValueError(
            f"{embedder.clip.label} does not have the weights, settings or preprocessing that {args.index} was made "
            "with: its vectors cannot be compared. A name without pretrained weights has new ones each time it is "
            "loaded; pass a folder"
        )
    scores, places = nearest(index.vectors, embedder.encode_texts([args.text]).numpy(), args.k)
    folder = Path(index.about["folder"])
    for score, place in zip(scores[0], places[0], strict=True):
        sys.stdout.write(f"{score:7.4f}  {folder / index.paths[place]}\n")
    return 0
