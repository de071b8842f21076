"""Distortions: pictures per second, ours against the published definitions in plain NumPy and SciPy. Writes rows.

    python benchmarks/distortions.py [--out results/distortions.jsonl] [--repetitions 5]

224 x 224 pictures with the spectrum of photographs, one thread, CPU time of the process. Before it is timed, what is
deterministic is compared, bit by bit. `published` is `ssmclip.data.distortions.reference`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from ssmclip.data.distortions.apply import distort
from ssmclip.data.distortions.reference import REFERENCE
from ssmclip.data.distortions.registry import DISTORTIONS, parse_level
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.rows.condition import parse

BATCH = 4
LEVELS = {
    "colour": ["bw"],
    "contrast": ["c10"],
    "high-pass": ["3.0", "0.7"],
    "low-pass": ["3", "10", "40"],
    "phase-scrambling": ["90"],
    "power-equalisation": ["pow"],
    "false-colour": ["False"],
    "rotation": ["90"],
    "eidolonI": ["8-10-10"],
    "eidolonII": ["8-3-10"],
    "eidolonIII": ["8-0-10"],
    "uniform-noise": ["0.2"],
}


def make_pictures(count: int, seed: int = 0) -> np.ndarray:
    """uint8 (count, 224, 224, 3): noise of amplitude 1 / frequency, partly shared by the colours."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(224), np.fft.fftfreq(224))) + 1 / 224
    noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal((count, 3, 224, 224))) / frequency).real
    noise = 0.7 * noise.mean(axis=1, keepdims=True) + 0.3 * noise
    return np.ascontiguousarray(np.clip(128 + 55 * noise / noise.std(), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1))


def seconds(run: Callable, repetitions: int) -> list[float]:
    times = []
    for _ in range(repetitions):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return times


def measure(name: str, label: str, pictures: np.ndarray, tables: dict[str, np.ndarray], repetitions: int):
    """Rows of one distortion at one level."""
    kept = {key: tables[key] for key in DISTORTIONS[name].tables}
    level = parse_level(name, label)

    def ours() -> np.ndarray:
        return distort(pictures, name, level, seed=0, **kept)

    def published(count: int = len(pictures)) -> np.ndarray:
        each = [REFERENCE[name](p, level, np.random.RandomState(i), tables) for i, p in enumerate(pictures[:count])]
        return np.stack(each)

    slow = name.startswith("eidolon")
    if not slow and (ours() != published()).any():
        raise RuntimeError(f"{name} {label} is not what its definition gives")
    ours()
    times = {
        "ssmclip": [t / len(pictures) for t in seconds(ours, repetitions)],
        "published": seconds(lambda: published(1), 2) if slow else [t / BATCH for t in seconds(published, repetitions)],
    }
    medians = {model: statistics.median(values) for model, values in times.items()}
    extra = {"threads": 1, "clock": "cpu", "pixels": 224, "batch": len(pictures)}
    for model, values in times.items():
        more = {**extra, "ms_per_image": 1e3 * medians[model], "fastest_ms": 1e3 * min(values)}
        yield Result(
            model,
            "distortions",
            "images_per_s",
            1 / medians[model],
            where=parse(f"{name} {label}")[0],
            n=len(values),
            extra=more,
        )
    ratio = medians["published"] / medians["ssmclip"]
    yield Result(
        "ssmclip",
        "distortions",
        "speedup",
        ratio,
        where=parse(f"{name} {label}")[0],
        extra={**extra, "over": "published"},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/distortions.jsonl"))
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    pictures = make_pictures(BATCH)
    grey = (pictures / 255.0) @ np.array([0.2125, 0.7154, 0.0721])
    amplitude = np.abs(np.fft.fftshift(np.fft.fft2(grey), axes=(1, 2))).mean(axis=0)
    tables = {"amplitude": amplitude, "gamma": np.linspace(0, 1, 256) ** 2.2}
    write_rows(args.out, [], describe_run(seed=0, threads=1, clock="cpu"))
    for name, labels in LEVELS.items():
        for label in labels:
            with threadpool_limits(1):
                rows = list(measure(name, label, pictures, tables, args.repetitions))
            append_rows(args.out, rows)
            for row in rows:
                print(f"{row.condition:28} {row.model:10} {row.metric:14} {row.value:10.4g}", flush=True)


if __name__ == "__main__":
    main()
