"""The learning rate at every step of a run."""

from __future__ import annotations

import numpy as np
import torch
from timm.scheduler import create_scheduler_v2

from ssmclip.config import ScheduleConfig
from ssmclip.registry import UnknownName

TIMM = "timm:"
# Those whose learning rate depends on the step alone; plateau's depends on what is measured.
KINDS = ("cosine", "tanh", "step", "multistep", "poly", "wsd")


def lr_schedule(steps: int, config: ScheduleConfig, peak: float) -> np.ndarray:
    """Return the learning rate at every step, float64 (steps,). Raises UnknownName, ValueError."""
    if config.shape == "cosine":
        return _cosine(steps, config, peak)
    return _of_timm(steps, config, peak)


def _cosine(steps: int, config: ScheduleConfig, peak: float) -> np.ndarray:
    """Return linear warm-up from start_lr to peak, then half a cosine to end_lr.

    Bit-identical to mamba-clip's: the warm-up's last step already has the peak, and so has the first step after it; the
    cosine's last step is one short of end_lr.
    """
    warmup = np.linspace(config.start_lr, peak, config.warmup_steps)
    rest = np.arange(steps - config.warmup_steps)
    cosine = config.end_lr + 0.5 * (peak - config.end_lr) * (1 + np.cos(np.pi * rest / max(len(rest), 1)))
    return np.concatenate([warmup, cosine])


def _of_timm(steps: int, config: ScheduleConfig, peak: float) -> np.ndarray:
    """Return the rates of `timm.scheduler.create_scheduler_v2`, asked once for each `hold_steps` steps.

    The warm-up is within the schedule, as in MambaOut's recipe: after it the cosine goes on as if it had begun at step
    0. With warmup_prefix=true among args it comes before the schedule, as in Swin's and VMamba's. The last
    cooldown_steps have end_lr.
    """
    kind = config.shape.removeprefix(TIMM)
    if not config.shape.startswith(TIMM) or kind not in KINDS:
        raise UnknownName("schedule", config.shape, ["cosine", *(TIMM + known for known in KINDS)])
    held = config.hold_steps
    before = config.cooldown_steps + (config.warmup_steps if config.args.get("warmup_prefix") else 0)
    optimiser = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=peak)
    try:
        scheduler, _ = create_scheduler_v2(
            optimiser,
            sched=kind,
            num_epochs=(steps - before) // held,
            cooldown_epochs=config.cooldown_steps // held,
            warmup_epochs=config.warmup_steps // held,
            warmup_lr=config.start_lr,
            min_lr=config.end_lr,
            **config.args,
        )
    except TypeError as error:
        raise ValueError(
            f"schedule.args must be arguments of timm.scheduler.create_scheduler_v2 (got {config.args}: {error})"
        ) from error
    rates = []
    for epoch in range(-(-steps // held)):
        scheduler.step(epoch)
        rates.append(optimiser.param_groups[0]["lr"])
    return np.repeat(np.array(rates, dtype=np.float64), held)[:steps]
