"""The training loop. One step: a batch, its gradient, AdamW; between steps: check, log, validate, save, or stop.

A step is counted when it is finished: rows, checkpoints and `state["step"]` say how many steps the weights have seen.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

from ssmclip import models
from ssmclip.config import TrainConfig, to_dict
from ssmclip.config.settings import ImageSize
from ssmclip.rows import Result
from ssmclip.rows.condition import STEP
from ssmclip.train import sharding
from ssmclip.train.blueprint import Blueprint
from ssmclip.train.build import (
    build_accelerator,
    build_model,
    build_objective,
    build_trainee,
    is_sharded,
    open_stream,
    plan,
)
from ssmclip.train.checkpoint import (
    CheckpointError,
    checkpoint_folder,
    last_checkpoint,
    load_training_state,
    name_checkpoints,
    restoring,
    run_folder,
    save_checkpoint,
)
from ssmclip.train.ema import Ema, ema_decay
from ssmclip.train.gradient import backward, more_of
from ssmclip.train.layers import training_mode
from ssmclip.train.objective import Objective
from ssmclip.train.optimiser import build_optimiser, set_lr
from ssmclip.train.progress import Log, Measured, NonFinite, Repeats, Watch
from ssmclip.train.schedule import lr_schedule
from ssmclip.train.signals import Agreement, Signals, Stopped
from ssmclip.train.start import load_start, report_start
from ssmclip.train.state import rng_state, same_rng_after, seed_everything, set_rng_state
from ssmclip.train.timing import StepTimes
from ssmclip.train.trackers import tracker_names
from ssmclip.train.trainee import model_of, split_state

# validate(model, step) -> rows: the model in eval mode on its device, with its preprocessing. Called in the main
# process only. The loop adds the step to the rows.
Validate = Callable[[models.Model, int], list[Result]]

_REPEATS_MATTER = 0.01  # share of the pairs; fewer move the loss less than its noise
SIDES = ("image_height", "image_width")  # metrics of images that are not square
_MOST_SKIPS = 50  # optimiser steps in a row that overflow may cost before the run is called broken


def train(config: TrainConfig, out: str | Path, *, resume: bool = False, validate: Validate | None = None) -> Path:
    """Run a training run to its end and return its folder (layout: train/checkpoint.py).

    resume: continue the run in `out` exactly from its last checkpoint: data order, random state, optimiser. On a CPU
    every later loss is bit-identical to that of an uninterrupted run.
    Raises FileExistsError, FileNotFoundError, PermissionError and ValueError about `out` before any work
    (`run_folder`); NonFinite; CheckpointError when a checkpoint cannot be written or read; Stopped, a
    KeyboardInterrupt, when SIGINT, SIGTERM or SIGUSR1 asked the run to stop: a checkpoint of its last step is saved.
    """
    out, asked = Path(out), config.validation
    build_objective(config, num_classes=2)  # refuses before there is a folder
    tracker_names(config.logging)
    if asked.best and not (asked.every and asked.tasks):
        raise ValueError(f"validation.best={asked.best!r} needs validation.every and validation.tasks: set both")
    accelerator = build_accelerator(config)
    with run_folder(out, config, resume) if accelerator.is_main_process else nullcontext():
        accelerator.wait_for_everyone()
        run, finished = _Run.start(config, out, accelerator), False
        try:
            with Signals(announce=accelerator.is_main_process) as signals:
                run.to_the_end(validate, signals)
            finished = True
        except NonFinite as error:
            last = last_checkpoint(out)
            raise NonFinite(f"{error}. Last good checkpoint: {last or 'none yet'}") from None
        finally:
            run.close(hurry=not finished)
        accelerator.wait_for_everyone()
    return out


@dataclass
class _Run:
    """A run in progress: the state that changes from step to step."""

    config: TrainConfig
    out: Path
    accelerator: Accelerator
    plan: Blueprint
    model: nn.Module  # as prepared for this device and these processes
    optimiser: torch.optim.Optimizer
    objective: Objective
    ema: Ema | None
    log: Log
    step: int  # finished steps
    cursor: Any  # of the data, after the last finished step
    best: dict[str, Any] | None  # {"metric", "step", "value"} of the named validation metric
    skips: int = 0  # steps that the gradient scaler left out, in all
    skips_in_a_row: int = 0
    repeats: Repeats = field(default_factory=Repeats)
    times: StepTimes = field(default_factory=StepTimes)
    told_of_repeats: bool = False
    owes_validation: bool = False  # of the last step, after which a signal stopped the run
    stream: Any = None

    @classmethod
    def start(cls, config: TrainConfig, out: Path, accelerator: Accelerator) -> _Run:
        """Build everything, and restore the state of the last checkpoint if there is one."""
        checkpoint = last_checkpoint(out)
        state = load_training_state(checkpoint) if checkpoint else None
        if state and len(state["ranks"]) != accelerator.num_processes:
            raise CheckpointError(
                f"{checkpoint} was written by {len(state['ranks'])} processes (got {accelerator.num_processes}): "
                "launch the same number to continue exactly"
            )
        planned = plan(config)
        classes = len(planned.classes)
        objective = build_objective(config, accelerator.process_index, accelerator.num_processes, classes)
        objective.prepare(planned, accelerator.device)
        seed_everything(config.seed)
        if accelerator.is_main_process:
            planned.describe(out)
        model = build_model(config, planned, accelerator.num_processes)
        taken = load_start(model, config, planned, checkpoint)
        report_start(out, taken, model, accelerator.is_main_process)
        with restoring(checkpoint):
            model = build_trainee(model, objective, state.get("heads") if state else None, is_sharded(accelerator))
        ema = Ema(model.to(accelerator.device)) if config.ema.decay is not None else None
        if state and state["online"] is not None:  # the file has the average; the model itself is in the state
            with restoring(checkpoint):
                model.load_state_dict(state["online"])
        objective.follow(ema.model if ema else None)
        if config.model.compile:
            model.compile()
        model = sharding.prepare_scalars(model) if is_sharded(accelerator) else model
        model, optimiser = accelerator.prepare(model, build_optimiser(model, config.optimiser))
        if state:
            with restoring(checkpoint):
                sharding.load_optimiser(accelerator, model, optimiser, state["optimiser"])
                if accelerator.scaler is not None:
                    accelerator.scaler.load_state_dict(state["scaler"])
        seed_everything(config.seed + accelerator.process_index)
        own = state["ranks"][accelerator.process_index] if state else None
        if own:
            with restoring(checkpoint):
                set_rng_state(accelerator.device, own["rng"])
        step = state["step"] if state else 0
        best = state["best"] if state else None
        if state and accelerator.is_main_process:  # a kill may have come between a checkpoint and its naming
            name_checkpoints(out, step, best and best["step"])
        if best and best.get("metric", config.validation.best) != config.validation.best:
            best = None  # of another metric: no measure for what comes
        return cls(
            config=config,
            out=out,
            accelerator=accelerator,
            plan=planned,
            model=model,
            optimiser=optimiser,
            objective=objective,
            ema=ema,
            log=Log(out, config, step, str(accelerator.device), accelerator.is_main_process),
            step=step,
            cursor=own["cursor"] if own else None,
            best=best,
            skips=state["skips"] if state else 0,
            repeats=Repeats(state.get("repeats", 0) if state else 0),
            owes_validation=bool(state and state.get("owes_validation")),
        )

    def to_the_end(self, validate: Validate | None, signals: Signals) -> None:
        config, device = self.config, self.accelerator.device
        rates = lr_schedule(config.steps, config.schedule, config.optimiser.lr)
        # On a CPU looking costs nothing. Elsewhere it waits for the device, so only when there is something to say.
        look_every = 1 if device.type == "cpu" else config.logging.every
        watch, size, agreement = Watch(), None, Agreement(self.accelerator)
        self.log.say(f"{config.model.label} on {device}: steps {self.step} to {config.steps}, {self.out}")
        if self.owes_validation:
            self._validate_what_is_owed(validate)
        while self.step < config.steps:
            if config.image_size(self.step) != size:
                size = config.image_size(self.step)
                self.stream = self._open_stream(size, self.stream)
            self.times.begin()
            with self.times.waiting():
                batch = next(self.stream)
            watch.add(self._one_step(batch, rates[self.step]))
            self.cursor = self.stream.cursor
            self.log.stepped()
            stop = agreement.settle(signals.number)
            pause = (
                stop > 0
                or self._due(config.logging.every)
                or self._due(config.validation.every)
                or self._due(config.checkpoint.every)
            )
            seen = watch.look(self._mean) if pause or self.step % look_every == 0 else None
            self.times.ended()
            if self._due(config.logging.every):
                self._write_numbers(*seen, rates[self.step - 1], batch.images.shape[-2:])
            with self.log.pause():
                self._between_steps(validate, size, stop)
        self._report_skipped(self.stream)

    def _between_steps(self, validate: Validate | None, size: ImageSize, stop: int) -> None:
        """Validate and save what is due. Raises Stopped for a signal, after whose step validation has to wait."""
        due = validate is not None and self._due(self.config.validation.every)
        self.owes_validation = bool(due and stop)
        improved = due and not stop and self._validate(validate, size)
        if improved or stop or self._due(self.config.checkpoint.every):
            self._save()
        if stop:
            self._report_skipped(self.stream)
            raise Stopped(stop, self.step, checkpoint_folder(self.out, self.step))

    def _validate_what_is_owed(self, validate: Validate | None) -> None:
        """Validate the step after which a signal stopped the run, as an uninterrupted run has done."""
        self.owes_validation = False
        if validate is not None and self._validate(validate, self.config.image_size(self.step - 1)):
            self._save()

    def close(self, hurry: bool) -> None:
        """End the worker processes, the progress bar and the trackers; in a hurry, hardly waiting for the last."""
        if self.stream is not None:
            self.stream.close()
        self.log.close(hurry)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.config.steps)

    def _one_step(self, batch: Any, lr: float) -> Measured:
        config, accelerator = self.config, self.accelerator
        images = batch.images.to(accelerator.device, non_blocking=True)
        texts = batch.texts.to(accelerator.device, non_blocking=True)
        more = {name: value.to(accelerator.device, non_blocking=True) for name, value in more_of(batch).items()}
        set_lr(self.optimiser, lr)
        loss = backward(accelerator, self.model, self.objective, images, texts, config.loss.micro_batch, more)
        norm = self._grad_norm()
        skipped = self._update()
        self.optimiser.zero_grad(set_to_none=True)
        bare = accelerator.unwrap_model(self.model)
        self.objective.constrain(model_of(bare))
        if self.ema:
            self.ema.update(bare, ema_decay(self.step, config.steps, config.ema.decay, config.ema.schedule))
        self.skips += skipped
        self.skips_in_a_row = self.skips_in_a_row + 1 if skipped else 0
        self.step += 1
        self.repeats.add(batch.keys)
        if self.skips_in_a_row > _MOST_SKIPS:
            keys = ", ".join(batch.keys)
            raise NonFinite(
                f"step {self.step}: gradients overflowed {_MOST_SKIPS} times in a row; keys of the batch: {keys}"
            )
        return Measured(self.step, loss, norm, batch.keys, skipped)

    def _update(self) -> bool:
        """Make AdamW's step; return true when the gradient scaler skipped it."""
        scaler = self.accelerator.scaler
        before = scaler.get_scale() if scaler is not None else 0.0
        self.optimiser.step()
        # By the scale: Accelerate goes by whether AdamW was called, and a fused one always is.
        return scaler is not None and scaler.get_scale() < before

    def _grad_norm(self) -> torch.Tensor:
        """Return the gradient's norm over all parameters, before any clipping."""
        limit = self.config.optimiser.clip_norm
        if limit is None and not is_sharded(self.accelerator):
            self.accelerator.unscale_gradients()
            return nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), float("inf") if limit is None else limit)
        return sharding.gathered(norm)

    def _mean(self, values: torch.Tensor) -> torch.Tensor:
        return self.accelerator.reduce(values, "mean")

    def _open_stream(self, size: ImageSize, before: Any) -> Any:
        if before is not None:
            self._report_skipped(before)
            before.close()
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        return open_stream(self.config, self.plan, size, rank, world, self.cursor)

    def _write_numbers(self, loss: float, norm: float, lr: float, sides: Sequence[int]) -> None:
        skipped = torch.tensor(float(sum(self.stream.skipped.values())), device=self.accelerator.device)
        numbers = {
            "loss": loss,
            "grad_norm": norm,
            **self._model_numbers(),
            "lr": float(lr),
            **({"image_size": sides[0]} if sides[0] == sides[1] else dict(zip(SIDES, sides, strict=True))),
            "samples_skipped": float(self.accelerator.reduce(skipped, "sum")),
            "samples_repeated": float(self._count_repeats()),
            **self.times.read(self.accelerator.gather, self.accelerator.device),
        }
        if self.accelerator.scaler is not None:
            numbers["steps_skipped"] = self.skips
        self.log.numbers(self.step, numbers, self.accelerator.device)
        if self.config.data.sources:
            self._write_sources()

    def _write_sources(self) -> None:
        """Write how many samples were drawn from each source so far, over all processes."""
        names = [name for name, weight in self.config.data.sources if weight]
        counts = torch.tensor([self.stream.drawn[name] for name in names], device=self.accelerator.device)
        drawn = map(float, self.accelerator.reduce(counts, "sum").tolist())
        self.log.counts(self.step, "samples_drawn", dict(zip(names, drawn, strict=True)))

    def _count_repeats(self) -> int:
        """Return how many pairs were in their batch already, and say once when it is enough to matter."""
        count = self.repeats.look(self.accelerator.gather, self.accelerator.device)
        share = count / (self.step * self.config.batch_size)
        if self.objective.contrastive and share > _REPEATS_MATTER and not self.told_of_repeats:
            self.told_of_repeats = True
            self.log.say(
                f"warning: {share:.1%} of the pairs were in their batch already, as a pass over the data ended within "
                "it or the data have fewer pairs: each is a wrong negative of its copy, and the loss cannot fall to "
                "zero. Keep them apart with data.distinct=true, or lower batch_size"
            )
        return count

    def _model_numbers(self) -> dict[str, float]:
        numbers = self.objective.numbers(model_of(self.accelerator.unwrap_model(self.model)))
        return {name: float(sharding.gathered(value)) for name, value in numbers.items()}

    def _report_skipped(self, stream: Any) -> None:
        if stream is None:
            return
        counts, examples = Counter(), {}
        for skipped, such_as in self._of_all([(dict(stream.skipped), dict(stream.skipped_examples))]):
            counts.update(skipped)
            examples = such_as | examples
        for reason, count in counts.items():
            self.log.say(f"skipped {count} samples: {reason}, such as {examples.get(reason)}")
        if self.config.data.captions:
            missing = sum((Counter(each) for each in self._of_all([dict(stream.missing)])), Counter())
            for name, count in missing.items():
                self.log.say(f"{count} samples had no caption {name!r}: one of the others was drawn")

    def _of_all(self, own: list) -> list:
        """Return the concatenated lists of all processes."""
        return gather_object(own) if self.accelerator.num_processes > 1 else own

    def _validate(self, validate: Validate, size: ImageSize) -> bool:
        """Measure, write the rows, and return whether the named metric is the best so far."""
        improved = False
        if self.accelerator.is_main_process:
            model = model_of(self.ema.model if self.ema else self.accelerator.unwrap_model(self.model))
            model.eval()
            with same_rng_after(self.accelerator.device), torch.no_grad():
                rows = validate(self.plan.ready(model, size, self.config.model.label), self.step)
            if self.ema is None:
                training_mode(model, self.config.model)
            rows = [dataclasses.replace(row, where={STEP: self.step, **row.where}) for row in rows]
            self.log.rows(self.step, rows)
            values = {f"{row.task}/{row.metric}": row.value for row in rows}
            named = self.config.validation.best
            if named and named not in values:
                raise ValueError(
                    f"validation.best must be one of the metrics measured, {', '.join(sorted(values))} (got {named!r})"
                )
            value = float(values[named]) if named else math.nan
            if value > (self.best["value"] if self.best else -math.inf):  # a NaN is never the best
                self.best, improved = {"metric": named, "step": self.step, "value": value}, True
        return bool(self._mean(torch.tensor(float(improved), device=self.accelerator.device)) > 0)

    def _save(self) -> None:
        accelerator, repeats = self.accelerator, self._count_repeats()
        ranks = self._of_all([{"rng": rng_state(accelerator.device), "cursor": self.cursor}])
        optimiser = sharding.optimiser_state(accelerator, self.model, self.optimiser)
        online = sharding.model_state(accelerator, self.model)
        if accelerator.is_main_process:
            kept = self.ema.model if self.ema else accelerator.unwrap_model(self.model)
            weights, heads = split_state(kept, kept.state_dict() if self.ema else online)
            state = {
                "step": self.step,
                "config": to_dict(self.config),
                "optimiser": optimiser,
                "scaler": accelerator.scaler.state_dict() if accelerator.scaler is not None else None,
                "online": online if self.ema else None,
                "heads": heads,
                "best": self.best,
                "skips": self.skips,
                "repeats": repeats,
                "owes_validation": self.owes_validation,
                "ranks": ranks,
            }
            model = model_of(kept) if self.ema else self.plan.plain(weights)
            best = self.best["step"] if self.best else None

            save = partial(self.plan.save, model)
            save_checkpoint(self.out, self.step, save, state, self.config.checkpoint.keep, best)
        accelerator.wait_for_everyone()
