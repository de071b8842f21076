"""Whole image encoders on a CPU: images a second of ours and of timm's, forward, at 224 px.

    python benchmarks/encoders.py --out results/encoders.jsonl    ten minutes on two idle cores; --quick: one

One process, random weights, the same images for all, turns taken, medians. `time_ratio` is the time of an encoder over
that of the control of its size in `CONTROLS`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn
from tqdm import tqdm

import ssmclip.models  # noqa: F401  registers ours with timm
from ssmclip.results import Result, append_rows, describe_run, write_rows

PIXELS = 224
BATCHES = (1, 8)
REPETITIONS = 7

# name in timm: the control it is compared with, "" for none
CONTROLS = {
    "vmamba_tiny_s1l8": "swin_tiny_patch4_window7_224",
    "vmamba_tiny_s2l5": "swin_tiny_patch4_window7_224",
    "vmamba_tiny_gated": "swin_tiny_patch4_window7_224",
    "vmamba_tiny_v0": "swin_tiny_patch4_window7_224",
    "vmamba_small_s1l20": "swin_small_patch4_window7_224",
    "vmamba_small_s2l15": "swin_small_patch4_window7_224",
    "vmamba_small_v0": "swin_small_patch4_window7_224",
    "vmamba_base_s1l20": "swin_base_patch4_window7_224",
    "vmamba_base_s2l15": "swin_base_patch4_window7_224",
    "vmamba_base_v0": "swin_base_patch4_window7_224",
    "simba_large": "swin_small_patch4_window7_224",
    "mambaout_tiny": "swin_tiny_patch4_window7_224",
    "convnext_tiny": "swin_tiny_patch4_window7_224",
    "vit_base_patch16_224": "swin_base_patch4_window7_224",
    "swin_tiny_patch4_window7_224": "",
    "swin_small_patch4_window7_224": "",
    "swin_base_patch4_window7_224": "",
}
QUICK = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224")


def seconds_of(model: nn.Module, images: Tensor) -> float:
    with torch.inference_mode():
        start = time.perf_counter()
        model(images)
        return time.perf_counter() - start


def measure(models: dict[str, nn.Module], batch: int, repetitions: int) -> Iterator[Result]:
    """Rows of all models at one batch size."""
    images = torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))
    for model in tqdm(models.values(), desc=f"batch {batch}, warming up", leave=False):
        seconds_of(model, images)
    times = {name: [] for name in models}
    for _ in tqdm(range(repetitions), desc=f"batch {batch}", leave=False):
        for name, model in models.items():
            times[name].append(seconds_of(model, images))
    medians = {name: statistics.median(each) for name, each in times.items()}
    threads = {"threads": torch.get_num_threads()}
    condition = f"pixels={PIXELS},batch={batch},pass=forward"
    for name, seconds in medians.items():
        extra = {**threads, "fastest": batch / min(times[name]), "slowest": batch / max(times[name])}
        yield Result(name, "encoder", condition, "images_per_s", batch / seconds, n=repetitions, extra=extra)
        if control := CONTROLS[name]:
            ratio = seconds / medians[control]
            yield Result(name, "encoder", condition, "time_ratio", ratio, extra={**threads, "over": control})


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/encoders.jsonl"))
    parser.add_argument("--quick", action="store_true", help="VMamba-T beside Swin-T, three repetitions")
    args = parser.parse_args(arguments)
    names, repetitions = (QUICK, 3) if args.quick else (tuple(CONTROLS), REPETITIONS)
    torch.manual_seed(0)
    models = {name: timm.create_model(name, num_classes=0).eval() for name in tqdm(names, desc="building", leave=False)}
    write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads()))
    for batch in BATCHES:
        for row in measure(models, batch, repetitions):
            append_rows(args.out, [row])
            tqdm.write(f"{row.condition:32} {row.model:30} {row.metric:13} {row.value:.4g} {row.extra.get('over', '')}")


if __name__ == "__main__":
    main()
