"""Models compared with people, from names of models to rows.

The models' decisions on the stimuli go to a parquet file that a later run continues (`Experiment`); then all decisions
in the file are compared with people's (`score_sets`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from ssmclip.data.images import open_image, thumbnail
from ssmclip.evaluate.embeddings.embed import Settings
from ssmclip.evaluate.models import Models
from ssmclip.evaluate.pictures import draw
from ssmclip.evaluate.task import StudyTask
from ssmclip.humans import RESAMPLES
from ssmclip.humans.decide import Decider, clip_decider, decide, imagenet_decider
from ssmclip.humans.scores import score_sets
from ssmclip.humans.stimuli import STIMULUS_SETS, Stimulus
from ssmclip.humans.trials import Trials, read_trials
from ssmclip.models.names import TIMM, Model, find
from ssmclip.models.precision import resolve
from ssmclip.rows import Result
from ssmclip.rows.precision import FLOAT32, in_precision
from ssmclip.rows.tasks import OOD


@dataclass(frozen=True)
class Experiment:
    """The experiment that people took part in, for models.

    stimuli: from `open_stimuli`; decisions: the parquet file that decisions are added to; prompts: of a CLIP, see
    `clip_decider`; device, image_size, precision: of models that are loaded by name, see `ssmclip.find`; those in
    bfloat16 decide as "A (bfloat16)".
    """

    stimuli: Sequence[Stimulus]
    decisions: Path
    prompts: str = "imagenet"
    device: str = "cpu"
    image_size: int | tuple[int, int] | None = None
    precision: str = FLOAT32

    def decider(self, label: str, model: Any, settings: Settings) -> Decider:
        """Return the decider of a model: a CLIP decides from prompts, an image encoder from ImageNet logits.

        model: any name that `ssmclip.find` takes, or what it returned. Raises what `find` and `clip_decider` raise.
        """
        if isinstance(model, str | Path):
            precision = resolve(self.precision, self.device)
            label = in_precision(label.removeprefix(TIMM), precision)
            size = self.image_size
            model = find(model, label=label, device=self.device, image_size=size, precision=precision)
        if not isinstance(model, Model):
            model = Model(*model, label)
        if model.tokenizer is None:
            return imagenet_decider(model.network, model.preprocess, model.label)
        return clip_decider(model, settings, prompts=self.prompts)

    def run(self, models: Mapping[str, Any], settings: Settings) -> Iterator[tuple[str, int]]:
        """Let one model after another decide; yield its label and how many decisions were added to the file.

        models: label -> what `decider` takes. Raises what `decider` and `decide` raise.
        """
        for label, model in models.items():
            yield label, decide(self.decider(label, model, settings), self.stimuli, self.decisions, settings)


@dataclass(frozen=True)
class OodTask(StudyTask):
    """The comparison with people as a task of an evaluation.

    humans: people's trials, from `read_trials`; resamples: of the bootstrap, 0 for no intervals.
    """

    humans: Trials
    experiment: Experiment
    resamples: int = RESAMPLES

    name: ClassVar[str] = OOD
    together: ClassVar[bool] = True
    one_process: ClassVar[bool] = True
    names_precision: ClassVar[bool] = True

    def measure(self, models: Models, settings: Settings) -> Iterator[list[Result]]:
        """Let the models decide, then yield the rows of averages over data sets, and those of each data set.

        Scored are all decisions in the file, those of earlier runs too. With `settings.examples`, a data set's first
        row has a stimulus of each of its conditions. One process does this alone. Raises what `Experiment.run` and
        `score_decisions` raise.
        """
        for _ in self.experiment.run(models.given, settings):
            pass
        decided = read_trials(self.experiment.decisions)
        for rows in score_sets(self.humans, decided, resamples=self.resamples, seed=settings.seed):
            yield with_stimuli(rows, self.experiment.stimuli, settings.seed) if settings.examples else rows


def with_stimuli(rows: Sequence[Result], stimuli: Sequence[Stimulus], seed: int) -> list[Result]:
    """Return the rows; the first of each data set with a small stimulus of each of its conditions, for the report."""
    finished, shown = set(), []
    for row in rows:
        name = row.task.removeprefix(f"{OOD}/")
        of_set = [stimulus for stimulus in stimuli if stimulus.dataset == name]
        if of_set and name not in finished:
            finished.add(name)
            row = replace(row, extra=row.extra | {"stimuli": _one_of_each(name, of_set, seed)})
        shown.append(row)
    return shown


def _one_of_each(name: str, stimuli: Sequence[Stimulus], seed: int) -> dict[str, str]:
    """Return condition -> a thumbnail of a random stimulus of it."""
    order = [stimuli[place] for place in draw(len(stimuli), len(stimuli), seed)]
    first = {stimulus.condition: stimulus for stimulus in reversed(order)}
    present = [label for label in STIMULUS_SETS[name].conditions if label in first]
    return {label: thumbnail(open_image(first[label].path)) for label in present}
