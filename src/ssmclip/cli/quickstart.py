"""`ssmclip quickstart`: train small CLIPs on built-in data, evaluate them side by side, write the report.

Nothing is downloaded: the data are scikit-learn's handwritten digits and drawn scenes, some of whose colour-shape pairs
are held out from training. The two models differ in their image encoder only.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ssmclip.cli.train import build_validation

HELP = "training of two small CLIPs on built-in data, their evaluation and a report"
MODELS = ("CLIP-VMamba-Nano", "CLIP-ViT-Nano")
TASKS = ("digits", "scenes")
DISTORTED = ("contrast", "high-pass", "low-pass", "uniform-noise", "phase-scrambling")  # of digits: half a minute
DISTORTED_IMAGES = 100


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--recipe", type=Path, default=Path("recipes/quickstart.py"), help="recipe (default: %(default)s)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="output folder (default: %(default)s)"
    )
    parser.add_argument("--set", nargs="+", action="extend", default=[], metavar="KEY=VALUE", help="settings to change")


def run(args: argparse.Namespace) -> int:
    """Train, evaluate and report. An existing run is continued, or left alone if it is finished."""
    import ssmclip
    from ssmclip.analyze.curvature.hessian import SpectrumSettings
    from ssmclip.analyze.curvature.study import Subject, hessian_study, landscape_study
    from ssmclip.config import apply_overrides, load_recipe
    from ssmclip.evaluate import evaluate
    from ssmclip.ops.memory import keep_freed_memory
    from ssmclip.report import write_report
    from ssmclip.rows import describe_run, write_rows
    from ssmclip.train import train

    keep_freed_memory()
    recipe = apply_overrides(load_recipe(args.recipe), args.set)
    rows, run_rows, trained = [], [], {}
    for name in MODELS:
        config = apply_overrides(recipe, [f"model.name={name}"])
        folder = args.out / name
        train(config, folder, resume=(folder / "config.json").exists(), validate=build_validation(config))
        run_rows.append(folder / "rows.jsonl")
        model, preprocess, tokenizer = trained[name] = ssmclip.load(folder)
        rows += evaluate(model, preprocess, tokenizer, TASKS, "", model_name=name)
        subject = Subject(trained[name], config.data.source, batches=1, label=name)
        rows += hessian_study(subject, [SpectrumSettings(k=3)], ["image"])
        rows += landscape_study(subject, dimensions=1, points=11)
    write_rows(args.out / "rows.jsonl", rows, describe_run(recipe.seed, tasks=list(TASKS)))
    start, used = time.perf_counter(), time.process_time()
    distorted = distorted_digits(trained)
    took = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - used}
    write_rows(args.out / "distorted.jsonl", distorted, describe_run(0, **took))
    page = write_report([args.out / "rows.jsonl", args.out / "distorted.jsonl", *run_rows], args.out)
    for row in rows:
        if row.metric == "top1":
            print(
                f"{row.model:18} {row.task:8} {row.value:6.1%}  (95 % interval {row.ci_low:.1%} to {row.ci_high:.1%})"
            )
    print(f"distorted digits: {took['seconds']:.0f} seconds")
    print(f"report: {page}")
    return 0


def distorted_digits(models: Mapping[str, Any]) -> list[Any]:
    """Return rows of accuracy over the level of distortion. models: label -> what `ssmclip.load` returns."""
    from ssmclip.evaluate import Settings, Study, open_tasks
    from ssmclip.evaluate.distorted import choose

    tasks = open_tasks(["distorted:digits"], "", how=choose(DISTORTED))
    return Study(models, tasks, Settings(max_images=DISTORTED_IMAGES, examples=1)).rows()
