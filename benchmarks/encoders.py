"""Whole image encoders on a CPU, ours and timm's, forward, at 224 px; and a training step of the two Nano CLIPs.

    python benchmarks/encoders.py --out results/encoders.jsonl    ten minutes on two idle cores; --quick: one;
                                                                  --only names the encoders, "training" the step
    python benchmarks/encoders.py --precision bfloat16            the same in bfloat16, each also beside float32
    OMP_NUM_THREADS=1 python benchmarks/encoders.py --only training --out results/training_step.jsonl    three minutes

One process, random weights, the same images for all, turns taken, medians. `time_ratio` is the time of an encoder over
that of the control of its size in `CONTROLS`, the median over turns taken one right after the other; `cpu_time_ratio`
is the same of the processor's time in all threads, which a busy machine disturbs less. In bfloat16 `speedup` is the
time in float32 over that in bfloat16, and `smallest_cosine` that of embeddings in the two. The training step is that of
recipes/flickr8k.py (images, gradient, AdamW, moving average; no reading of pictures), and its `speed_ratio` the images
a second over CLIP-ViT-Nano's: in a fresh process that keeps the memory it frees, as `ssmclip train` does, and in one
left alone, which gives it back. How time grows with the size of images: `ssmclip analyze efficiency --sizes`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import runpy
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import timm
import torch
from torch.nn.functional import cosine_similarity
from tqdm import tqdm

import ssmclip.models  # noqa: F401  registers ours with timm
from ssmclip.models.precision import convert
from ssmclip.ops.memory import keep_freed_memory
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.rows.condition import parse
from ssmclip.rows.precision import BFLOAT16, FLOAT32, marked
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_accelerator, build_model
from ssmclip.train.ema import Ema
from ssmclip.train.gradient import backward
from ssmclip.train.objective import OBJECTIVES
from ssmclip.train.optimiser import build_optimiser

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
    "simba_large": "vit_base_patch16_224",
    "mambaout_tiny": "swin_tiny_patch4_window7_224",
    "convnext_tiny": "swin_tiny_patch4_window7_224",
    "vit_base_patch16_224": "swin_base_patch4_window7_224",
    "swin_tiny_patch4_window7_224": "",
    "swin_small_patch4_window7_224": "",
    "swin_base_patch4_window7_224": "",
}
TRAINED = {"CLIP-VMamba-Nano": "CLIP-ViT-Nano", "CLIP-ViT-Nano": ""}
QUICK = ("vmamba_tiny_s1l8", "swin_tiny_patch4_window7_224")

Seconds = tuple[float, float]  # on the clock, and of the processor


def seconds_of(run: Callable[[], object]) -> Seconds:
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - processor


def take_turns(runs: dict[str, Callable[[], object]], repetitions: int, what: str) -> dict[str, list[Seconds]]:
    """The times of every run, which are made once before and then in turns."""
    for run in tqdm(runs.values(), desc=f"{what}, warming up", leave=False):
        run()
    times = {name: [] for name in runs}
    for _ in tqdm(range(repetitions), desc=what, leave=False):
        for name, run in runs.items():
            times[name].append(seconds_of(run))
    return times


def ratios(mine: list[Seconds], control: list[Seconds]) -> Seconds:
    """Median ratios of the turns."""
    return tuple(statistics.median(a[i] / b[i] for a, b in zip(mine, control, strict=True)) for i in (0, 1))


def speed(name: str, task: str, condition: str, batch: int, times: list[Seconds], extra: dict) -> Result:
    clock = [seconds for seconds, _ in times]
    extra = {**extra, "fastest": batch / min(clock), "slowest": batch / max(clock)}
    extra["cpu_s"] = statistics.median(processor for _, processor in times)
    return Result(
        name,
        task,
        "images_per_s",
        batch / statistics.median(clock),
        where=parse(condition)[0],
        n=len(times),
        extra=extra,
    )


@torch.inference_mode()
def measure_forward(names: Iterable[str], batch: int, repetitions: int, precision: str = FLOAT32) -> Iterator[Result]:
    """Rows of these encoders at one batch size."""
    images = images_of(batch).to(getattr(torch, precision))
    models = {name: convert(timm.create_model(name, num_classes=0).eval(), precision) for name in names}
    times = take_turns({n: lambda m=m: m(images) for n, m in models.items()}, repetitions, f"batch {batch}")
    condition = f"pixels={PIXELS},batch={batch},pass=forward"
    threads = {"threads": torch.get_num_threads()}
    for name, each in times.items():
        yield speed(name, "encoder", condition, batch, each, threads)
        if (control := CONTROLS[name]) in times:
            clock, processor = ratios(each, times[control])
            extra = {**threads, "over": control}
            yield Result(name, "encoder", "time_ratio", clock, where=parse(condition)[0], n=len(each), extra=extra)
            yield Result(
                name, "encoder", "cpu_time_ratio", processor, where=parse(condition)[0], n=len(each), extra=extra
            )


@torch.inference_mode()
def measure_speedup(name: str, batch: int, repetitions: int, precision: str) -> list[Result]:
    """Rows of an encoder beside itself in float32."""
    torch.manual_seed(0)
    full = timm.create_model(name, num_classes=0).eval()
    half = convert(deepcopy(full), precision)
    images, rounded = images_of(batch), images_of(batch).to(getattr(torch, precision))
    times = take_turns({"full": lambda: full(images), "half": lambda: half(rounded)}, repetitions, name)
    cosine = cosine_similarity(full(images), half(rounded).float()).min().item()
    where = parse(f"pixels={PIXELS},batch={batch},pass=forward")[0]
    extra = {"threads": torch.get_num_threads(), "over": FLOAT32}
    found = {"speedup": ratios(times["full"], times["half"])[0], "smallest_cosine": cosine}
    return [
        Result(name, "encoder", metric, value, where=where, n=repetitions, extra=extra)
        for metric, value in found.items()
    ]


def images_of(batch: int) -> torch.Tensor:
    return torch.randn(batch, 3, PIXELS, PIXELS, generator=torch.Generator().manual_seed(0))


def measure_training(repetitions: int) -> Iterator[Result]:
    """Rows of the training step of the two Nano CLIPs, memory kept and given back."""
    for keep in (True, False):
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as fresh:
            yield from fresh.submit(training_rows, repetitions, keep).result()


def training_rows(repetitions: int, keep: bool) -> list[Result]:
    """In a process that is this measurement's alone: what it keeps, it keeps for good."""
    kept = keep and keep_freed_memory()
    torch.manual_seed(0)
    recipe = Path(__file__).resolve().parents[1] / "recipes" / "flickr8k.py"
    config = runpy.run_path(str(recipe))["flickr8k"]()
    batch, captions, pixels = config.batch_size, config.data.captions_per_image, config.image_size(0)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, 3, pixels, pixels, generator=generator)
    words = config.model.changes["text_cfg"]["context_length"]
    texts = torch.randint(1, 49_000, (batch * captions, words), generator=generator)
    texts[:, words // 2 :] = 0
    runs = {name: training_step(replace(config.model, name=name), config, images, texts) for name in TRAINED}
    times = take_turns(runs, repetitions, "training")
    condition = f"pixels={pixels},batch={batch},pass=training,memory={'kept' if kept else 'given back'}"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of both models; Linux counts in KiB
    extra = {"threads": torch.get_num_threads(), "peak_gib": peak}
    rows = []
    for name, each in times.items():
        rows.append(speed(name, "training_step", condition, batch, each, extra))
        if control := TRAINED[name]:
            clock, processor = (1 / ratio for ratio in ratios(each, times[control]))
            over = {**extra, "over": control}
            rows.append(
                Result(name, "training_step", "speed_ratio", clock, where=parse(condition)[0], n=len(each), extra=over)
            )
            rows.append(
                Result(
                    name,
                    "training_step",
                    "cpu_speed_ratio",
                    processor,
                    where=parse(condition)[0],
                    n=len(each),
                    extra=over,
                )
            )
    return rows


def training_step(model_of, config, images, texts) -> Callable[[], None]:
    """One step, as the loop takes it, of the recipe with this model."""
    config = replace(config, model=model_of)
    accelerator = build_accelerator(config)
    model = build_model(config, blueprint(config))
    optimiser, average = build_optimiser(model, config.optimiser), Ema(model)
    loss = OBJECTIVES[config.loss.kind](captions=config.data.captions_per_image)

    def step() -> None:
        backward(accelerator, model, loss, images, texts, None)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        average.update(model, config.ema.decay)

    return step


def main(arguments: Iterable[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/encoders.jsonl"))
    parser.add_argument("--quick", action="store_true", help="VMamba-T beside Swin-T, three repetitions")
    parser.add_argument("--only", default="", help="names, separated by commas, instead of all; controls as well")
    parser.add_argument(
        "--precision", choices=(FLOAT32, BFLOAT16), default=FLOAT32, help="arithmetic of the encoders; not of training"
    )
    args = parser.parse_args(arguments)
    repetitions = 3 if args.quick else REPETITIONS
    names = args.only.split(",") if args.only else QUICK if args.quick else (*CONTROLS, "training")
    if unknown := set(names) - {*CONTROLS, "training"}:
        parser.error(f"unknown: {', '.join(sorted(unknown))}. There are {', '.join(CONTROLS)} and training")
    torch.manual_seed(0)
    write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads()))

    def keep(rows: Iterable[Result]) -> None:
        for row in marked(rows, args.precision):
            append_rows(args.out, [row])
            tqdm.write(f"{row.condition:52} {row.model:30} {row.metric:15} {row.value:.4g} {row.extra.get('over', '')}")

    if "training" in names and args.precision == FLOAT32:
        keep(measure_training(repetitions))
    if encoders := [name for name in CONTROLS if name in names]:
        for batch in BATCHES:
            keep(measure_forward(encoders, batch, repetitions, args.precision))
            for name in encoders if args.precision != FLOAT32 else ():
                keep(measure_speedup(name, batch, repetitions, args.precision))


if __name__ == "__main__":
    main()
