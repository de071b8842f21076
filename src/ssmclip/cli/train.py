"""`ssmclip train`: a recipe, changes to it, a folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

HELP = "train a model as a recipe says"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "recipe", type=Path, help="a file whose function returns a TrainConfig, such as recipes/tiny.py"
    )
    parser.add_argument(
        "--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="change settings, such as lr=3e-4"
    )
    parser.add_argument("--out", type=Path, help="the run's folder; without it runs/NAME, NAME the recipe's")
    parser.add_argument("--resume", action="store_true", help="continue the run in that folder, exactly")


def run(args: argparse.Namespace) -> int:
    from ssmclip.config import apply_overrides, load_recipe
    from ssmclip.ops.memory import keep_freed_memory
    from ssmclip.train import train

    keep_freed_memory()
    config = apply_overrides(load_recipe(args.recipe), args.set)
    out = args.out or Path("runs") / args.recipe.stem
    train(config, out, resume=args.resume, validate=build_validation(config))
    return 0


def build_validation(config: Any) -> Callable | None:
    """Return what measures a training run as it goes, from its TrainConfig; None when it asks for nothing.

    Evaluation stands above training, so the command hands it down: validate(model, preprocess, tokenizer, step) ->
    list[Result], with a model in eval mode on its device, PIL image -> tensor (3, H, W), list of n strings -> int64
    tensor (n, context), and the number of finished steps. A relative validation.root, and none, is looked for where
    training data are. Raises FileNotFoundError listing every place.
    """
    asked = config.validation
    if not (asked.every and asked.tasks):
        return None
    from ssmclip.config.places import VARIABLE, below, data_folders
    from ssmclip.evaluate.tasks import training_validation

    folders, errors = data_folders(os.environ), []
    for root in below(asked.root, folders):
        try:
            return training_validation(asked.tasks, root, model_name=config.model.name, seed=config.seed)
        except FileNotFoundError as error:
            errors.append(str(error))
    advice = f". Name its folder: validation.root=DIR, or set {VARIABLE}" if len(errors) > 1 else ""
    raise FileNotFoundError("\n".join(errors) + advice)
