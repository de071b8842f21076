"""Training of classifiers from files against the training step alone, on one batch that lies in memory. Writes rows.

    python benchmarks/loader.py --out results/loader.jsonl        six minutes on two idle cores; --quick: one

Class folders with JPEGs of 256 pixels, smooth noise; the augmentation of recipes/imagenet_mambaout_tiny.py (random
crops, RandAugment, random erasing); mixup, AdamW. All cores belong to the step, and to `workers` processes that read.

    images_per_s           of training that reads, after the first batches
    step_images_per_s      of the step alone
    loader_images_per_s    of reading alone
    share                  images_per_s over step_images_per_s, of neighbours in time
    attainable_share       the share that the cores allow: processor time of a step over that of a step and of reading,
                           spread over all cores

One process, random weights, turns taken, medians.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ssmclip.config import ModelConfig, TrainConfig, load_recipe
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.train.build import build_accelerator, build_model, build_objective, open_stream, plan
from ssmclip.train.gradient import backward
from ssmclip.train.optimiser import build_optimiser

TASK = "loader"
RECIPE = Path(__file__).parents[1] / "recipes/imagenet_mambaout_tiny.py"
SIDE, CLASSES, IMAGES = 256, 10, 500  # pixels, folders, files
WARM = 2  # batches before the clock starts
READ = 40  # batches of reading alone: far more than workers prepare in advance


@dataclass(frozen=True)
class Case:
    """size: pixels; batches: of one turn."""

    encoder: str
    size: int
    batch: int
    batches: int
    workers: int = 2


CASES = (
    Case("timm:mambaout_tiny", 224, 16, 4),
    Case("vmamba_tiny_s1l8", 224, 16, 4),
    Case("timm:resnet18", 224, 32, 8),
    Case("vmamba_nano", 96, 64, 10),
    Case("vmamba_nano", 96, 64, 10, workers=0),
)


def write_images(root: Path) -> None:
    """Write class folders of JPEGs with about as many bytes as photographs of that size have."""
    draws = np.random.default_rng(0)
    for number in range(IMAGES):
        folder = root / f"class{number % CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse = Image.fromarray(draws.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8))
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(folder / f"{number:04d}.jpg", quality=90)


def config_of(case: Case, source: Path) -> TrainConfig:
    """Return the settings of the published recipe for an encoder, on these files."""
    recipe = load_recipe(RECIPE)
    return replace(
        recipe,
        batch_size=case.batch,
        device="cpu",
        model=ModelConfig(name=case.encoder),
        data=replace(recipe.data, source=str(source), image_sizes=((0.0, case.size),), workers=case.workers),
        loss=replace(recipe.loss, micro_batch=None),
    )


def measure(case: Case, source: Path, repetitions: int) -> Iterator[Result]:
    config = config_of(case, source)
    accelerator, planned = build_accelerator(config), plan(config)
    model = build_model(config, planned)
    optimiser = build_optimiser(model, config.optimiser)
    objective = build_objective(config, num_classes=len(planned.classes))

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        backward(accelerator, model, objective, images, labels, None)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

    def read(use: Callable[[torch.Tensor, torch.Tensor], object], batches: int) -> float:
        stream = open_stream(config, planned, case.size, rank=0, world_size=1)
        for _ in range(WARM):
            use(*pair(next(stream)))
        start = time.perf_counter()
        for _ in range(batches):
            use(*pair(next(stream)))
        took = time.perf_counter() - start
        stream.close()
        return took / batches

    first = open_stream(config, planned, case.size, rank=0, world_size=1)
    kept = pair(next(first))
    first.close()
    step(*kept)  # compiled, and memory taken, before anything is timed
    turns: dict[str, list[float]] = {"step": [], "step_cpu": [], "read": [], "whole": []}
    for _ in range(repetitions):
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(case.batches):
            step(*kept)
        turns["step"].append((time.perf_counter() - start) / case.batches)
        turns["step_cpu"].append((time.process_time() - cpu) / case.batches)
        turns["whole"].append(read(step, case.batches))
        turns["read"].append(read(lambda *_: None, READ))
    images, cores = case.batch, os.cpu_count() or 1
    seconds = {name: statistics.median(taken) for name, taken in turns.items()}
    reading = seconds["read"] * min(max(case.workers, 1), cores)  # processor time, if the workers never wait
    values = {
        "images_per_s": images / seconds["whole"],
        "step_images_per_s": images / seconds["step"],
        "loader_images_per_s": images / seconds["read"],
        "share": statistics.median(s / w for s, w in zip(turns["step"], turns["whole"], strict=True)),
        "attainable_share": seconds["step_cpu"] / (seconds["step_cpu"] + reading),
    }
    where = {"encoder": case.encoder, "image": case.size, "batch": case.batch, "workers": case.workers}
    extra = {"threads": torch.get_num_threads(), "cores": cores, "images": case.batch * case.batches}
    for metric, value in values.items():
        yield Result(case.encoder, TASK, metric, float(value), where=where, n=repetitions, extra=extra)


def pair(batch: object) -> tuple[torch.Tensor, torch.Tensor]:
    return batch.images, batch.texts  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/loader.jsonl"), help="file for the rows")
    parser.add_argument("--repetitions", type=int, default=5, help="turns of each case")
    parser.add_argument("--quick", action="store_true", help="one turn of each case")
    parser.add_argument("--only", default="", help="part of an encoder's name: cases to measure")
    args = parser.parse_args()
    torch.manual_seed(0)
    write_rows(args.out, [], describe_run(seed=0))
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder) / "train")
        for case in (case for case in CASES if args.only in case.encoder):
            for row in measure(case, Path(folder) / "train", 1 if args.quick else args.repetitions):
                append_rows(args.out, [row])
                print(f"{row.condition:60} {row.metric:20} {row.value:.4g}", flush=True)


if __name__ == "__main__":
    main()
