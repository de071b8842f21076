"""What models decide about stimuli and how near that comes to people, from names to rows."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssmclip.rows import Result

TIMM = "timm:"


RESAMPLES = 1000


def open_ood(args: argparse.Namespace) -> tuple[Any, Any]:
    """People's trials and the stimuli of `ssmclip evaluate --tasks ood`. Raises ValueError for what is missing."""
    from ssmclip.humans.decide import open_stimuli
    from ssmclip.humans.trials import read_trials

    if not args.humans:
        raise ValueError("the task ood takes the trials of people to compare with: --humans FILE.parquet")
    return read_trials(args.humans), open_stimuli(args.data)


def decide_and_score(models: dict[str, str], humans, stimuli, args: argparse.Namespace) -> list[Result]:
    """The rows of `ssmclip evaluate --tasks ood`: decisions, kept beside the rows file, and their scores."""
    from ssmclip.humans.scores import score_decisions
    from ssmclip.humans.trials import read_trials

    decisions = args.out.with_suffix(".decisions.parquet")
    settings = _settings(args)
    for label, name in models.items():
        decide_model(
            label, name, stimuli, decisions, settings, args.ood_prompts, device=args.device, image_size=args.image_size
        )
    rows = score_decisions(humans, read_trials(decisions), resamples=RESAMPLES, seed=args.seed)
    return with_stimuli(rows, stimuli, args.seed) if args.examples else rows


def with_stimuli(rows: list[Result], stimuli, seed: int) -> list[Result]:
    """The rows; the first of each data set with a stimulus of each of its conditions, small, for the report."""
    from ssmclip.data.images import open_image
    from ssmclip.evaluate.pictures import draw, thumbnail
    from ssmclip.humans.stimuli import STIMULUS_SETS

    said, shown = set(), []
    for row in rows:
        name = row.task.removeprefix("ood/")
        of_set = [stimulus for stimulus in stimuli if stimulus.dataset == name]
        if of_set and name not in said:
            said.add(name)
            order = [of_set[place] for place in draw(len(of_set), len(of_set), seed)]
            first = {stimulus.condition: stimulus for stimulus in reversed(order)}
            known = [label for label in STIMULUS_SETS[name].conditions if label in first]
            small = {label: thumbnail(open_image(first[label].path)) for label in known}
            row = replace(row, extra=row.extra | {"stimuli": small})
        shown.append(row)
    return shown


def _settings(args: argparse.Namespace):
    from ssmclip.evaluate.embeddings.embed import Settings

    cache = None if args.cache == "none" else Path(args.cache)
    return Settings(args.batch_size, args.workers, args.seed, args.max_images, cache=cache)


def decide_model(
    label: str,
    name: str,
    stimuli,
    out: Path,
    settings,
    prompts: str,
    *,
    device: str,
    image_size: int | tuple[int, int] | None,
) -> int:
    """Load a model by its name on the command line and let it decide; returns how many decisions were added."""
    import ssmclip
    from ssmclip.evaluate.embeddings.embed import Clip
    from ssmclip.humans.decide import clip_decider, decide, timm_decider

    if name.startswith(TIMM):
        decider = timm_decider(name.removeprefix(TIMM), device=device, label=label.removeprefix(TIMM))
    else:
        clip = Clip(*ssmclip.load(name, device=device, image_size=image_size), label)
        decider = clip_decider(clip, settings, prompts=prompts)
    return decide(decider, stimuli, out, settings)
