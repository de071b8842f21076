"""`ssmclip train`: a recipe and changes to it -> a run's folder."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "training of a model as described by a recipe"

AGAIN = 75  # EX_TEMPFAIL of sysexits.h: a temporary failure, the same command may succeed when it is repeated
ENDS = f"""exit status: 0, the run is finished; 1, an error, which the message names; {AGAIN}, stopped by SIGTERM or
SIGUSR1 after a whole step, which is saved; 130, stopped by Ctrl-C, saved as well (a second Ctrl-C ends at once,
unsaved)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, help="Python file whose function returns a TrainConfig, such as recipes/tiny.py"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings to change, such as lr=3e-4"
    )
    parser.add_argument("--out", type=Path, help="folder of the run (default: runs/NAME, with the recipe's name)")
    resume = parser.add_mutually_exclusive_group()
    resume.add_argument("--resume", action="store_true", help="continue the run in --out exactly where it stopped")
    resume.add_argument(
        "--resume-or-start",
        action="store_true",
        help="the same if --out has a run, else start it: for jobs that a scheduler repeats",
    )
    parser.epilog = ENDS


def run(args: argparse.Namespace) -> int:
    from ssmclip.config import apply_overrides, load_recipe
    from ssmclip.ops.memory import keep_freed_memory
    from ssmclip.train import Stopped, train

    keep_freed_memory()
    config = apply_overrides(load_recipe(args.recipe), args.set)
    out = args.out or Path("runs") / args.recipe.stem
    resume = args.resume or (args.resume_or_start and (out / "config.json").exists())
    try:
        train(config, out, resume=resume, validate=build_validation(config))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":  # one of several processes speaks
            after = f", {stopped.seconds:.1f} s after the signal" if stopped.seconds is not None else ""
            print(
                f"ssmclip train: stopped by {stopped}{after}. Continue with:\n{_resumption(args, out)}", file=sys.stderr
            )
        code = 130 if stopped.signal == signal.SIGINT else AGAIN
        _leave_the_other_processes()
        return code
    return 0


def _leave_the_other_processes() -> None:
    """End the process group: left to the interpreter's exit after an exception, its threads abort the process."""
    from torch import distributed

    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()


def _resumption(args: argparse.Namespace, out: Path) -> str:
    """Return the command that continues a run."""
    changes = ["--set", *args.set] if args.set else []
    return shlex.join(["ssmclip", "train", str(args.recipe), *changes, "--out", str(out), "--resume"])


def build_validation(config: Any) -> Callable | None:
    """Return the function that validates a training run, from its TrainConfig; None without validation tasks.

    Evaluation stands above training, so the command hands it down: validate(model, step) -> list[Result], with a
    `models.Model` in evaluation mode and the number of finished steps. A relative validation.root, and none, is looked
    for where training data are. Raises FileNotFoundError listing every place.
    """
    asked = config.validation
    if not (asked.every and asked.tasks):
        return None
    from ssmclip.config.places import VARIABLE, below, data_folders
    from ssmclip.evaluate.tasks import training_validation
    from ssmclip.train.build import plan

    folders, errors = data_folders(os.environ), []
    for root in below(asked.root, folders):
        try:
            return training_validation(
                asked.tasks, root, seed=config.seed, classes=plan(config).classes, model_name=config.model.label
            )
        except FileNotFoundError as error:
            errors.append(str(error))
    advice = f". Set validation.root=DIR, or set {VARIABLE}" if len(errors) > 1 else ""
    raise FileNotFoundError("\n".join(errors) + advice)
