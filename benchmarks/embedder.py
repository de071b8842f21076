"""The embedder: pictures a second against the bare encoder on the same tensors, texts in order of length against not.

    python benchmarks/embedder.py --out results/embedder.jsonl    three minutes on two idle cores; --quick: half of one

One process, random weights, turns taken, medians, seconds of the CPU and of the clock. `time_ratio` of images: the
embedder's over the bare encoder's batches of the same size, for pictures of one shape and for three shapes mixed; of
texts: sorted by length over unsorted, by a tower whose cost depends on the length (CLIP's own pads all to 77).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ssmclip import Embedder
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.rows.condition import parse

TASK = "embedder"
IMAGES, TEXTS = "CLIP-VMamba-Nano", "CLIMP-Nano"
BATCH = 32
SHAPES = {"one shape": [(96, 96)], "three shapes": [(96, 96), (96, 128), (128, 96)]}
WORDS = "a dog runs along the beach with a red ball in its mouth while two people watch from far away".split()


def turns(runs: dict[str, Callable[[], object]], repetitions: int) -> dict[str, dict[str, float]]:
    """Median seconds of each by the clock and of the CPU, after a run that is not counted."""
    times = {name: [] for name in runs}
    for turn in range(repetitions + 1):
        for name, run in runs.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run()
            if turn:
                times[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    return {
        name: {"clock": statistics.median(c for c, _ in each), "cpu": statistics.median(c for _, c in each)}
        for name, each in times.items()
    }


def rows_of(
    took: dict[str, dict[str, float]], over: str, model: str, condition: str, metric: str, count: int, repetitions: int
) -> Iterator[Result]:
    threads = {"threads": torch.get_num_threads()}
    for name, seconds in took.items():
        extra = {**threads, "cpu_s": seconds["cpu"]}
        yield Result(
            name, TASK, metric, count / seconds["clock"], where=parse(condition)[0], n=repetitions, extra=extra
        )
    for name, seconds in took.items():
        if name != over:
            ratios = {"by_the_clock": seconds["clock"] / took[over]["clock"], "over": over, "of": model, **threads}
            ratio = seconds["cpu"] / took[over]["cpu"]
            yield Result(name, TASK, "time_ratio", ratio, where=parse(condition)[0], n=repetitions, extra=ratios)


@torch.no_grad()
def bare(model: torch.nn.Module, batches: list[Tensor]) -> list[Tensor]:
    return [model.encode_image(batch) for batch in batches]


def measure_images(repetitions: int, count: int) -> Iterator[Result]:
    embedder = Embedder(IMAGES, batch_size=BATCH)
    for name, shapes in SHAPES.items():
        generator = torch.Generator().manual_seed(0)
        images = [torch.randn(3, *shapes[i % len(shapes)], generator=generator) for i in range(count)]
        by_shape = [[x for x in images if tuple(x.shape[1:]) == shape] for shape in shapes]
        batches = [torch.stack(group[i : i + BATCH]) for group in by_shape for i in range(0, len(group), BATCH)]
        runs = {
            "Embedder": lambda images=images: embedder.encode_images(images),
            "bare encoder": lambda batches=batches: bare(embedder.clip.network, batches),
        }
        took = turns(runs, repetitions)
        yield from rows_of(took, "bare encoder", IMAGES, f"images, {name}", "images_per_s", count, repetitions)


@torch.no_grad()
def unsorted(embedder: Embedder, texts: list[str]) -> list[Tensor]:
    clip = embedder.clip
    return [clip.network.encode_text(clip.tokenizer(texts[i : i + BATCH])) for i in range(0, len(texts), BATCH)]


def measure_texts(repetitions: int, count: int) -> Iterator[Result]:
    embedder = Embedder(TEXTS, batch_size=BATCH)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(2, 3 * len(WORDS), (count,), generator=generator).tolist()
    texts = [f"{i} " + " ".join((WORDS * 3)[:length]) for i, length in enumerate(lengths)]
    runs = {
        "Embedder, sorted by length": lambda: embedder.encode_texts(texts),
        "unsorted": lambda: unsorted(embedder, texts),
    }
    yield from rows_of(
        turns(runs, repetitions), "unsorted", TEXTS, "texts of 2 to 57 words", "texts_per_s", count, repetitions
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/embedder.jsonl"))
    parser.add_argument("--quick", action="store_true", help="fewer inputs, three repetitions")
    args = parser.parse_args()
    repetitions, count = (3, 4 * BATCH) if args.quick else (7, 16 * BATCH)
    torch.manual_seed(0)
    write_rows(args.out, [], describe_run(0, threads=torch.get_num_threads(), batch_size=BATCH))
    for measure in tqdm((measure_images, measure_texts), desc="kinds"):
        for row in measure(repetitions, count):
            append_rows(args.out, [row])
            tqdm.write(f"{row.model:28} {row.condition:26} {row.metric:14} {row.value:.4g}")


if __name__ == "__main__":
    main()
