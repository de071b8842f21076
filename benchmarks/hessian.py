"""What a Hessian-vector product costs, in gradients.

    python benchmarks/hessian.py --out results/hessian_cost.jsonl       three minutes

CPU seconds of one process with one thread, at random weights: gradient, product and all in turns, medians over the
rounds. `graph` is the gradient whose graph is kept: once per batch. `product` is one Hessian-vector product on it.
`scan` is the part of a product that the selective scan's second derivative takes, in `chunked`.
`product_per_gradient` is the median of the rounds' ratios, with their quartiles.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median, quantiles

import torch

import ssmclip
from ssmclip.analyze.curvature.product import Hessian, call
from ssmclip.rows import Result, describe_run, write_rows
from ssmclip.rows.condition import parse
from ssmclip.train.objective import contrastive_loss

TASK = "hessian_cost"
MODELS = ("CLIP-VMamba-Nano", "CLIP-ViT-Nano")
SCANS = ("ssmclip.ops.selective_scan.cpu", "ssmclip.ops.cross_scan.cpu")


def batch_of(context: int, size: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise: images (pairs, 3, size, size), texts (pairs, context) with the end token last."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 49000, (pairs, context), generator=generator)
    texts[:, -1] = 49407
    return torch.randn(pairs, 3, size, size, generator=generator), texts


def cpu_seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


class Stopwatch:
    """Adds up the CPU seconds spent in a function, which it replaces in the modules that have it."""

    def __init__(self, modules: tuple[str, ...], name: str):
        self.seconds = 0.0
        for module in map(importlib.import_module, modules):
            setattr(module, name, self._around(getattr(module, name)))

    def _around(self, function: Callable) -> Callable:
        def timed(*args):
            start = time.process_time()
            try:
                return function(*args)
            finally:
                self.seconds += time.process_time() - start

        return timed


def measure(name: str, size: int, pairs: int, rounds: int, scan: Stopwatch) -> list[Result]:
    torch.manual_seed(0)
    config = ssmclip.clip_config(name, image_size=size)
    model = ssmclip.create_clip(config).eval()
    images, texts = batch_of(config["model_cfg"]["text_cfg"]["context_length"], size, pairs)
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        return contrastive_loss(model, images, texts)

    hessian = Hessian(loss, model)
    vector = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0))
    hessian(vector)  # the first is compared with differences of the gradient
    ways = {
        "gradient": lambda: torch.autograd.grad(call(loss), parameters),
        "graph": lambda: torch.autograd.grad(call(loss), parameters, create_graph=True),
        "product": lambda: hessian(vector),
    }
    taken: dict[str, list[float]] = {part: [] for part in (*ways, "scan")}
    for _ in range(rounds):
        for part, way in ways.items():
            before = scan.seconds
            taken[part].append(cpu_seconds(way))
        taken["scan"].append(scan.seconds - before)  # of the product, the last of the ways
    where = f"size={size},batch={pairs}"
    rows = [
        Result(name, TASK, f"{part}_cpu_s", median(s), where=parse(where)[0], n=rounds) for part, s in taken.items()
    ]
    ratios = [p / g for p, g in zip(taken["product"], taken["gradient"], strict=True)]
    low, _, high = quantiles(ratios, n=4)
    extra = {"quartiles": [low, high]}
    return [
        *rows,
        Result(name, TASK, "product_per_gradient", median(ratios), where=parse(where)[0], n=rounds, extra=extra),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/hessian_cost.jsonl"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--batch-size", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    torch.set_num_threads(1)
    scan = Stopwatch(SCANS, "second_gradient")
    rows = []
    for size in args.sizes:
        for name in MODELS:
            found = measure(name, size, args.batch_size, args.rounds, scan)
            rows += found
            print("\n".join(f"{row.model:18} {row.condition:18} {row.metric:28} {row.value:.4g}" for row in found))
    write_rows(args.out, rows, describe_run(0, "cpu", threads=1))


if __name__ == "__main__":
    main()
