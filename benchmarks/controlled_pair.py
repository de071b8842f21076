"""How much of a gap between encoders is the recipe? Three encoders, five recipes, three seeds, in CLIPs, as rows.

    python benchmarks/controlled_pair.py measure --runs runs/controlled_pair --out results/controlled_pair.jsonl
    python benchmarks/controlled_pair.py compare --out results/controlled_pair.jsonl

The Mamba models of CLIP-Mamba were trained with colour augmentation, a moving average of the weights and gradient
through the features gathered from other processes; the ViTs they are compared with, SLIP's, with none of the three.
`measure` trains each encoder by recipes/controlled_pair.py with all three, without one of them, and with none, on data
looked for where `ssmclip train` does. A run's rows are added to the file when it is done; a run whose rows are there is
not done again, and one seed is finished before the next begins. `compare` adds differences with an interval over images
and seeds: what each part is worth to each encoder, the gap to the ViT at the same recipe and at the published ones, and
the recipe's share of the latter.

One process trains, with the gradient that several would have. Where features are gathered without gradient, those of
the other kind are constants to every process, its own among them; so the gradient is the same for two processes as for
any larger number, and leaving it out in one is exact (tests/test_train_distributed.py compares with two processes).
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from ssmclip.config import TrainConfig, apply_overrides, load_recipe
from ssmclip.config.places import VARIABLE, data_folders
from ssmclip.evaluate import Settings, Study, open_tasks
from ssmclip.evaluate.statistics.paired import unmarked
from ssmclip.evaluate.task import StudyTask
from ssmclip.rows import Result, append_rows, describe_run, read_rows, write_rows
from ssmclip.rows.condition import CASE, SEED
from ssmclip.train import train

RECIPE = Path(__file__).parents[1] / "recipes" / "controlled_pair.py"
VMAMBA, NO_SCAN, VIT = "VMamba", "VMamba, no scan", "ViT"
ENCODERS = {VMAMBA: "CLIP-VMamba-Nano", NO_SCAN: "CLIP-VMamba-Nano-GatedConv", VIT: "CLIP-ViT-Nano"}
WITHOUT = {  # a part of the recipe -> the setting that leaves it out
    "colour augmentation": "colors=false",
    "moving average": "ema.decay=none",
    "gathered gradients": "gather_with_grad=false",
}
ALL, NONE = "all", "none"
CONDITIONS: dict[str, list[str]] = {
    ALL: [],
    NONE: list(WITHOUT.values()),
    **{f"without {part}": [setting] for part, setting in WITHOUT.items()},
}
SEEDS = (0, 1, 2)
TASK, METRIC = "flickr8k", "image_to_text_recall@10"
METRICS = (METRIC, "text_to_image_recall@10", "mean_recall")
DIFFERENCE, SHARE = f"difference in {METRIC}", f"recipe's share of the difference in {METRIC}"
RESAMPLES = 10_000

Cell = tuple[str, str]  # (encoder, condition)


def every_run() -> list[tuple[int, str, str]]:
    """Return (seed, encoder, condition) of all runs, in order."""
    return [(seed, encoder, condition) for seed in SEEDS for condition in CONDITIONS for encoder in ENCODERS]


def config_of(encoder: str, condition: str, seed: int, changes: Sequence[str] = ()) -> TrainConfig:
    """Return the settings of one run: those of the recipe, but for one field each. changes: as for `--set`."""
    settings = [f"model.name={ENCODERS[encoder]}", *CONDITIONS[condition], f"seed={seed}", "progress=false", *changes]
    return apply_overrides(load_recipe(RECIPE), settings)


def folder_of(runs: Path, encoder: str, condition: str, seed: int) -> Path:
    return runs / f"{encoder}-{condition}-{seed}".replace(", ", "-").replace(" ", "-").lower()


def measure(runs: Path, out: Path, changes: Sequence[str] = ()) -> None:
    """Train and evaluate what the file has no rows of. Raises ValueError for a file of other changes."""
    task, begun = open_test_set(), time.monotonic()
    if not out.exists():
        append_rows(out, [], describe_run(device="cpu", tasks=[TASK], changes=list(changes)))
    head, rows = read_rows(out)
    if head.get("changes", []) != list(changes):
        raise ValueError(f"{out} must be of runs with --set {list(changes)} (got {head['changes']}): choose another")
    done = {(row.where[SEED], row.model, row.where[CASE]) for row in rows if row.task == TASK}
    for number, (seed, encoder, condition) in enumerate(every_run(), 1):
        if (seed, encoder, condition) in done:
            continue
        config, folder = config_of(encoder, condition, seed, changes), folder_of(runs, encoder, condition, seed)
        train(config, folder, resume=(folder / "config.json").exists())
        settings = Settings(batch_size=50, examples=0)
        study = Study({encoder: folder}, task, settings, image_size=config.image_size(config.steps - 1))
        made = [_at(row, condition, seed) for row in study.rows() if row.metric in METRICS]
        append_rows(out, made)
        minutes = (time.monotonic() - begun) / 60
        told = f"{number}/{len(every_run())} {encoder}, {condition}, seed {seed}: {made[0].value:.3f}"
        print(f"{told} ({minutes:.0f} min)", flush=True)


def open_test_set() -> list[StudyTask]:
    """Return the test set in the first folder that has it. Raises FileNotFoundError naming all."""
    errors = []
    for folder in data_folders(os.environ):
        try:
            return open_tasks([TASK], folder)
        except FileNotFoundError as error:
            errors.append(str(error))
    raise FileNotFoundError("\n".join([*errors, f"Set {VARIABLE} to the folder that has {TASK}"]))


def _at(row: Result, condition: str, seed: int) -> Result:
    kept = {key: row.extra[key] for key in ("right", "images", "chance") if key in row.extra}
    return dataclasses.replace(row, where={**row.where, CASE: condition, SEED: seed}, extra=kept)


def compare(file: Path) -> None:
    """Replace the file's differences by those of the seeds of which all runs are there. Raises ValueError for none."""
    head, rows = read_rows(file)
    rows = [row for row in rows if row.task == TASK]
    marks = {
        (row.model, row.where[CASE], row.where[SEED]): unmarked(row).numpy() for row in rows if row.metric == METRIC
    }
    cells = [(encoder, condition) for encoder in ENCODERS for condition in CONDITIONS]
    seeds = [seed for seed in SEEDS if all((*cell, seed) in marks for cell in cells)]
    if not seeds:
        raise ValueError(f"{file} must have all {len(cells)} runs of a seed (got {len(marks)} runs): measure first")
    means = Means.of({cell: np.stack([marks[(*cell, seed)] for seed in seeds]) for cell in cells})
    made = list(answers(means))
    for row in made:
        where = f"{row.model}, {row.where[CASE]}" + (f", minus {row.against}" if row.against else "")
        print(f"{where}: {row.metric} {row.value:.3f} ({row.ci_low:.3f} to {row.ci_high:.3f})")
    write_rows(file, [*rows, *made], head)


@dataclasses.dataclass(frozen=True)
class Means:
    """The mean accuracy of each cell: as measured, and in each of the resamples."""

    measured: dict[Cell, float]
    resampled: dict[Cell, np.ndarray]
    seeds: int
    images: int

    @classmethod
    def of(cls, right: dict[Cell, np.ndarray], seed: int = 0) -> Means:
        """Resample images, the same for all cells, and the seeds of each. right: cell -> right or not, (seeds, images).

        With three seeds the interval is a rough one; their spread is part of it.
        """
        draws = np.random.default_rng(seed)
        seeds, images = next(iter(right.values())).shape
        weights = draws.multinomial(images, np.full(images, 1 / images), size=RESAMPLES) / images
        resampled = {}
        for cell, marks in right.items():
            chosen = draws.multinomial(seeds, np.full(seeds, 1 / seeds), size=RESAMPLES) / seeds
            resampled[cell] = ((weights @ marks.T) * chosen).sum(1)
        return cls({cell: float(marks.mean()) for cell, marks in right.items()}, resampled, seeds, images)

    def difference(self, first: Cell, second: Cell, case: str) -> Result:
        """Return the row of one cell less another, with its 95 % interval."""
        value = self.measured[first] - self.measured[second]
        drawn = self.resampled[first] - self.resampled[second]
        against = "" if first[0] == second[0] else second[0]
        return self._row(first[0], DIFFERENCE, value, drawn, against, case)

    def share(self, encoder: str) -> Result:
        """Return how much of an encoder's published lead over the ViT the ViT gains by the encoder's recipe.

        Of a lead that may be zero or less (an interval that reaches there) a share means little.
        """
        gained = [m[VIT, ALL] - m[VIT, NONE] for m in (self.measured, self.resampled)]
        lead = [m[encoder, ALL] - m[VIT, NONE] for m in (self.measured, self.resampled)]
        with np.errstate(divide="ignore", invalid="ignore"):
            value, drawn = (np.divide(g, at) for g, at in zip(gained, lead, strict=True))
        return self._row(encoder, SHARE, float(value), drawn, VIT, PUBLISHED)

    def _row(self, model: str, metric: str, value: float, drawn: np.ndarray, against: str, case: str) -> Result:
        low, high = (float(edge) for edge in np.nanpercentile(drawn, (2.5, 97.5)))
        extra = {"seeds": self.seeds}
        return Result(model, COMPARED, metric, value, low, high, self.images, {CASE: case}, against, extra)


COMPARED = f"claim: what the recipe is worth on {TASK}"
PUBLISHED = "all, and none for the ViT, as published"


def answers(means: Means) -> Iterable[Result]:
    """Yield the rows of all differences and shares."""
    for encoder in ENCODERS:
        for part in WITHOUT:
            yield means.difference((encoder, ALL), (encoder, f"without {part}"), f"with {part}, minus without")
        yield means.difference((encoder, ALL), (encoder, NONE), "with all, minus with none")
    for encoder in (VMAMBA, NO_SCAN):
        for condition in CONDITIONS:
            yield means.difference((encoder, condition), (VIT, condition), f"{condition}, for both")
        yield means.difference((encoder, ALL), (VIT, NONE), PUBLISHED)
        yield means.share(encoder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["measure", "compare"])
    parser.add_argument("--runs", type=Path, default=Path("runs/controlled_pair"))
    parser.add_argument("--out", type=Path, default=Path("results/controlled_pair.jsonl"))
    parser.add_argument("--set", nargs="+", default=[], dest="changes", help="changed settings of every run")
    args = parser.parse_args()
    if args.step == "measure":
        measure(args.runs, args.out, args.changes)
    else:
        compare(args.out)


if __name__ == "__main__":
    main()
