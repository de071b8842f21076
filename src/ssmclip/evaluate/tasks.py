"""Tasks of an evaluation: a test set and its judge, and how names on the command line become such tasks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ssmclip.data.testsets.open import CARD, FOLDER, HUB, list_cards, load_card, open_dataset
from ssmclip.data.testsets.prompts import Prompts
from ssmclip.evaluate.classification import ByScores
from ssmclip.evaluate.classifier import image_size
from ssmclip.evaluate.distorted import Manipulations, choose, distorted_rows
from ssmclip.evaluate.doubts import DOUBTS, doubted
from ssmclip.evaluate.embeddings import ranks
from ssmclip.evaluate.embeddings.embed import Settings
from ssmclip.evaluate.judge import JUDGES, Judge, judges_of, usual_judge
from ssmclip.evaluate.models import Models
from ssmclip.evaluate.outputs import match
from ssmclip.evaluate.probes.parts import open_parts
from ssmclip.evaluate.probes.probe import PROBES, Probe, is_probe, read_probe
from ssmclip.evaluate.probes.task import ProbeTask
from ssmclip.evaluate.protocols import OWN, PROTOCOLS
from ssmclip.evaluate.suites import SUITES
from ssmclip.evaluate.task import StudyTask
from ssmclip.models.frozen import POOLED
from ssmclip.models.names import Model
from ssmclip.registry import UnknownName
from ssmclip.rows import Result
from ssmclip.rows.paper_tables import TABLE1

log = logging.getLogger(__name__)

DISTORTED = "distorted"  # before a colon and the name of a data set, as names of probes are
BRIEF = ("title", "kind", "chance", "partial", "unreadable", "said")  # what a row of every few hundred steps keeps


@dataclass(frozen=True)
class Task(StudyTask):
    """A test set and its judge.

    test_set: what `open_dataset` returns, or an object of one's own with the same attributes; judge: a name in JUDGES,
    "" for the usual one of the model and the test set's kind; metrics: in place of the judge's usual ones; name: of the
    rows' task, "" for the card's; also: metrics of classification besides the usual ones.
    """

    test_set: Any
    judge: str = ""
    metrics: tuple[str, ...] = ()
    name: str = ""
    also: tuple[str, ...] = ()

    def __post_init__(self):
        object.__setattr__(self, "name", self.name or self.test_set.card.name)
        if not self.judge:
            judges_of(self.test_set.card.kind)  # none raises

    def judged_by(self, clip: Model, settings: Settings) -> Judge:
        """Return the judge of one model. Raises UnknownName, and what the judge raises."""
        return JUDGES[self.judge or usual_judge(clip, self.test_set)](clip, self.test_set, settings)

    def rows(self, clip: Model, settings: Settings) -> list[Result]:
        """Return the rows of one model."""
        judge = self.judged_by(clip, settings)
        metrics = self.metrics
        if self.also and isinstance(judge, ByScores):
            metrics = (*(metrics or judge.usual_metrics()), *self.also)
        judge.check(metrics)
        seen = judge.see(self.test_set)
        asked = getattr(self.test_set, "questions", None)  # and the size is that of these
        expected = len(self.test_set) if asked else self.test_set.card.test_size or len(self.test_set)
        log.info("%s on %s: %s of %s images", clip.label, self.name, f"{len(seen.index):,}", f"{expected:,}")
        rows = doubted(judge.rows(seen, self.name, metrics), self.test_set)
        for doubt in rows[0].extra.get(DOUBTS, ()) if rows else ():
            log.warning("%s on %s: %s", clip.label, self.name, doubt)
        return rows

    def measure(self, models: Models, settings: Settings) -> Iterator[list[Result]]:
        for label in models:
            model = models.clip(label, self.test_set.card.kind)
            rows = self.rows(model, settings)
            yield (
                _with_facts(rows, models.facts(model, image_size(model))) if models.facts and model.classifies else rows
            )


@dataclass(frozen=True)
class DistortedTask(StudyTask):
    """A task under distortions at all their levels, the same pictures for every model (see `distorted_rows`)."""

    task: Task
    how: Manipulations

    together: ClassVar[bool] = True

    @property
    def name(self) -> str:
        return f"{DISTORTED}:{self.task.name}"

    def measure(self, models: Models, settings: Settings) -> Iterator[list[Result]]:
        kind = self.task.test_set.card.kind
        judges = [self.task.judged_by(models.clip(label, kind), settings) for label in models]
        yield from distorted_rows(judges, self.how, settings)


def _with_facts(rows: list[Result], facts: dict[str, Any]) -> list[Result]:
    return [replace(row, extra=row.extra | facts) if place == 0 else row for place, row in enumerate(rows)]


def open_tasks(
    names: Sequence[str],
    root: str | Path,
    prompts: Prompts | None = None,
    *,
    protocol: str = OWN,
    how: Manipulations | None = None,
    features: str = POOLED,
    also: Sequence[str] = (),
) -> list[StudyTask]:
    """Open the data sets of the named tasks.

    names: data sets, "table1", suites, "found", folder:PATH (see `task_names`), PROBE:NAME for a probe (see
    `read_probe`) and distorted:NAME; root: what `open_dataset` takes; prompts: in place of the cards'; protocol: one of
    PROTOCOLS; how: the distortions, `choose(None)` by default; features: of probes, one of FEATURES; also: metrics of
    classification besides the usual ones.
    Raises ValueError for no tasks, UnknownName, and the data sets' own errors.
    """
    if not names:
        raise ValueError("no tasks given: name at least one; `ssmclip datasets` lists the data sets")
    asked: dict[str, list[str]] = {"": [], DISTORTED: []}  # what is done -> with which data sets
    for name in names:
        kind, data_set = split_name(name)
        asked.setdefault(kind, []).append(data_set)
    wanted = {kind: task_names(some, root, is_probe(kind)) for kind, some in asked.items()}
    probes = {kind: _probe(kind, protocol) for kind in wanted if is_probe(kind)}
    to_judge = [*wanted[""], *wanted[DISTORTED]]
    given = PROTOCOLS[protocol].prompts(prompts) if to_judge else None
    more = {} if given is None else {"prompts": given}
    # All cards, before the first data set is opened.
    cards = {name: load_card(name) for some in wanted.values() for name in some}
    opened = {name: Task(open_dataset(cards[name], root, **more), name=name, also=tuple(also)) for name in to_judge}
    parts = {name: open_parts(name, root) for name in dict.fromkeys(name for kind in probes for name in wanted[kind])}
    tasks: list[StudyTask] = [opened[name] for name in wanted[""]]
    tasks += [
        ProbeTask(probe, parts[name], f"{kind}:{name}", features)
        for kind, probe in probes.items()
        for name in wanted[kind]
    ]
    if wanted[DISTORTED]:
        how = how or choose(None)
        tasks += [DistortedTask(opened[name], how) for name in wanted[DISTORTED]]
    return tasks


def split_name(task: str) -> tuple[str, str]:
    """Return what is done with a data set, "" for the usual, and the data set's name. Raises UnknownName.

    >>> split_name("cifar10"), split_name("fewshot-16:dtd"), split_name("distorted:folder:a:b"), split_name("folder:a")
    (('', 'cifar10'), ('fewshot-16', 'dtd'), ('distorted', 'folder:a:b'), ('', 'folder:a'))
    """
    kind, colon, data_set = task.partition(":")
    if not colon or task.startswith((FOLDER, CARD)):
        return "", task
    if kind != DISTORTED and not is_probe(kind):
        raise UnknownName("kind of task", kind, [FOLDER[:-1], CARD[:-1], DISTORTED, *PROBES])
    return kind, data_set


def _probe(spelled: str, protocol: str) -> Probe:
    return read_probe(PROTOCOLS[protocol].probes.get(spelled, spelled))


def task_names(names: Sequence[str], root: str | Path, to_train: bool = False) -> list[str]:
    """Return the names of data sets, each once: "table1" stands for CLIP-Mamba's 26, the name of a suite for its data
    sets, and "found" for all that are under `root` and can be opened, with images to train on where they are wanted.
    Raises FileNotFoundError for "found"
    where there is no folder `root`."""
    spelled = {"table1": lambda: list(TABLE1.columns), "found": lambda: [name for name in list_cards() if there(name)]}
    spelled |= {name: lambda suite=suite: list(suite.metrics) for name, suite in SUITES.items()}

    def there(name: str) -> bool:
        try:
            if to_train:
                return bool(open_parts(name, root, download=False).opened())
            return bool(len(open_dataset(load_card(name), root, download=False)))
        except (OSError, ValueError):
            return False

    if "found" in names and not str(root).startswith(HUB) and not Path(root).is_dir():
        raise FileNotFoundError(f"data folder not found: {root}; give another --data")
    return list(dict.fromkeys(name for part in names for name in spelled.get(part, lambda part=part: [part])()))


def training_validation(
    tasks: Sequence[str],
    root: str | Path,
    *,
    batch_size: int = 64,
    workers: int = 0,
    seed: int = 0,
    max_images: int | None = 1000,
    classes: Sequence[str] = (),
    model_name: str = "",
) -> Callable[[Model, int], list[Result]]:
    """Return a function (model, step) -> rows, for a training loop, which adds the step to them.

    classes, model_name: of a classifier, what its outputs stand for (see `Model`), and its name for messages.
    The data sets are opened now, so that a missing one stops the run before it starts, and so do classes that are not
    a classifier's. The rows carry no pictures.
    """
    settings = Settings(batch_size, workers, seed, max_images, examples=0)
    opened = open_tasks(tasks, root)
    for task in (task for task in opened if classes and isinstance(task, Task)):
        match(tuple(classes), len(classes), task.test_set, model_name)

    def validate(model: Model, step: int) -> list[Result]:
        with ranks.by_itself():  # the others wait
            rows = [row for task in opened for row in task.rows(model, settings)]
        return [replace(row, extra={k: v for k, v in row.extra.items() if k in BRIEF}) for row in rows]

    return validate
