"""ssmclip captions: how many words of a caption fit into each text tower's context."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.cli.options import MODELS, labelled, line, require_writable

HELP = "number of caption words that fit into each text tower's context, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODELS)
    parser.add_argument(
        "--texts", required=True, nargs="+", type=Path, help="caption files: .jsonl, or .txt with one caption per line"
    )
    parser.add_argument("--field", help="key of the captions in .jsonl (default: the first known key of each record)")
    parser.add_argument(
        "--tokenizer",
        type=Path,
        help="tokenizer.json of a language model used as the text tower (default: the model's own)",
    )
    parser.add_argument("--out", type=Path, help="rows file to write (default: none)")


def run(args: argparse.Namespace) -> int:
    from ssmclip.evaluate.captions import caption_rows
    from ssmclip.models import load_tokenizer
    from ssmclip.rows import describe_run, write_rows

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
    """Return the task name of a caption file: its stem, or its folder's name for a data.jsonl."""
    return f"captions of {path.parent.name if path.stem == 'data' else path.stem}"


def read_texts(path: Path, field: str | None = None) -> list[str]:
    """Read captions from .jsonl (key `field`, or the first of captioned.DESCRIPTIONS) or from text, one per line.

    Raises ValueError for a record without a caption and for a file without captions.
    """
    from ssmclip.data.lines import read_lines
    from ssmclip.data.testsets.files import read_records
    from ssmclip.data.testsets.layouts.captioned import DESCRIPTIONS

    if path.suffix in (".jsonl", ".jsonlines"):
        wanted = (field,) if field else DESCRIPTIONS
        records = list(read_records(path))
        if bare := next((record for record in records if not any(record.get(key) for key in wanted)), None):
            raise ValueError(f"{path}: a record has none of {', '.join(wanted)}; its keys are {', '.join(bare)}")
        lines = [next(record[key] for key in wanted if record.get(key)) for record in records]
    else:
        lines = [text for text in read_lines(path) if text.strip()]
    if not lines:
        raise ValueError(f"{path} contains no captions")
    return lines
