"""ssmclip classify: pictures -> labels with probabilities."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from ssmclip.cli.options import MODELS, add_device, add_precision, image_size, labelled, listed, pictures_of

HELP = "labels of pictures with probabilities, by a CLIP or an image classifier"
PICTURES = "picture files, folders (searched recursively), http or https addresses, or - for one from standard input"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("pictures", nargs="+", metavar="PICTURE", help=PICTURES)
    parser.add_argument("--model", required=True, help=MODELS)
    parser.add_argument(
        "--labels",
        help='labels to choose from, separated by commas, such as "a dog,a cat", or a file with one a line '
        "(default: the classes of an image classifier)",
    )
    parser.add_argument(
        "--templates",
        default="{}",
        help='texts with {} for the label, such as "a photo of {}.", separated by commas, or a file with one a line; '
        "their embeddings are averaged (default: %(default)s, the label itself)",
    )
    parser.add_argument(
        "--top-k", type=int, default=5, help="number of labels to print for a picture (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON lines, one for each model and picture")
    parser.add_argument(
        "--image-size", type=image_size, help="image size, in pixels or as HEIGHTxWIDTH (default: the model's own)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="number of images in a batch (default: %(default)s)")
    add_device(parser)
    add_precision(parser)


def run(args: argparse.Namespace) -> int:
    """Exit status 1: a picture could not be read."""
    from ssmclip.evaluate.prediction import classify
    from ssmclip.models import find

    labels = None if args.labels is None else listed(args.labels)
    templates, pictures, models = listed(args.templates), pictures_of(args.pictures), labelled(args.model)
    unreadable: set[str] = set()
    for label, name in models.items():
        how = {"device": args.device, "image_size": args.image_size, "precision": args.precision}
        model = find(name, label=label, **how)
        predictions = classify(model, pictures, labels, templates, args.top_k, batch_size=args.batch_size)
        if len(models) > 1 and not args.json:
            sys.stdout.write(f"{label}\n")
        unreadable |= _print(predictions, len(pictures), args.json)
    if unreadable:
        sys.stderr.write(f"{len(unreadable)} of {len(pictures)} pictures could not be read\n")
    return 1 if unreadable else 0


def _print(predictions: Iterable[Any], count: int, as_json: bool) -> set[str]:
    """Print predictions as they come, and return the names of the pictures that could not be read."""
    from tqdm import tqdm

    unreadable = set()
    for prediction in tqdm(predictions, total=count, unit="picture", leave=False, disable=None if count > 1 else True):
        if prediction.unreadable:
            unreadable.add(prediction.picture)
        shown = _json_line(prediction) if as_json else _lines(prediction)
        tqdm.write(shown, file=sys.stdout)
    return unreadable


def _json_line(prediction: Any) -> str:
    record = asdict(prediction)
    return json.dumps({key: value for key, value in record.items() if value or key == "guesses"}, ensure_ascii=False)


def _lines(prediction: Any) -> str:
    if prediction.unreadable:
        return f"{prediction.picture}\n  could not be read: {prediction.unreadable}"
    return "\n".join(
        [prediction.picture, *(f"{guess.probability:7.1%}  {guess.label}" for guess in prediction.guesses)]
    )
