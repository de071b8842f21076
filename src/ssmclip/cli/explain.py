"""ssmclip explain: a picture and a text -> maps of what the model looks at."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssmclip.cli.classify import PICTURES
from ssmclip.cli.options import MODELS, add_device, image_size, labelled, listed, pictures_of

HELP = "maps of what a model looks at in pictures, and numbers to judge them by, as rows and figures"
METHODS = "similarity, gradcam, receptive-field, scan, text-scan"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=PICTURES)
    parser.add_argument(
        "--text",
        help='text to look for, such as "a dog"; for an image classifier, a class\'s name or number (default: its most '
        "probable class)",
    )
    parser.add_argument(
        "--against",
        default="",
        help="other texts, separated by commas, or a file with one a line, among which a CLIP chooses in the deletion "
        "and insertion curves (default: none; then the curves are of the cosine similarity)",
    )
    parser.add_argument("--model", required=True, help=MODELS)
    parser.add_argument(
        "--method", default="similarity", help=f"methods, separated by commas: {METHODS} (default: %(default)s)"
    )
    parser.add_argument("--layer", help="name of the layer to look at, for gradcam and scan (default: the last)")
    parser.add_argument(
        "--position",
        type=position,
        default="0.5,0.5",
        help="position whose scan is shown, X,Y as shares of width and height (default: %(default)s)",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=50,
        help="steps of the deletion and insertion curves; 0: none (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, help="folder for rows.jsonl, which is replaced, and a figure (PNG) of each explanation"
    )
    parser.add_argument(
        "--image-size", type=image_size, help="image size, in pixels or as HEIGHTxWIDTH (default: the model's own)"
    )
    add_device(parser)
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="random seed for the weights before training, with receptive-field (default: %(default)s)",
    )


def position(text: str) -> tuple[float, float]:
    """Parse a position for argparse. Raises ArgumentTypeError."""
    try:
        x, y = (float(share) for share in text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"position must be X,Y, such as 0.5,0.5 (got {text!r})") from error
    return x, y


def run(args: argparse.Namespace) -> int:
    """Exit status 1: a picture could not be read."""
    from ssmclip.analyze.saliency.explanation import METHODS, explain
    from ssmclip.models import find
    from ssmclip.ops.memory import keep_freed_memory

    keep_freed_memory()
    methods = listed(args.method)
    for name in methods:
        METHODS[name]  # raises for an unknown one, before a model is loaded
    pictures, unreadable = _opened(args.pictures)
    found = []
    for label, name in labelled(args.model).items() if pictures else ():
        model = find(name, label=label, device=args.device, image_size=args.image_size)
        for method in methods:
            untrained = _untrained(args, name, model.origin) if method == "receptive-field" else None
            explanations = explain(
                model,
                pictures,
                args.text,
                [method],
                against=listed(args.against),
                layer=args.layer,
                position=args.position,
                untrained=untrained,
                steps=args.steps,
            )
            sys.stdout.write("".join(f"{line}\n" for one in explanations for line in _lines(one)))
            found += explanations
    if args.out is not None and found:
        _write(found, args.out)
    for path, why in unreadable.items():
        sys.stderr.write(f"{path}: {why}\n")
    if unreadable:
        sys.stderr.write(f"{len(unreadable)} of {len(unreadable) + len(pictures)} pictures could not be read\n")
    return 1 if unreadable else 0


def _opened(sources: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    from ssmclip.data.images import BadImage
    from ssmclip.data.sources import read_picture

    pictures, unreadable = {}, {}
    for name, source in pictures_of(sources).items():
        try:
            pictures[name] = read_picture(source)
        except BadImage as error:
            unreadable[name] = str(error)
    return pictures, unreadable


def _untrained(args: argparse.Namespace, name: str, origin: str) -> Any:
    """The same network with fresh weights; None for a model that has no others."""
    import torch

    from ssmclip.models.names import RANDOM, build_model

    if origin == RANDOM:
        return None
    torch.manual_seed(args.seed)
    return build_model(name, args.image_size).to(args.device)


def _lines(found: Any) -> list[str]:
    """An explanation in words: what it is of, its numbers, and where its maps are largest."""
    head = ", ".join(filter(None, (found.model, found.method, found.picture, found.query, found.layer)))
    numbers = [f"  {number.value:10.4f}  {number.metric} {number.case}".rstrip() for number in found.numbers]
    return [head, *numbers, *(f"  {_largest(values)}  {title}" for title, values in found.maps.items())]


def _largest(values: Any) -> str:
    height, width = values.shape
    row, column = divmod(int(values.argmax()), width)
    return f"largest at {(column + 0.5) / width:.2f},{(row + 0.5) / height:.2f}"


def _write(found: Sequence[Any], out: Path) -> None:
    from ssmclip.report import drawings, read_store
    from ssmclip.report.figures.saliency import Saliency
    from ssmclip.report.style import drawing
    from ssmclip.rows import describe_run, write_rows

    out.mkdir(parents=True, exist_ok=True)
    rows = out / "rows.jsonl"
    write_rows(rows, [row for one in found for row in one.rows()], describe_run(seed=None))
    figures = [drawn for drawn in drawings(read_store([rows])) if isinstance(drawn, Saliency)]
    for number, drawn in enumerate(figures, start=1):
        shown = drawn.rows[0].extra["saliency"]
        words = [drawn.rows[0].model, Path(shown["name"]).stem, shown["query"], shown["method"]]
        name = re.sub(r"[^\w.-]+", "-", "-".join(filter(None, words)))[:100].strip("-.")
        with drawing():
            drawn.plot().savefig(out / f"{number:02d}-{name}.png", dpi=150, facecolor="white", bbox_inches="tight")
    sys.stdout.write(f"{len(figures)} figures and {rows.name} in {out}\n")
