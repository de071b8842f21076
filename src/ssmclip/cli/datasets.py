"""Smaller commands about data and rows: which data sets are there, what text towers see, how two models compare."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ssmclip.data.testsets.card import Card

DATASETS = "the data sets there are cards for, what was found of each, and how to get what is missing"
CAPTIONS = "how many words of captions each text tower sees, as rows"
COMPARE = "paired tests between the models of rows files that saw the same images"


def add_data(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", default="data", help="the folder the data sets are under (default: %(default)s)")
    parser.add_argument("names", nargs="*", help="data sets; default: all")


def datasets(args: argparse.Namespace) -> int:
    from ssmclip.data.testsets.open import list_cards, load_card

    cards = [load_card(name) for name in args.names or list_cards()]
    sys.stdout.write(f"{'name':16} {'metric':16} {'images':>15} {'expected':>9}  where, or how to get it\n")
    for card in cards:
        sys.stdout.write(described(card, args.data) + "\n")
    sys.stdout.write(
        f"\n{len(cards)} data sets. Those CLIP_benchmark has, `--data hub:clip-benchmark` downloads; every other "
        "copy is found\nunder --data in the files its authors published, as class folders, wds_* shards or parquet.\n"
    )
    return 0


def described(card: Card, root: str) -> str:
    """One data set's line."""
    from ssmclip.data.testsets.open import HUB, open_dataset

    start = f"{card.name:16} {card.metric:16} "
    size = f"{card.test_size:,}" if card.test_size else "?"
    try:
        found = open_dataset(card, root, download=False)
    except FileNotFoundError:
        if root.startswith(HUB):
            return (
                f"{start}{'-':>15} {size:>9}  not downloaded yet; evaluate does, where {root.removeprefix(HUB)} has it"
            )
        return f"{start}{'-':>15} {size:>9}  get it: {card.source}"
    except (OSError, ValueError) as error:
        return f"{start}{'can not be read':>15} {size:>9}  {(str(error) or type(error).__name__).splitlines()[0]}"
    short = {True: ", partial", False: ", another split" if found.n > found.expected else ""}[found.partial]
    said = f" ({found.said})" if found.said else ""
    return f"{start}{found.n:>15,} {size:>9}  {found.where}{short}{said}"


def add_captions(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help="as for evaluate; several with commas")
    parser.add_argument("--texts", required=True, nargs="+", type=Path, help=".jsonl of captions, or .txt, one a line")
    parser.add_argument(
        "--field", help="the key of the captions in .jsonl; default: the first known one of each record"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json of a language model that is the text tower; default: the model's"
    )
    parser.add_argument("--out", type=Path, help="the rows file to write")


def captions(args: argparse.Namespace) -> int:
    from ssmclip.cli.evaluate import line, require_writable
    from ssmclip.cli.options import labelled
    from ssmclip.evaluate.captions import caption_rows
    from ssmclip.models import load_tokenizer
    from ssmclip.rows.result import describe_run, write_rows

    if args.out:
        require_writable(args.out, args.texts)
    texts = {path: read_texts(path, args.field) for path in args.texts}
    rows = []
    for label, name in labelled(args.model).items():
        tokenizer = load_tokenizer(name, args.tokenizer)
        rows += [row for path, found in texts.items() for row in caption_rows(label, task_of(path), tokenizer, found)]
    if args.out:
        write_rows(args.out, rows, describe_run())
    sys.stdout.write("".join(line(row) + "\n" for row in rows))
    return 0


def task_of(path: Path) -> str:
    """A file of captions as a task: its name, or its folder's where all are called data.jsonl."""
    return f"captions of {path.parent.name if path.stem == 'data' else path.stem}"


def read_texts(path: Path, field: str | None = None) -> list[str]:
    """Captions of a .jsonl (the key `field`, or the first of captioned.DESCRIPTIONS) or a text file, one a line.

    Raises ValueError for a record without one and for no captions.
    """
    from ssmclip.data.testsets.layouts.captioned import DESCRIPTIONS

    lines = [text for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]
    if path.suffix in (".jsonl", ".jsonlines"):
        wanted = (field,) if field else DESCRIPTIONS
        records = [json.loads(text) for text in lines]
        if bare := next((record for record in records if not any(record.get(key) for key in wanted)), None):
            raise ValueError(f"{path}: a record has none of {', '.join(wanted)}; its keys are {', '.join(bare)}")
        lines = [next(record[key] for key in wanted if record.get(key)) for record in records]
    if not lines:
        raise ValueError(f"{path} has no captions")
    return lines


def add_rows(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("rows", nargs="+", type=Path, help="rows files of evaluate")
    parser.add_argument("--out", type=Path, help="the rows file to write")


def compare(args: argparse.Namespace) -> int:
    from ssmclip.cli.evaluate import line, require_writable
    from ssmclip.evaluate.statistics.paired import paired_rows
    from ssmclip.rows.result import describe_run, read_rows, write_rows

    if args.out:
        require_writable(args.out, args.rows)
    rows = paired_rows([row for path in args.rows for row in read_rows(path)[1]])
    if not rows:
        raise ValueError("no two models in these files have the same measure of the same images")
    if args.out:
        write_rows(args.out, rows, describe_run(0))
    sys.stdout.write("".join(f"{line(row)}  p={row.extra['mcnemar_p']:.3g}, {row.condition}\n" for row in rows))
    return 0
