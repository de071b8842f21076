"""ssmclip ood: how models classify distorted images, and how close they come to people."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ssmclip.cli.options import (
    MODELS,
    add_device,
    add_precision,
    default_cache,
    image_size,
    labelled,
    line,
    require_writable,
)
from ssmclip.humans import RESAMPLES

if TYPE_CHECKING:
    from ssmclip.humans.study import OodTask

HELP = "decisions of models on out-of-distribution images, compared with people"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="subcommand", required=True, metavar="COMMAND")
    says = "accuracy, consistency with people and shape bias, as rows"
    score = commands.add_parser("score", help=says, description=says)
    score.add_argument(
        "--decisions",
        required=True,
        nargs="+",
        type=Path,
        help="decisions of models: parquet or csv files, or folders of them",
    )
    score.add_argument("--humans", required=True, nargs="+", type=Path, help="trials of people, in the same formats")
    score.add_argument("--out", required=True, type=Path, help="rows file to write (JSON lines)")
    score.add_argument(
        "--resamples",
        type=int,
        default=RESAMPLES,
        help="number of bootstrap resamples; 0: no intervals (default: %(default)s)",
    )
    score.add_argument("--seed", type=int, default=0, help="random seed for the intervals (default: %(default)s)")
    says = "decisions of models on stimuli, as a parquet file"
    decide = commands.add_parser("decide", help=says, description=says)
    decide.add_argument(
        "--model",
        required=True,
        help=MODELS,
    )
    decide.add_argument("--data", required=True, help="folder that contains the data sets of stimuli")
    decide.add_argument("--sets", help="data sets, separated by commas: edge,contrast (default: all in --data)")
    decide.add_argument("--out", required=True, type=Path, help="parquet file to write, or to continue")
    decide.add_argument(
        "--prompts",
        default="imagenet",
        help="prompts for a CLIP: imagenet (207 classes with 80 templates) or categories (16) (default: %(default)s)",
    )
    decide.add_argument(
        "--cache",
        default=str(default_cache() or "none"),
        help="folder of cached prompt embeddings; none: no cache (default: %(default)s)",
    )
    decide.add_argument("--batch-size", type=int, default=64, help="number of images in a batch (default: %(default)s)")
    decide.add_argument(
        "--workers",
        type=int,
        default=0,
        help="number of processes that open images; 0: this one (default: %(default)s)",
    )
    add_device(decide)
    add_precision(decide)
    decide.add_argument(
        "--image-size",
        type=image_size,
        help="image size, in pixels or as HEIGHTxWIDTH (default: the size the model was trained at)",
    )
    decide.add_argument("--max-images", type=int, help="size of a random subset of the stimuli (default: all)")
    decide.add_argument("--seed", type=int, default=0, help="random seed for the subset (default: %(default)s)")
    says = "download of the published stimuli, checked by checksums"
    download = commands.add_parser("download", help=says, description=says)
    download.add_argument("sets", help="data sets, separated by commas: edge,contrast; or all")
    download.add_argument(
        "--out", required=True, type=Path, help="output folder, filled with one folder per data set and SHA256SUMS"
    )
    download.add_argument(
        "--sha256", help="SHA-256 of the archive, for a single data set (default: the one in SHA256SUMS)"
    )
    download.add_argument(
        "--url", help="URL to download from, with {name} for the name of the data set (default: the release)"
    )


def run(args: argparse.Namespace) -> int:
    return {"score": _score, "decide": _decide, "download": _download}[args.subcommand](args)


def _download(args: argparse.Namespace) -> int:
    from ssmclip.humans.download import RELEASE, SUMS, download_stimuli
    from ssmclip.humans.stimuli import STIMULUS_SETS

    names = list(STIMULUS_SETS) if args.sets == "all" else args.sets.split(",")
    for name in names:
        STIMULUS_SETS[name]  # an unknown one raises, before the first is fetched
    if args.sha256 and len(names) > 1:
        raise ValueError(
            f"--sha256 applies to a single data set (got {len(names)}); list the checksums in {args.out / SUMS}"
        )
    for name in names:
        found = download_stimuli(name, args.out, sha256=args.sha256, url=args.url or RELEASE)
        sys.stdout.write(f"{name}: {len(found):,} stimuli in {args.out}\n")
    return 0


def ood_task(args: argparse.Namespace) -> OodTask:
    """Return the task ood of `ssmclip evaluate`. Raises ValueError for what is missing."""
    from ssmclip.humans.decide import open_stimuli
    from ssmclip.humans.study import Experiment, OodTask
    from ssmclip.humans.trials import read_trials

    if not args.humans:
        raise ValueError("the task ood needs the trials of people to compare with: give --humans FILE.parquet")
    stimuli, decisions = open_stimuli(args.data), args.out.with_suffix(".decisions.parquet")
    experiment = Experiment(stimuli, decisions, args.ood_prompts, args.device, args.image_size, args.precision)
    return OodTask(read_trials(args.humans), experiment)


def _decide(args: argparse.Namespace) -> int:
    from ssmclip.evaluate.embeddings.embed import Settings
    from ssmclip.humans.decide import open_stimuli
    from ssmclip.humans.study import Experiment

    require_writable(args.out)
    stimuli = open_stimuli(args.data, args.sets.split(",") if args.sets else None)
    cache = None if args.cache == "none" else Path(args.cache)
    settings = Settings(args.batch_size, args.workers, args.seed, args.max_images, cache=cache)
    experiment = Experiment(stimuli, args.out, args.prompts, args.device, args.image_size, args.precision)
    for label, added in experiment.run(labelled(args.model), settings):
        sys.stdout.write(f"{label}: {added:,} decisions added to {args.out}\n")
    return 0


def _score(args: argparse.Namespace) -> int:
    from ssmclip.humans.scores import score_decisions
    from ssmclip.humans.trials import read_trials
    from ssmclip.rows import describe_run, write_rows
    from ssmclip.rows.condition import LEVEL
    from ssmclip.rows.tasks import OOD

    require_writable(args.out, [*args.decisions, *args.humans])
    rows = score_decisions(
        read_trials(args.humans), read_trials(args.decisions), resamples=args.resamples, seed=args.seed
    )
    write_rows(args.out, rows, describe_run(args.seed, resamples=args.resamples))
    averaged = {row.model for row in rows if row.task == OOD}
    shown = [
        replace(row, task=row.condition or row.task)
        for row in rows
        if row.task == OOD or (row.model not in averaged and LEVEL not in row.where)
    ]
    sys.stdout.write("\n".join(line(row) for row in shown) + f"\n{len(rows)} rows in {args.out}\n")
    return 0
