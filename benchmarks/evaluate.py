"""Evaluation against the image encoder alone, and prompts as long as they are against prompts filled up to 77 tokens.

    python benchmarks/evaluate.py --out results/evaluate.jsonl        seven minutes on two idle cores; --quick: one
    python benchmarks/evaluate.py --only encoder=CLIP-VMamba-Nano     the conditions that hold all these

Images: `encoder_share` is the images a second of an evaluation (files opened, decoded, brought to size by `workers`
processes, embedded) over those of its encoder on tensors that lie in memory. Why it is what it is, in processor time,
which other load on the machine disturbs little, for one image:

    encode_ms           the encoder's, alone
    decode_ms           the workers'
    main_ms             the evaluating process's with an encoder that only reads its input: loading, apart from encoding
    encoder_cpu_share   encode_ms over all the evaluating process spends: below encode_ms / (encode_ms + main_ms) by
                        what the workers take from the encoder's caches and memory
    attainable_share    the encoder_share that these cores allow: the evaluation needs the time of its slowest part, and
                        of all processor time spread over all cores

A small encoder has one thread, so that on two cores there is one left for the workers; a large one has all cores, as it
has by default. The pictures are smooth noise, written into a temporary folder: JPEGs of 256 pixels in CLIP_benchmark's
shards, and CIFAR-10's pickle.

Texts: the processor time of one prompt, all 77 positions, cut to the longest of a batch in the order given, and cut in
batches of like length. `speedup` is over all 77.

One process, random weights, turns taken, medians.
"""

from __future__ import annotations

import argparse
import io
import os
import pickle
import resource
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import IMAGENET_CLASSNAMES, OPENAI_IMAGENET_TEMPLATES
from PIL import Image

import ssmclip
from ssmclip.data.testsets.open import open_dataset
from ssmclip.evaluate.embeddings.embed import (
    Model,
    Settings,
    embed_images,
    embed_texts,
    encode_batch,
    encode_tokens,
    inference,
)
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.rows.condition import parse

TASK = "evaluate"
WORKERS = 2
BATCH = 64
SIDE = 256  # pixels of a JPEG
PICTURES = 512  # different ones: their files fit into memory, their tensors into no cache
POOL = 1024  # images of a turn of the encoder alone
TEXT_TOWER, PROMPTS = "CLIP-VMamba-T220", 240


@dataclass(frozen=True)
class Case:
    """images: of an evaluation; threads: of the encoder."""

    encoder: str
    source: str
    images: int
    threads: int


CASES = (
    Case("CLIP-VMamba-Nano", "jpeg", 10_000, 1),
    Case("CLIP-VMamba-Nano", "cifar", 2048, 1),
    Case("CLIP-VMamba-T220", "jpeg", 192, os.cpu_count() or 1),
)


class Reads(torch.nn.Module):
    """An encoder that costs what reading its input costs."""

    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        return images.amax((2, 3)) * self.one


def write_jpegs(root: Path, count: int) -> None:
    """CLIP_benchmark's webdataset form of CIFAR-10, with JPEGs."""
    (root / "test").mkdir(parents=True)
    with tarfile.open(root / "test/0.tar", "w") as tar:
        contents = [jpeg(seed) for seed in range(min(count, PICTURES))]
        for number in range(count):
            for suffix, content in (("jpg", contents[number % PICTURES]), ("cls", str(number % 10).encode())):
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


def images(case: Case, repetitions: int) -> Iterator[Result]:
    """Rows of one encoder on one form of test set."""
    torch.set_num_threads(case.threads)
    clip = Model(*ssmclip.load(case.encoder), case.encoder)
    reading = replace(clip, model=Reads())
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[case.source](Path(folder), case.images)
        dataset = open_dataset("cifar10", folder)
        pool = torch.stack([clip.preprocess(dataset[i][0]) for i in range(min(POOL, case.images))])
        settings = Settings(BATCH, WORKERS)

        def alone() -> None:
            with inference(clip.network):
                for batch in pool.split(BATCH):
                    encode_batch(clip, batch)

        ways = {
            "alone": (alone, len(pool)),
            "whole": (lambda: embed_images(clip, dataset, settings), case.images),
            "reading": (lambda: embed_images(reading, dataset, settings), case.images),
        }
        with inference(clip.network):
            encode_batch(clip, pool[:BATCH])  # compiled, and memory taken, before anything is timed
        taken: dict[str, list[np.ndarray]] = {name: [] for name in ways}
        for _ in range(repetitions):
            for name, (way, count) in ways.items():
                taken[name].append(1e3 * np.array(timed(way)) / count)
    ms = {name: np.median(turns, axis=0) for name, turns in taken.items()}  # of the clock, this process, the workers
    encode, decode = ms["alone"][1], ms["whole"][2]
    parts = (encode / case.threads, decode / WORKERS, (encode + decode) / (os.cpu_count() or 1))
    pairs = list(zip(taken["alone"], taken["whole"], strict=True))  # neighbours in time
    values = {
        "images_per_s": 1e3 / ms["whole"][0],
        "encoder_images_per_s": 1e3 / ms["alone"][0],
        "encoder_share": statistics.median(alone[0] / whole[0] for alone, whole in pairs),
        "encode_ms": encode,
        "decode_ms": decode,
        "main_ms": ms["reading"][1],
        "encoder_cpu_share": statistics.median(alone[1] / whole[1] for alone, whole in pairs),
        "attainable_share": parts[0] / max(parts),
    }
    condition = f"encoder={case.encoder},source={case.source},workers={WORKERS},threads={case.threads}"
    extra = {"threads": case.threads, "cores": os.cpu_count(), "images": case.images, "batch": BATCH}
    for metric, value in values.items():
        yield Result(case.encoder, TASK, metric, float(value), where=parse(condition)[0], n=repetitions, extra=extra)


def timed(function: Callable[[], object]) -> tuple[float, float, float]:
    """Seconds: of the clock, of this process, of the workers it started and that have ended."""
    workers, own, start = workers_seconds(), time.process_time(), time.perf_counter()
    function()
    return time.perf_counter() - start, time.process_time() - own, workers_seconds() - workers


def workers_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def texts(repetitions: int, count: int) -> Iterator[Result]:
    """Rows of one text tower: ImageNet's prompts, class by class, as zero-shot asks them."""
    torch.set_num_threads(1)
    clip = Model(*ssmclip.load(TEXT_TOWER), TEXT_TOWER)
    classes = max(1, count // len(OPENAI_IMAGENET_TEMPLATES))
    names = IMAGENET_CLASSNAMES[:: -(-len(IMAGENET_CLASSNAMES) // classes)]
    prompts = [template(name) for name in names for template in OPENAI_IMAGENET_TEMPLATES]
    batches = [clip.tokenizer(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]

    def encoded(encode: Callable[[Any], torch.Tensor]) -> torch.Tensor:
        with inference(clip.network):
            return torch.nn.functional.normalize(torch.cat([encode(tokens) for tokens in batches]), dim=-1)

    ways = {
        "filled": lambda: encoded(clip.network.encode_text),
        "unsorted": lambda: encoded(lambda tokens: encode_tokens(clip.network, tokens)),
        "sorted": lambda: embed_texts(clip, prompts, Settings(BATCH)),
    }
    with inference(clip.network):
        clip.network.encode_text(batches[0])  # memory taken before anything is timed
    taken: dict[str, list[float]] = {name: [] for name in ways}
    made = {}
    for _ in range(repetitions):
        for name, way in ways.items():
            start = time.process_time()
            made[name] = way()
            taken[name].append((time.process_time() - start) / len(prompts))
    for name in ways:
        difference = float((made[name] - made["filled"]).abs().max())
        if difference > 1e-5:
            raise RuntimeError(f"{name} prompts have other features than filled ones: they differ by {difference:.1e}")
        seconds = statistics.median(taken[name])
        extra = {"threads": torch.get_num_threads(), "clock": "cpu", "prompts": len(prompts), "batch": BATCH}
        condition = f"text_tower={TEXT_TOWER},prompts={name}"
        yield Result(
            TEXT_TOWER, TASK, "prompt_ms", 1e3 * seconds, where=parse(condition)[0], n=repetitions, extra=extra
        )
        speedup = statistics.median(filled / own for filled, own in zip(taken["filled"], taken[name], strict=True))
        yield Result(
            TEXT_TOWER,
            TASK,
            "speedup",
            speedup,
            where=parse(condition)[0],
            n=repetitions,
            extra={**extra, "over": "filled"},
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/evaluate.jsonl"))
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a quarter of the images and prompts, once")
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="KEY=VALUE", help="of a condition, such as source=jpeg"
    )
    args = parser.parse_args()
    torch.manual_seed(0)
    part, repetitions = (4, 1) if args.quick else (1, args.repetitions)
    write_rows(args.out, [], describe_run(seed=0))
    measured = {f"text_tower={TEXT_TOWER}": lambda: texts(repetitions, PROMPTS // part)}
    for case in CASES:
        few = replace(case, images=max(BATCH, case.images // part))
        measured[f"encoder={case.encoder},source={case.source}"] = partial(images, few, repetitions)
    for condition, rows in measured.items():
        if set(args.only) <= set(condition.split(",")):
            for row in rows():
                append_rows(args.out, [row])
                print(f"{row.condition:70} {row.metric:22} {row.value:.5g}", flush=True)


if __name__ == "__main__":
    main()
