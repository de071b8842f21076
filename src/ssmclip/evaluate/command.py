"""ssmclip evaluate: models x data sets -> a rows file."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ssmclip.config import labelled

OOD = "ood"

HELP = "zero-shot accuracy and retrieval recall of one or more models, as rows"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        help="a name, a run or checkpoint folder, open_clip:NAME; several with commas; LABEL=... names its rows",
    )
    parser.add_argument(
        "--tasks",
        required=True,
        help="data sets, with commas: digits,cifar10,fashion_mnist,flickr8k; ood: see --humans",
    )
    parser.add_argument("--data", default="data", help="the folder the data sets are under (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, help="the rows file to write (JSON lines)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=0, help="processes that open images (default: this one)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1 ... (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of intervals, examples and subsets (default: %(default)s)")
    parser.add_argument("--image-size", type=int, help="pixels; default: what the model was trained at")
    parser.add_argument("--max-images", type=int, help="a random subset of each data set; the rows say so")
    parser.add_argument("--examples", type=int, default=8, help="pictures kept per data set; 0: none (default: 8)")
    parser.add_argument("--humans", nargs="+", type=Path, help="of the task ood: people's trials, parquet or csv files")
    parser.add_argument(
        "--prompts", default="imagenet", help="of the task ood: imagenet or categories (default: %(default)s)"
    )


def run(args: argparse.Namespace) -> int:
    import ssmclip
    from ssmclip.evaluate.ood import LEVEL
    from ssmclip.evaluate.ood_command import decide_and_score
    from ssmclip.evaluate.tasks import evaluate, open_tasks
    from ssmclip.results import describe_run, write_rows

    models = labelled(args.model)
    tasks = [task for task in args.tasks.split(",") if task]
    cards = [task for task in tasks if task != OOD]
    if cards or not tasks:
        open_tasks(cards, args.data)
    require_writable(args.out)  # before the hours, not after
    if OOD in tasks and not args.humans:
        raise ValueError("the task ood takes the trials of people to compare with: --humans FILE.parquet")
    described = describe_run(
        args.seed, args.device, tasks=tasks, image_size=args.image_size, max_images=args.max_images
    )
    rows = []
    for label, name in models.items() if cards else ():
        model, preprocess, tokenizer = ssmclip.load(name, device=args.device, image_size=args.image_size)
        rows += evaluate(
            model,
            preprocess,
            tokenizer,
            cards,
            args.data,
            model_name=label,
            batch_size=args.batch_size,
            workers=args.workers,
            device=args.device,
            seed=args.seed,
            max_images=args.max_images,
            examples=args.examples,
        )
        write_rows(args.out, rows, described)  # after every model: a later one's failure costs nothing
    if OOD in tasks:
        rows += decide_and_score(models, args)
        write_rows(args.out, rows, described)
    shown = [row for row in rows if not row.condition.startswith(LEVEL)]  # those are curves, for the report
    sys.stdout.write("\n".join(line(row) for row in shown) + f"\n{len(rows)} rows in {args.out}\n")
    return 0


def require_writable(path: Path) -> None:
    """Raise OSError now if `path` can't be written later. Leaves a file that is there as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; --out takes a file")
    probe = path.with_name(path.name + ".partial")
    probe.touch()
    probe.unlink()


def line(row) -> str:
    """One row for a person."""
    interval = "" if row.ci_low is None else f" [{row.ci_low:.4f}, {row.ci_high:.4f}]"
    return f"{row.model:24} {row.task:16} {row.metric:24} {row.value:.4f}{interval}  n={row.n}"
