"""Evaluation against the image encoder alone, and prompts as long as they are against prompts filled up to 77 tokens.

    python benchmarks/evaluate.py --out results/evaluate.jsonl        15 minutes on two idle cores; --quick: two
    python benchmarks/evaluate.py --only encoder=CLIP-VMamba-Nano     the conditions that hold all these

Images: `encoder_share` is the images a second of an evaluation (files opened, decoded, brought to size by `workers`
processes, embedded) over those of its encoder on tensors that lie in memory; `decode_ms` and `encode_ms` are the two
sides' own processor time for one image, which other load on the machine disturbs little. `balance` is encode_ms over
decode_ms, times the workers: above 1 the encoder is what an evaluation waits for, given a core for each process.
The pictures are smooth noise, written into a temporary folder: JPEGs of 256 pixels in CLIP_benchmark's shards, and
CIFAR-10's pickle. The encoder has one thread, so that on two cores there is one left for the workers.

Texts: the processor time of one prompt, all 77 positions, cut to the longest of a batch in the order given, and cut in
batches of like length. `speedup` is over all 77.

One process, random weights, turns taken, medians.
"""

from __future__ import annotations

import argparse
import io
import pickle
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image

import ssmclip
from ssmclip.data.sources import open_dataset
from ssmclip.evaluate.embed import Clip, Settings, embed_images, embed_texts, encode_batch, encode_tokens, inference
from ssmclip.results import Result, append_rows, describe_run, write_rows

TASK = "evaluate"
WORKERS = 2
BATCH = 64
SIDE = 256  # pixels of a JPEG
ENCODERS = {"CLIP-VMamba-Nano": 2048, "CLIP-VMamba-T220": 192}  # images of a turn: some seconds' work
SOURCES = ("jpeg", "cifar")
TEXT_TOWER, PROMPTS = "CLIP-VMamba-T220", 640


def write_jpegs(root: Path, count: int) -> None:
    """CLIP_benchmark's webdataset form of CIFAR-10, with JPEGs."""
    (root / "test").mkdir(parents=True)
    with tarfile.open(root / "test/0.tar", "w") as tar:
        for number in range(count):
            for suffix, content in (("jpg", jpeg(number)), ("cls", str(number % 10).encode())):
                member = tarfile.TarInfo(f"s{number:05d}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def jpeg(seed: int) -> bytes:
    """About as many bytes as a photograph of that size has."""
    draws = np.random.default_rng(seed)
    coarse = Image.fromarray(draws.integers(0, 256, (SIDE // 8, SIDE // 8, 3), dtype=np.uint8))
    out = io.BytesIO()
    coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return out.getvalue()


def write_cifar(root: Path, count: int) -> None:
    """The original's pickle."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (count, 3072), dtype=np.uint8)
    (folder / "test_batch").write_bytes(pickle.dumps({"data": pixels, "labels": [n % 10 for n in range(count)]}))


WRITERS = {"jpeg": write_jpegs, "cifar": write_cifar}


def images(encoder: str, source: str, count: int, repetitions: int) -> Iterator[Result]:
    """Rows of one encoder on one form of test set."""
    clip = Clip(*ssmclip.load(encoder), encoder)
    condition = f"encoder={encoder},source={source},workers={WORKERS}"
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[source](Path(folder), count)
        dataset = open_dataset("cifar10", folder)
        batches = torch.stack([clip.preprocess(dataset[i][0]) for i in range(BATCH)]).repeat(count // BATCH, 1, 1, 1)
        settings = Settings(BATCH, WORKERS)

        def alone() -> None:
            with inference(clip.model):
                for batch in batches.split(BATCH):
                    encode_batch(clip, batch)

        def whole() -> None:
            embed_images(clip, dataset, settings)

        alone()  # compiled, and memory taken, before anything is timed
        taken: dict[str, list[tuple[float, float, float]]] = {"alone": [], "whole": []}
        for _ in range(repetitions):
            for name, function in (("alone", alone), ("whole", whole)):
                taken[name].append(timed(function))
    wall = {name: statistics.median(t[0] for t in turns) for name, turns in taken.items()}
    encode_ms = 1e3 * statistics.median(t[1] for t in taken["alone"]) / count
    decode_ms = 1e3 * statistics.median(t[2] for t in taken["whole"]) / count
    values = {
        "images_per_s": count / wall["whole"],
        "encoder_images_per_s": count / wall["alone"],
        "encoder_share": statistics.median(
            a[0] / w[0]
            for a, w in zip(taken["alone"], taken["whole"], strict=True)  # neighbours in time
        ),
        "encode_ms": encode_ms,
        "decode_ms": decode_ms,
        "balance": WORKERS * encode_ms / decode_ms,
    }
    extra = {"threads": torch.get_num_threads(), "images": count, "batch": BATCH}
    for metric, value in values.items():
        yield Result(encoder, TASK, condition, metric, value, n=repetitions, extra=extra)


def timed(function: Callable[[], None]) -> tuple[float, float, float]:
    """Seconds: of the clock, of this process, of the workers it started and that have ended."""
    workers, own, start = workers_seconds(), time.process_time(), time.perf_counter()
    function()
    return time.perf_counter() - start, time.process_time() - own, workers_seconds() - workers


def workers_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def texts(repetitions: int, count: int) -> Iterator[Result]:
    """Rows of one text tower: ImageNet's prompts, class by class, as zero-shot asks them."""
    clip = Clip(*ssmclip.load(TEXT_TOWER), TEXT_TOWER)
    names = IMAGENET_CLASSNAMES[:: len(IMAGENET_CLASSNAMES) * len(OPENAI_IMAGENET_TEMPLATES) // count]
    prompts = [template(name) for name in names for template in OPENAI_IMAGENET_TEMPLATES]
    batches = [clip.tokenizer(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]

    def encoded(encode: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        with inference(clip.model):
            return torch.nn.functional.normalize(torch.cat([encode(tokens) for tokens in batches]), dim=-1)

    ways = {
        "filled": lambda: encoded(clip.model.encode_text),
        "unsorted": lambda: encoded(lambda tokens: encode_tokens(clip.model, tokens)),
        "sorted": lambda: embed_texts(clip, prompts, Settings(BATCH)),
    }
    taken: dict[str, list[float]] = {name: [] for name in ways}
    made = {}
    for turn in range(repetitions + 1):
        for name, way in ways.items():
            start = time.process_time()
            made[name] = way()
            if turn:  # the first warms up
                taken[name].append((time.process_time() - start) / len(prompts))
    for name in ways:
        difference = float((made[name] - made["filled"]).abs().max())
        if difference > 1e-5:
            raise RuntimeError(f"{name} prompts have other features than filled ones: they differ by {difference:.1e}")
        seconds = statistics.median(taken[name])
        extra = {"threads": torch.get_num_threads(), "clock": "cpu", "prompts": len(prompts), "batch": BATCH}
        condition = f"text_tower={TEXT_TOWER},prompts={name}"
        yield Result(TEXT_TOWER, TASK, condition, "prompt_ms", 1e3 * seconds, n=repetitions, extra=extra)
        speedup = statistics.median(filled / own for filled, own in zip(taken["filled"], taken[name], strict=True))
        yield Result(TEXT_TOWER, TASK, condition, "speedup", speedup, n=repetitions, extra={**extra, "over": "filled"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/evaluate.jsonl"))
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a quarter of the images and prompts, three repetitions")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KEY=VALUE", help="of a condition, such as source=jpeg"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    part, repetitions = (4, min(3, args.repetitions)) if args.quick else (1, args.repetitions)
    write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads()))
    measured = {f"text_tower={TEXT_TOWER}": lambda: texts(repetitions, PROMPTS // part)}
    for encoder, count in ENCODERS.items():
        few = max(BATCH, count // part // BATCH * BATCH)
        for source in SOURCES:
            measured[f"encoder={encoder},source={source}"] = partial(images, encoder, source, few, repetitions)
    for condition, rows in measured.items():
        if set(args.only) <= set(condition.split(",")):
            for row in rows():
                append_rows(args.out, [row])
                print(f"{row.condition:64} {row.metric:22} {row.value:.5g}", flush=True)


if __name__ == "__main__":
    main()
