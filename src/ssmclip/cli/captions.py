"""ssmclip captions: how many words of captions each text tower sees."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from ssmclip.cli.options import MODELS, labelled, line, require_writable

HELP = "how many words of captions each text tower sees, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, help=MODELS)
    parser.add_argument("--texts", required=True, nargs="+", type=Path, help=".jsonl of captions, or .txt, one a line")
    parser.add_argument(
        "--field", help="the key of the captions in .jsonl; default: the first known one of each record"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="tokenizer.json of a language model that is the text tower; default: the model's"
    )
    parser.add_argument("--out", type=Path, help="the rows file to write")


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
    """A file of captions as a task: its name, or its folder's where all are called data.jsonl."""
    return f"captions of {path.parent.name if path.stem == 'data' else path.stem}"


def read_texts(path: Path, field: str | None = None) -> list[str]:
    """Captions of a .jsonl (the key `field`, or the first of captioned.DESCRIPTIONS) or a text file, one a line.

    Raises ValueError for a record without one and for no captions.
    """
    from ssmclip.data.lines import read_lines
    from ssmclip.data.testsets.layouts.captioned import DESCRIPTIONS

    numbered = [(number, text) for number, text in enumerate(read_lines(path), start=1) if text.strip()]
    lines = [text for _, text in numbered]
    if path.suffix in (".jsonl", ".jsonlines"):
        wanted = (field,) if field else DESCRIPTIONS
        records = [_record(path, number, text) for number, text in numbered]
        if bare := next((record for record in records if not any(record.get(key) for key in wanted)), None):
            raise ValueError(f"{path}: a record has none of {', '.join(wanted)}; its keys are {', '.join(bare)}")
        lines = [next(record[key] for key in wanted if record.get(key)) for record in records]
    if not lines:
        raise ValueError(f"{path} has no captions")
    return lines


def _record(path: Path, number: int, line: str) -> dict:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path}, line {number} must be a JSON object (got {line[:40]!r})")
    return record
