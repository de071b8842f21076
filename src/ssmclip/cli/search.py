"""ssmclip embed: a folder of pictures -> an index. ssmclip search: a text -> the pictures of an index nearest to it."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from ssmclip.cli.options import add_device, image_size

EMBED_HELP = "the unit vectors of all pictures in a folder, as a Parquet file that search reads"
SEARCH_HELP = "the pictures of an index that are nearest to a text"
NAMED = 20  # pictures that could not be read, printed by name


def add_embed_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="pictures, at any depth")
    parser.add_argument("--model", required=True, help="a run or checkpoint folder, open_clip:NAME/PRETRAINED, a name")
    parser.add_argument("--out", required=True, type=Path, help="the index to write (Parquet)")
    parser.add_argument("--image-size", type=image_size, help="pixels or HEIGHTxWIDTH; default: the model's own")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures at a time (default: %(default)s)")
    add_device(parser)


def run_embed(args: argparse.Namespace) -> int:
    from ssmclip.cli.options import require_writable
    from ssmclip.evaluate.search.embedder import Embedder
    from ssmclip.evaluate.search.index import build_index

    require_writable(args.out)
    embedder = Embedder(args.model, device=args.device, batch_size=args.batch_size, image_size=args.image_size)
    start = time.perf_counter()
    index = build_index(args.folder, embedder, args.out)
    seconds = time.perf_counter() - start
    say = sys.stdout.write
    unreadable = index.about["unreadable"]
    if unreadable:
        say(f"{len(unreadable)} pictures could not be read:\n")
        say("".join(f"  {path}: {why}\n" for path, why in list(unreadable.items())[:NAMED]))
        say(f"  ... and {len(unreadable) - NAMED} more, named in the file\n" if len(unreadable) > NAMED else "")
    say(f"{len(index.paths)} pictures in {args.out}, {len(index.paths) / seconds:.1f} a second\n")
    return 0


def add_search_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("text", help='what is looked for, such as "a dog on a beach"')
    parser.add_argument("index", type=Path, help="what ssmclip embed wrote")
    parser.add_argument("-k", type=int, default=10, help="results (default: %(default)s)")
    parser.add_argument("--model", help="where the model is now, if not where it was when the index was made")
    add_device(parser)


def run_search(args: argparse.Namespace) -> int:
    from ssmclip.evaluate.search.embedder import Embedder
    from ssmclip.evaluate.search.index import nearest, read_index

    if not args.text.strip():
        raise ValueError("nothing to look for: the text is empty")
    index = read_index(args.index)
    name = args.model or index.about["model"]
    size = index.about["image_size"]
    embedder = Embedder(name, device=args.device, image_size=tuple(size) if isinstance(size, list) else size)
    if embedder.clip.hashes["model"] != index.about["weights"]:
        raise ValueError(
            f"{embedder.clip.name} does not have the weights that {args.index} was made with: its vectors cannot be "
            "compared. A name without pretrained weights has new ones each time it is loaded; give a folder"
        )
    scores, places = nearest(index.vectors, embedder.encode_texts([args.text]).numpy(), args.k)
    folder = Path(index.about["folder"])
    for score, place in zip(scores[0], places[0], strict=True):
        sys.stdout.write(f"{score:7.4f}  {folder / index.paths[place]}\n")
    return 0
