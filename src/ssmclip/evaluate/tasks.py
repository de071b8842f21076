"""A model x a data set -> rows. What kind of task a data set is, its card says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from ssmclip.data.testsets.open import HUB, list_cards, load_card, open_dataset
from ssmclip.data.testsets.prompts import Prompts
from ssmclip.evaluate.distorted import Manipulations, distorted_rows
from ssmclip.evaluate.embeddings import ranks
from ssmclip.evaluate.embeddings.embed import Settings
from ssmclip.evaluate.protocols import OWN, PROTOCOLS
from ssmclip.evaluate.retrieval import retrieval
from ssmclip.evaluate.zeroshot import zero_shot
from ssmclip.models.names import Model
from ssmclip.registry import UnknownName
from ssmclip.rows import Result
from ssmclip.rows.paper_tables import TABLE1

KINDS = {"classification": zero_shot, "retrieval": retrieval}
BRIEF = ("title", "kind", "chance", "partial", "unreadable", "said")  # what a row of every few hundred steps keeps


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
    cache: Path | None = None,
    truncate: int | None = 77,
    protocol: str = OWN,
    prompts: Prompts | None = None,
    image_size: int | tuple[int, int] | None = None,
) -> list[Result]:
    """Rows of any open_clip model on the named data sets under `root` (see `embed.Settings` for the numbers).

    protocol: one of `PROTOCOLS`, which decides the prompts and the preprocessing; prompts: in place of the cards'.
    Every card and data set is opened before the first image is embedded. Raises UnknownName for a task nobody knows,
    what the data set raises when it isn't there, and ValueError for embeddings that are not finite.
    """
    settings = Settings(batch_size, workers, seed, max_images, examples, cache, truncate)
    opened = open_tasks(tasks, root, PROTOCOLS[protocol].prompts(prompts))
    loaded = (model.to(device), preprocess, tokenizer)
    return [row for rows in evaluations(loaded, opened, settings, model_name, protocol, image_size) for row in rows]


def evaluations(
    loaded: Model | tuple[nn.Module, Callable, Callable],
    opened: Sequence[tuple[str, Any, Any]],
    settings: Settings,
    model_name: str,
    protocol: str = OWN,
    image_size: int | tuple[int, int] | None = None,
) -> Iterator[list[Result]]:
    """The rows of one data set after another. loaded: model, preprocessing, tokenizer; opened: from `open_tasks`."""
    model, preprocess, tokenizer = loaded
    rules = PROTOCOLS[protocol]
    clips = {
        kind: Model(model, rules.preprocess(model, preprocess, kind, image_size), tokenizer, model_name)
        for kind in {card.kind for _, card, _ in opened}
    }
    for name, card, dataset in opened:
        rows = KINDS[card.kind](clips[card.kind], dataset, card, name, settings)
        yield rows if protocol == OWN else [replace(row, extra=row.extra | {"protocol": protocol}) for row in rows]


def distorted_evaluations(
    loaded: dict[str, Model | tuple[nn.Module, Callable, Callable]],
    opened: Sequence[tuple[str, Any, Any]],
    how: Manipulations,
    settings: Settings,
    protocol: str = OWN,
    image_size: int | None = None,
) -> Iterator[list[Result]]:
    """The rows of one distortion of one data set after another. loaded: a model's name -> model, preprocessing,
    tokenizer."""
    prepare = PROTOCOLS[protocol].preprocess
    for _, card, dataset in opened:
        clips = [
            Model(model, prepare(model, preprocess, card.kind, image_size), tokenizer, name)
            for name, (model, preprocess, tokenizer) in loaded.items()
        ]
        yield from distorted_rows(clips, dataset, card, how, settings)


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
        clip = Model(model, preprocess, tokenizer, model_name)
        rows: list[Result] = []
        with ranks.by_itself():  # the others wait
            for name, card, dataset in opened:
                rows += KINDS[card.kind](clip, dataset, card, name, settings)
        return [replace(row, extra={k: v for k, v in row.extra.items() if k in BRIEF}) for row in rows]

    return validate


def task_names(names: str, root: str | Path) -> list[str]:
    """The data sets of a list with commas, in which "table1" stands for CLIP-Mamba's 26 and "found" for all that are
    under `root` and can be opened. Raises FileNotFoundError for "found" where there is no folder `root`."""
    spelled = {"table1": lambda: list(TABLE1.columns), "found": lambda: [name for name in list_cards() if there(name)]}

    def there(name: str) -> bool:
        try:
            return bool(len(open_dataset(load_card(name), root, download=False)))
        except (OSError, ValueError):
            return False

    parts = [part for part in names.split(",") if part]
    if "found" in parts and not str(root).startswith(HUB) and not Path(root).is_dir():
        raise FileNotFoundError(f"no folder {root} to find data sets under: give another --data")
    return list(dict.fromkeys(name for part in parts for name in spelled.get(part, lambda part=part: [part])()))


def open_tasks(tasks: Sequence[str], root: str | Path, prompts: Prompts | None = None) -> list[tuple[str, Any, Any]]:
    """(name, card, data set) of each task. prompts: in place of the cards'.

    Raises ValueError for no tasks, UnknownName, and the sets' own errors.
    """
    if not tasks:
        raise ValueError("no tasks to evaluate")
    cards = {name: load_card(name) for name in tasks}
    for name, card in cards.items():
        if card.kind not in KINDS:
            raise UnknownName(f"kind of task (the card of {name})", card.kind, KINDS)
    more = {} if prompts is None else {"prompts": prompts}
    return [(name, card, open_dataset(card, root, **more)) for name, card in cards.items()]
