"""`ssmclip train`: a recipe, changes to it, a folder."""

from __future__ import annotations

import argparse
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


def run(args: argparse.Namespace, validation: Callable[[Any], Any] | None = None) -> int:
    """Train. `validation(config)` is called once with the TrainConfig when the recipe asks for validation.

    It returns validate(model, preprocess, tokenizer, step) -> list[Result]: a model in eval mode on its device,
    PIL image -> tensor (3, H, W), list of n strings -> int64 tensor (n, context), finished steps. Evaluation stands
    above training, so the caller hands it down.
    """
    from ssmclip.config import apply_overrides, load_recipe
    from ssmclip.ops.memory import keep_freed_memory
    from ssmclip.train import train

    keep_freed_memory()
    config = apply_overrides(load_recipe(args.recipe), args.set)
    wants = config.validation.every > 0 and config.validation.tasks
    validate = validation(config) if validation is not None and wants else None
    train(config, args.out or Path("runs") / args.recipe.stem, resume=args.resume, validate=validate)
    return 0


def build_validation(config: Any) -> Callable | None:
    """What a training run measures as it goes, from its TrainConfig; None when it asks for nothing."""
    from ssmclip.evaluate.tasks import training_validation

    wanted = config.validation
    if not (wanted.every and wanted.tasks):
        return None
    return training_validation(wanted.tasks, wanted.root, model_name=config.model.name, seed=config.seed)
