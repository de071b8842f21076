"""Hessian spectra and loss surfaces of a model, from its name to a rows file: open everything, measure, keep.

Several processes (`accelerate launch`) share the work, and what the rows file already holds is not measured again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn
from tqdm import tqdm

from ssmclip.analyze.curvature.batches import read_batches
from ssmclip.analyze.curvature.hessian import SpectrumSettings, batch_rows
from ssmclip.analyze.curvature.landscape import Unit, grid, surface
from ssmclip.analyze.curvature.parameters import TOWERS
from ssmclip.analyze.curvature.summary import summary_rows
from ssmclip.models import create_clip, load_config
from ssmclip.models.names import Model, load
from ssmclip.registry import UnknownName
from ssmclip.rows import Result, describe_run
from ssmclip.rows.condition import BATCH, PROTOCOL, STEP, TOWER
from ssmclip.rows.resume import RowsFile, latest
from ssmclip.rows.tasks import LANCZOS
from ssmclip.train.checkpoint import checkpoints, read_settings
from ssmclip.train.objective import objective_of
from ssmclip.train.state import seed_everything


@dataclass(frozen=True)
class Subject:
    """A model, and the pairs its loss is measured on.

    model: what `ssmclip.load` takes, or what it returned; label: the model's name in the rows, "" for the last part of
    `model`; data: what `ssmclip.data.pairs.loader.open_pairs` takes; batches of batch_size pairs, no pair twice;
    precision: "float32" or "float64"; image_size: pixels or (height, width) in place of the model's own; seed: of the
    batches, of fresh weights and of random directions.
    """

    model: str | Path | Model | tuple[nn.Module, Callable, Callable]
    data: str
    batches: int
    batch_size: int = 15
    label: str = ""
    precision: str = "float32"
    device: str = "cpu"
    image_size: int | tuple[int, int] | None = None
    seed: int = 0

    @property
    def name(self) -> str:
        """Return the model's name in the rows."""
        if self.label or isinstance(self.model, str | Path):
            return self.label or Path(self.model).name
        network, *_ = self.model
        return type(network).__name__

    def open(self, checkpoint: str | Path | None = None) -> tuple[nn.Module, Iterator[tuple[Tensor, Tensor]]]:
        """Return the model, in evaluation mode, and its batches. checkpoint: a folder to load in place of `model`."""
        torch.manual_seed(self.seed)  # of a model with fresh weights
        opened = self.model
        if checkpoint or isinstance(opened, str | Path):
            opened = load(checkpoint or opened, device=self.device, image_size=self.image_size)
        model, preprocess, tokenizer = opened
        data = read_batches(
            self.data, preprocess, tokenizer, batches=self.batches, batch_size=self.batch_size, seed=self.seed
        )
        return model.to(getattr(torch, self.precision)), data

    def loss_of(self, model: nn.Module) -> Callable[[nn.Module, Tensor, Tensor], Tensor]:
        """Return the loss that the model was trained for (see `objective_of`)."""
        origin = self.model.origin if isinstance(self.model, Model) else self.model
        return objective_of(model, None if isinstance(origin, tuple) else origin).of_batch


def hessian_study(
    subject: Subject,
    spectra: Sequence[SpectrumSettings] = (SpectrumSettings(),),
    towers: Sequence[str] = ("whole",),
    *,
    along_training: bool = False,
    out: str | Path | None = None,
    asked: dict[str, Any] | None = None,
) -> list[Result]:
    """Measure the Hessian's spectrum of each tower on each batch, and sum the batches up (see `summary_rows`).

    spectra: how, one for each protocol; along_training: also measure the run's beginning and every checkpoint of
    `subject.model`, a run's folder; out: the rows file to add to, which is left alone but for these; None for no file;
    asked: settings that all rows of the file share, in place of those of the first of `spectra`.
    Returns all rows of the file, in one process's order whoever measured them.
    Raises UnknownName for a tower; ValueError for settings that cannot be measured, for a file of other settings, and
    for a run without checkpoints; what `load` and `open_pairs` raise.
    """
    for tower in towers:
        if tower not in TOWERS:
            raise UnknownName("tower", tower, TOWERS)
    steps = _steps(subject, along_training)
    settings = (
        {key: value for key, value in asdict(spectra[0]).items() if key != "protocol"} if asked is None else asked
    )
    total = len(steps) * subject.batches * len(towers) * len(spectra)
    units = _hessian_units(subject, spectra, towers, steps)
    summarise = partial(summary_rows, k=spectra[0].k, seed=subject.seed)
    return _collect(subject, "hessian", settings, units, total, summarise, out)


def landscape_study(
    subject: Subject, *, dimensions: int = 2, points: int = 21, distance: float = 1.0, out: str | Path | None = None
) -> list[Result]:
    """Measure the loss at points along one or two random directions, filter by filter as long as the weights.

    points: along each direction, from -distance to distance. out and what is returned or raised: see `hessian_study`.
    """
    grid(points, distance)  # raises before the model is loaded

    def units() -> Iterator[Unit]:
        model, data = subject.open()
        yield from surface(
            model,
            list(data),
            model_name=subject.name,
            dimensions=dimensions,
            points=points,
            distance=distance,
            seed=subject.seed,
            loss_of_batch=subject.loss_of(model),
        )

    settings = {"points": points, "distance": distance, "dimensions": dimensions}
    return _collect(subject, "landscape", settings, units(), points**dimensions, lambda rows: [], out)


def _steps(subject: Subject, along_training: bool) -> list[tuple[dict[str, int], Path | None]]:
    """Return ({"step": …}, checkpoint) of what is measured; without a checkpoint the model as it was given."""
    if not along_training:
        return [({}, None)]
    run = Path(subject.model) if isinstance(subject.model, (str, Path)) else None
    found = checkpoints(run) if run else []
    if not found:
        raise ValueError(
            f"{subject.model} has no checkpoints; train with --set checkpoint.keep=100 to keep more of them"
        )
    return [({STEP: 0}, None), *(({STEP: int(folder.name.removeprefix("step_"))}, folder) for folder in found)]


def _hessian_units(
    subject: Subject,
    spectra: Sequence[SpectrumSettings],
    towers: Sequence[str],
    steps: Sequence[tuple[dict[str, int], Path | None]],
) -> Iterator[Unit]:
    for step, checkpoint in steps:
        model, data = subject.open(checkpoint)
        if step and checkpoint is None:
            model = _as_it_began(Path(subject.model)).to(subject.device, getattr(torch, subject.precision)).eval()
        loss = subject.loss_of(model)
        for number, (images, texts) in enumerate(data):
            for tower, spectrum in product(towers, spectra):
                other = {} if spectrum.protocol == LANCZOS else {PROTOCOL: spectrum.protocol}
                where = {**step, BATCH: number, TOWER: tower, **other}
                yield where, partial(_spectrum, model, images, texts, spectrum, loss, subject.name, where, tower)


def _spectrum(
    model, images, texts, spectrum: SpectrumSettings, loss: Callable, name: str, where: dict, tower: str
) -> list[Result]:
    title = f"{name}, batch {where[BATCH]}"
    with tqdm(desc=title, unit="product", leave=False, disable=None) as bar:
        told = {"model_name": name, "where": where, "tower": tower, "loss": loss}
        return batch_rows(model, images, texts, spectrum, **told, progress=lambda _: bar.update())


def _as_it_began(run: Path) -> nn.Module:
    """Return a run's model with the weights that its seed starts from."""
    seed_everything(read_settings(run / "config.json").seed)
    return create_clip(load_config(run))


def _collect(
    subject: Subject,
    analysis: str,
    settings: dict[str, Any],
    units: Iterable[Unit],
    total: int,
    summarise: Callable[[list[Result]], list[Result]],
    out: str | Path | None,
) -> list[Result]:
    """Measure this process's share of what the rows file lacks, adding rows as they come; then summarise.

    Rows of other models in the file are kept, and compared with in the summary.
    """
    state = PartialState(cpu=subject.device == "cpu")
    shared = {
        **settings,
        "data": subject.data,
        "batch_size": subject.batch_size,
        "precision": subject.precision,
        "analysis": analysis,
    }
    run = describe_run(subject.seed, subject.device, analysis=shared)
    file = RowsFile(out, run, same=("seed", "analysis")) if out else None
    held = file.found if file else []
    finished = {row.place for row in held if row.model == subject.name and _is_measured(row)}
    # A file that earlier versions were killed in may end within a unit: its last one is measured again.
    finished -= {row.place for row in held[-1:] if _is_measured(row)}
    state.wait_for_everyone()  # before anyone writes
    order: dict[tuple, int] = {}
    with tqdm(total=total, desc=analysis, unit="unit", disable=None if state.is_main_process else True) as bar:
        for number, (where, measure) in enumerate(units):
            place = Result(subject.name, analysis, "", 0.0, where=where).place
            order[place] = number
            if place not in finished and number % state.num_processes == state.process_index:
                rows = measure()
                held = [*held, *rows]
                if file:
                    file.add(rows)
            bar.update()
    state.wait_for_everyone()

    def finish(held: list[Result]) -> list[Result]:
        measured, _ = latest(row for row in held if _is_measured(row))
        # In one process's order, whoever measured them; other models' before.
        measured.sort(key=lambda row: order.get(row.place, -1) if row.model == subject.name else -1)
        return measured + summarise(measured)

    if file and state.is_main_process:
        file.change(finish)
    state.wait_for_everyone()
    return file.rows() if file else finish(held)


def _is_measured(row: Result) -> bool:
    """Return whether a row was measured on a batch or at a point, and is not a summary of others."""
    return BATCH in row.where or "x" in row.where
