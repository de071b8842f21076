"""A model x a data set -> rows. What kind of task a data set is, its card says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ssmclip.data.sources import load_card, open_dataset
from ssmclip.evaluate.embed import Clip, Settings
from ssmclip.evaluate.retrieval import retrieval
from ssmclip.evaluate.zeroshot import zero_shot
from ssmclip.registry import UnknownName
from ssmclip.results import Result

KINDS = {"classification": zero_shot, "retrieval": retrieval}
BRIEF = ("title", "kind", "chance", "partial", "unreadable")  # what a row of every few hundred steps keeps


def evaluate(
    model: nn.Module,
    preprocess: Callable,
    tokenizer: Callable,
    tasks: Sequence[str],
    root: str | Path,
    *,
    model_name: str,
    batch_size: int = 64,
    workers: int = 0,
    device: str = "cpu",
    seed: int = 0,
    max_images: int | None = None,
    examples: int = 8,
) -> list[Result]:
    """Rows of any open_clip model on the named data sets under `root` (see `embed.Settings` for the numbers).

    Every card and data set is opened before the first image is embedded. Raises UnknownName for a task nobody knows,
    what the data set raises when it isn't there, and ValueError for embeddings that are not finite.
    """
    settings = Settings(batch_size, workers, seed, max_images, examples)
    opened = open_tasks(tasks, root)
    clip = Clip(model.to(device), preprocess, tokenizer, model_name)
    return [row for name, card, dataset in opened for row in KINDS[card.kind](clip, dataset, card, name, settings)]


def training_validation(
    tasks: Sequence[str],
    root: str | Path,
    *,
    model_name: str,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    max_images: int | None = 1000,
) -> Callable[[nn.Module, Callable, Callable, int], list[Result]]:
    """A function (model, preprocess, tokenizer, step) -> rows, for a training loop, which adds the step to the rows.

    The data sets are opened now, so that a missing one stops the run before it starts. The rows carry no pictures.
    """
    settings = Settings(batch_size, workers, seed, max_images, examples=0)
    opened = open_tasks(tasks, root)

    def validate(model: nn.Module, preprocess: Callable, tokenizer: Callable, step: int) -> list[Result]:
        clip = Clip(model, preprocess, tokenizer, model_name)
        rows = [row for name, card, dataset in opened for row in KINDS[card.kind](clip, dataset, card, name, settings)]
        return [replace(row, extra={k: v for k, v in row.extra.items() if k in BRIEF}) for row in rows]

    return validate


def open_tasks(tasks: Sequence[str], root: str | Path) -> list[tuple[str, Any, Any]]:
    """(name, card, data set) of each task. Raises ValueError for no tasks, UnknownName, and the sets' own errors."""
    if not tasks:
        raise ValueError("no tasks to evaluate")
    cards = {name: load_card(name) for name in tasks}
    for name, card in cards.items():
        if card.kind not in KINDS:
            raise UnknownName(f"kind of task (the card of {name})", card.kind, KINDS)
    return [(name, card, open_dataset(card, root)) for name, card in cards.items()]
