"""The selective scan on a CPU: ours against a plain loop, transformers without mamba_ssm, and mambapy's parallel scan.

    python benchmarks/scan.py --out results/scan.jsonl    an hour on two idle cores, the last shapes most of it;
                                                          --quick: one minute

One process, the same inputs for all, turns taken, medians; `n` of a row says over how many runs: the loop's backward
pass takes ten seconds and more and runs once. Rows of the task "scan_kernel" are ours on channels that are neighbours
in memory already, where the kernel transposes nothing. Peers run their own code: `mamba_selective_scan` of
transformers is what its Mamba layers call for a whole sequence when mamba_ssm is absent; mambapy's is
`MambaBlock.selective_scan` with the softplus it expects done before. A peer that would need more memory or time than
allowed gets a row that says so.
"""

from __future__ import annotations

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from ssmclip.ops import selective_scan
from ssmclip.results import Result, append_rows, describe_run, write_rows

OURS = "ssmclip"
STAGES = [(4 * 192, 3136), (4 * 384, 784), (4 * 768, 196), (4 * 1536, 49)]  # VMamba-T/S/B at 224 px
MEMORY_LIMIT = 8 * 2**30
REPETITIONS = 7  # of a run below a second


def repetitions_of(seconds: float, most: int) -> int:
    """How often to run what takes so long. One run, the first, is all that ten seconds and more get."""
    return most if seconds < 1 else min(most, 3) if seconds < 4 else 1


@dataclass(frozen=True)
class Shape:
    batch: int
    dim: int
    length: int
    states: int

    @property
    def updates(self) -> int:
        return self.batch * self.dim * self.length * self.states

    def condition(self, backward: bool) -> str:
        which = "forward+backward" if backward else "forward"
        return f"dim={self.dim},length={self.length},state={self.states},batch={self.batch},pass={which}"


SHAPES = [Shape(b, d, n, s) for d, n in STAGES for s in (1, 16) for b in (1, 8)] + [Shape(8, 1536, 77, 16)]
SHAPES.sort(key=lambda shape: (shape.updates, shape.length))  # the cheap ones first: rows are written as measured
QUICK = [Shape(1, d, n, s) for d, n in STAGES[2:] for s in (1, 16)]


def make_inputs(shape: Shape) -> dict[str, torch.Tensor]:
    """u, delta: (batch, dim, length); A: (dim, state); B, C: (batch, state, length); D, delta_bias: (dim,)."""
    torch.manual_seed(0)
    inputs = {
        "u": torch.randn(shape.batch, shape.dim, shape.length),
        "delta": torch.randn(shape.batch, shape.dim, shape.length),
        "A": -torch.arange(1.0, shape.states + 1).repeat(shape.dim, 1),
        "B": torch.randn(shape.batch, shape.states, shape.length),
        "C": torch.randn(shape.batch, shape.states, shape.length),
        "D": torch.ones(shape.dim),
        "delta_bias": torch.full((shape.dim,), -4.0),
    }
    return inputs


def ours(inputs):
    return selective_scan(**inputs, delta_softplus=True)


def loop(inputs):
    return selective_scan(**inputs, delta_softplus=True, backend="reference")


def with_transformers(inputs):
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    arguments = {("hidden_states" if k == "u" else "dt" if k == "delta" else k): v for k, v in inputs.items()}
    return mamba_selective_scan(**arguments, delta_softplus=True)


def with_mambapy(inputs):
    from mambapy.mamba import MambaBlock

    u, delta, B, C = (inputs[k].transpose(1, 2) for k in ("u", "delta", "B", "C"))
    delta = F.softplus(delta + inputs["delta_bias"])
    return MambaBlock.selective_scan(None, u, delta, inputs["A"], B, C, inputs["D"]).transpose(1, 2)


def _needs(shape: Shape, tensors: int, length: int | None = None) -> int:
    """Bytes of so many float32 tensors of (batch, dim, length, state)."""
    return tensors * 4 * shape.updates * (length or shape.length) // shape.length


@dataclass(frozen=True)
class Peer:
    """run: inputs -> y; memory: (shape, backward) -> bytes it needs beyond its inputs, counted in its code."""

    run: Callable
    memory: Callable[[Shape, bool], int]


PEERS = {
    OURS: Peer(ours, lambda s, backward: 0),
    "loop": Peer(loop, lambda s, backward: _needs(s, 5) if backward else 0),
    "transformers": Peer(with_transformers, lambda s, backward: _needs(s, 8 if backward else 4)),
    "mambapy": Peer(
        with_mambapy, lambda s, backward: _needs(s, 10 if backward else 6, 2 ** math.ceil(math.log2(s.length)))
    ),
}


def one_run(peer: Peer, inputs: dict[str, torch.Tensor], backward: bool) -> tuple[float, torch.Tensor]:
    """(seconds, y). The gradient is that of all inputs for an upstream gradient of ones."""
    if not backward:
        with torch.no_grad():
            start = time.perf_counter()
            y = peer.run(inputs)
            return time.perf_counter() - start, y
    leaves = {k: v.detach().requires_grad_() for k, v in inputs.items()}
    upstream = torch.ones_like(inputs["u"])
    start = time.perf_counter()
    y = peer.run(leaves)
    torch.autograd.grad(y, leaves.values(), upstream)
    return time.perf_counter() - start, y.detach()


def measure(shape: Shape, backward: bool, repetitions: int) -> Iterator[Result]:
    """Rows of one shape and pass."""
    inputs = make_inputs(shape)
    condition = shape.condition(backward)
    running, left, wanted = {}, {}, None
    for name, peer in PEERS.items():
        if (memory := peer.memory(shape, backward)) > MEMORY_LIMIT:
            reason = f"needs about {memory / 2**30:.0f} GiB, {MEMORY_LIMIT / 2**30:.0f} allowed"
            yield Result(name, "scan", condition, "latency_ms", math.nan, n=0, extra={"not_run": reason})
            continue
        seconds, y = one_run(peer, inputs, backward)  # the warm-up, and what a slow one is judged by
        wanted = y if wanted is None else wanted
        if (difference := float((y - wanted).norm() / wanted.norm())) > 1e-3:
            raise RuntimeError(f"{name} computes something else at {condition}: relative difference {difference:.1e}")
        left[name] = repetitions_of(seconds, repetitions)
        running[name] = [] if left[name] > 1 else [seconds]
    for turn in range(repetitions):
        for name, times in running.items():
            if 1 < left[name] > turn:
                times.append(one_run(PEERS[name], inputs, backward)[0])

    medians = {name: statistics.median(times) for name, times in running.items()}
    threads = {"threads": torch.get_num_threads()}
    for name, seconds in medians.items():
        extra = {**threads, "fastest_ms": 1e3 * min(running[name])}
        yield Result(name, "scan", condition, "latency_ms", 1e3 * seconds, n=len(running[name]), extra=extra)
    mine = medians.pop(OURS)
    if medians:
        best = min(medians, key=medians.get)
        yield Result(OURS, "scan", condition, "speedup", medians[best] / mine, extra={**threads, "over": best})
    yield Result(OURS, "scan", condition, "state_updates_per_s", shape.updates / mine, extra=threads)


def measure_kernel(shape: Shape, repetitions: int) -> Result:
    """State updates a second of the forward pass, channels innermost."""
    inputs = make_inputs(shape)
    for name in ("u", "delta", "B", "C"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    one_run(PEERS[OURS], inputs, False)
    seconds = statistics.median(one_run(PEERS[OURS], inputs, False)[0] for _ in range(repetitions))
    extra = {"threads": torch.get_num_threads(), "latency_ms": 1e3 * seconds}
    rate = shape.updates / seconds
    return Result(OURS, "scan_kernel", shape.condition(False), "state_updates_per_s", rate, n=repetitions, extra=extra)


MEMORY = """
import resource, sys
sys.path.insert(0, {folder!r})
from scan import PEERS, OURS, Shape, make_inputs, one_run
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
one_run(PEERS[OURS], make_inputs(Shape(1, 16, 8, {states})), True)
before = peak()
inputs = make_inputs(Shape({batch}, {dim}, {length}, {states}))
one_run(PEERS[OURS], inputs, True)
print((peak() - before) / (sum(t.nbytes for t in inputs.values()) + inputs["u"].nbytes))
"""


def measure_memory(shape: Shape) -> Result:
    """Peak memory of forward and backward over that of inputs and outputs, in a process of its own."""
    code = MEMORY.format(folder=str(Path(__file__).parent), **vars(shape))
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return Result(OURS, "scan", shape.condition(True), "peak_memory_ratio", float(output), n=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/scan.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few shapes, few repetitions")
    args = parser.parse_args()
    shapes, repetitions = (QUICK, 3) if args.quick else (SHAPES, REPETITIONS)
    for backward in (False, True):  # compiles the kernels
        one_run(PEERS[OURS], make_inputs(Shape(1, 16, 8, 1)), backward)
    write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads()))

    with_memory = [s for s in shapes if s.batch == 8 and s.length > 100]
    bar = tqdm(total=3 * len(shapes) + len(with_memory), unit="measurement", dynamic_ncols=True)

    def keep(rows: Iterable[Result]) -> None:
        for row in rows:
            append_rows(args.out, [row])
            over = row.extra.get("over", "")
            bar.write(f"{row.condition:60} {row.model:13} {row.metric:20} {row.value:.5g} {over}")
        bar.update()

    for shape in shapes:
        bar.set_postfix_str(str(shape))
        keep([measure_kernel(shape, repetitions)])
        for backward in (False, True):
            keep(measure(shape, backward, repetitions))
    for shape in with_memory:
        keep([measure_memory(shape)])
    bar.close()


if __name__ == "__main__":
    main()
