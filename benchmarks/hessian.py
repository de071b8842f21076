"""What a Hessian-vector product costs, in gradients, and what the usual power iteration costs beside Lanczos.

    python benchmarks/hessian.py --out results/hessian_cost.jsonl       a few minutes

CPU seconds of one process with one thread, the smallest of some repetitions, at random weights. `graph` is the gradient
whose graph is kept: once per batch. `product` is one Hessian-vector product on it. `scan` is the part of a product that
the selective scan's second derivative takes, in `chunked`.
"""

from __future__ import annotations

import argparse
import importlib
import time
from collections.abc import Callable
from pathlib import Path

import torch

import ssmclip
from ssmclip.analyze.batches import contrastive_loss
from ssmclip.analyze.park_kim import compare
from ssmclip.analyze.product import Hessian, call
from ssmclip.results import Result, describe_run, write_rows

MODELS = ("CLIP-VMamba-Nano", "CLIP-ViT-Nano")
SCANS = ("ssmclip.ops.selective_scan.cpu", "ssmclip.ops.cross_scan.cpu")


def batch_of(context: int, size: int, pairs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise: images (pairs, 3, size, size), texts (pairs, context) with the end token last."""
    generator = torch.Generator().manual_seed(0)
    texts = torch.randint(1, 49000, (pairs, context), generator=generator)
    texts[:, -1] = 49407
    return torch.randn(pairs, 3, size, size, generator=generator), texts


def cpu_seconds(run: Callable[[], object], repetitions: int) -> float:
    run()
    taken = []
    for _ in range(repetitions):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


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


def measure(name: str, size: int, pairs: int, repetitions: int, scan: Stopwatch, spectra: bool) -> list[Result]:
    torch.manual_seed(0)
    config = ssmclip.clip_config(name, image_size=size)
    model = ssmclip.create_clip(config).eval()
    images, texts = batch_of(config["model_cfg"]["text_cfg"]["context_length"], size, pairs)
    parameters = list(model.parameters())

    def loss() -> torch.Tensor:
        return contrastive_loss(model, images, texts)

    seconds = {"gradient": cpu_seconds(lambda: torch.autograd.grad(call(loss), parameters), repetitions)}
    seconds["graph"] = cpu_seconds(lambda: torch.autograd.grad(call(loss), parameters, create_graph=True), repetitions)
    hessian = Hessian(loss, model)
    vector = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0))
    seconds["product"] = cpu_seconds(lambda: hessian(vector), repetitions)
    before = scan.seconds
    hessian(vector)
    seconds["scan"] = scan.seconds - before
    where = f"size={size},batch={pairs}"
    rows = [Result(name, "hessian_cost", where, f"{part}_cpu_s", value) for part, value in seconds.items()]
    rows.append(Result(name, "hessian_cost", where, "product_per_gradient", seconds["product"] / seconds["gradient"]))
    if spectra:
        found = compare(hessian)
        worst = {"residual": float(found.protocol.residuals.max()), "error": float(found.errors.max())}
        rows += [
            Result(name, "hessian_cost", where, "power_iteration_products", found.protocol.products, extra=worst),
            Result(name, "hessian_cost", where, "lanczos_products", found.lanczos.products),
            Result(name, "hessian_cost", where, "lanczos_per_power_iteration", found.products_ratio),
        ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("results/hessian_cost.jsonl"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[64, 96])
    parser.add_argument("--batch-size", type=int, default=15)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--spectra", action="store_true", help="compare power iteration and Lanczos too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    scan = Stopwatch(SCANS, "second_gradient")
    rows = []
    for size in args.sizes:
        for name in MODELS:
            found = measure(name, size, args.batch_size, args.repetitions, scan, args.spectra)
            rows += found
            print("\n".join(f"{row.model:18} {row.condition:18} {row.metric:28} {row.value:.4g}" for row in found))
    write_rows(args.out, rows, describe_run(0, "cpu", threads=1))


if __name__ == "__main__":
    main()
