"""Models x tasks -> rows: everything is opened first, then measured task by task, and kept after each."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import nn

from ssmclip.data.testsets.prompts import Prompts
from ssmclip.evaluate.embeddings import ranks
from ssmclip.evaluate.embeddings.embed import Settings
from ssmclip.evaluate.models import Facts, Models
from ssmclip.evaluate.protocols import OWN, Size
from ssmclip.evaluate.statistics.paired import paired_rows
from ssmclip.evaluate.suites import SUITES, suite_rows
from ssmclip.evaluate.task import StudyTask
from ssmclip.evaluate.tasks import open_tasks
from ssmclip.models.classifier import View
from ssmclip.models.precision import resolve
from ssmclip.rows import Result, describe_run
from ssmclip.rows.precision import FLOAT32, marked, measured_in
from ssmclip.rows.resume import RowsFile, latest

log = logging.getLogger(__name__)

# Settings that all rows of a file share.
SAME = ("seed", "image_size", "max_images", "protocol", "prompts", "view", "features")


@dataclass(frozen=True)
class Study:
    """An evaluation as a call, as done by `ssmclip evaluate`.

    models: label -> a name or folder that `ssmclip.find` takes, or the (model, preprocessing, tokenizer) it returned;
    tasks: from `open_tasks`, or objects with the methods of `StudyTask`; protocol: one of PROTOCOLS; device,
    image_size: of models that are opened by name, image_size also of the protocol's preprocessing; out: a rows file
    to add to, under a lock, so that several studies may share it; about: settings to write into its first line;
    view: changes in how classifiers opened by name are shown pictures (one that is given opened keeps its
    preprocessing: `ssmclip.models.classifier.shown` makes timm's); facts: more for the rows of classifiers; suites:
    names in SUITES, of which the mean is to be given; precision: of models that are opened by name, one of
    `ssmclip.rows.precision.PRECISIONS`; rows of those in bfloat16 say so in `where`.

    >>> study = Study({"A": "CLIP-VMamba-Nano"}, open_tasks(["digits"], ""), out="rows.jsonl")  # doctest: +SKIP
    >>> for rows in study.measure(): print(rows[0].value)  # doctest: +SKIP
    """

    models: Mapping[str, Any]
    tasks: Sequence[StudyTask]
    settings: Settings = field(default_factory=Settings)
    protocol: str = OWN
    device: str = "cpu"
    image_size: Size | None = None
    out: str | Path | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    view: View = field(default_factory=View)
    facts: Facts | None = None
    suites: Sequence[str] = ()
    precision: str = FLOAT32

    def measure(self) -> Iterator[list[Result]]:
        """Yield rows as they are made: each model on each task, then the means of suites and differences between models
        on the same pictures, then the tasks that take all models at once.

        Rows that the file already holds stay until they are measured again; a run that was killed begins again with
        the embeddings in `settings.cache`. Processes that `accelerate launch` or torchrun started share the batches.
        Raises ValueError for a file of other settings, OSError when it cannot be written, and what tasks raise.
        """
        rank, device = ranks.launched(self.device)
        precision = resolve(self.precision, device)
        models = Models(self.models, self.protocol, device, self.image_size, self.view, self.facts, precision)
        file = self._file() if self.out else None
        held = file.found if file else []
        if held and rank == 0:
            log.info("keeping %d existing rows of %s; re-measured ones are replaced", len(held), self.out)
        for rows in chain(self._alone(models), [None], self._together(models, rank)):
            made = self._compared(held, precision) if rows is None else rows
            held = latest([*held, *made])[0]
            if file and rank == 0 and made:
                file.add(made)
            yield made

    def _compared(self, held: Sequence[Result], precision: str) -> list[Result]:
        """Return what follows from rows: means of suites, each within one precision, and differences between models."""
        means = [
            row
            for each in dict.fromkeys((FLOAT32, precision))
            for row in marked(suite_rows(measured_in(held, each), self.suites, self.models), each)
        ]
        return [*means, *paired_rows(held, seed=self.settings.seed)]

    def _alone(self, models: Models) -> Iterator[list[Result]]:
        """Yield rows model by model, so that only one is in memory at a time."""
        for label in models:
            for task in self.tasks:
                if not task.together:
                    for rows in task.measure(models.only(label), self.settings):
                        yield _under(self.protocol, self._marked(models, rows))

    def _together(self, models: Models, rank: int) -> Iterator[list[Result]]:
        models.keep = True
        for task in self.tasks:
            if task.together and (rank == 0 or not task.one_process):
                for rows in task.measure(models, self.settings):
                    yield rows if task.names_precision else self._marked(models, rows)

    def _marked(self, models: Models, rows: list[Result]) -> list[Result]:
        """Return the rows of models that were opened by name with their precision, any others as they are."""
        opened = {label for label, model in self.models.items() if isinstance(model, str | Path)}
        return [one for row in rows for one in marked([row], models.precision if row.model in opened else FLOAT32)]

    def rows(self) -> list[Result]:
        """Measure all, and return the rows that were made."""
        return [row for rows in self.measure() for row in rows]

    def _file(self) -> RowsFile:
        settings = self.settings
        shared = {"image_size": self.image_size, "max_images": settings.max_images, "protocol": self.protocol}
        shared["view"] = {name: getattr(self.view, name) for name in ("crop_pct", "test_size", "test_pool")}
        run = describe_run(
            settings.seed, self.device, tasks=[task.name for task in self.tasks], **shared, **dict(self.about)
        )
        return RowsFile(self.out, run, SAME)


def evaluate(
    model: nn.Module,
    preprocess: Callable,
    tokenizer: Callable | None,
    tasks: Sequence[str | StudyTask],
    root: str | Path,
    *,
    model_name: str,
    device: str = "cpu",
    protocol: str = OWN,
    prompts: Prompts | None = None,
    image_size: Size | None = None,
    **settings: Any,
) -> list[Result]:
    """Return the rows of one model on tasks: names of data sets under `root`, or opened tasks.

    model, preprocess, tokenizer: a CLIP, or a classifier, which has no tokenizer;
    protocol: one of `PROTOCOLS`, which decides the prompts and the preprocessing; prompts: in place of the cards';
    settings: fields of `Settings`. For several models, or a rows file, see `Study`.
    Every card and data set is opened before the first image is embedded. Raises UnknownName for a task nobody knows,
    what the data set raises when it isn't there, and ValueError for embeddings that are not finite.
    """
    names = [task for task in tasks if isinstance(task, str)]
    opened = open_tasks(names, root, prompts, protocol=protocol) if names or not tasks else []
    opened += [task for task in tasks if not isinstance(task, str)]
    models = {model_name: (model.to(device), preprocess, tokenizer)}
    suites = [name for name in names if name in SUITES]
    return Study(models, opened, Settings(**settings), protocol, device, image_size, suites=suites).rows()


def _under(protocol: str, rows: list[Result]) -> list[Result]:
    return rows if protocol == OWN else [replace(row, extra=row.extra | {"protocol": protocol}) for row in rows]
