"""The selective scan on a CPU: ours against a plain loop, transformers without mamba_ssm, and mambapy's parallel scan.

    python benchmarks/scan.py --out results/scan.jsonl    20 minutes on two idle cores; goes on where it was stopped
                                                          (delete the file to begin anew); --quick: one minute

One process, the same inputs for all, turns of one run to warm up and one that counts (below a second), medians; `n` of
a row says over how many runs. A peer runs once where a run takes more than 10 s, or more than ten times the best
peer's: its row says so. A peer is left out where it would need more memory than is free, or where its own smaller
shapes foretell more than 20 s and ten times the best peer's time; its row says why. Rows of the task "scan_kernel" are
ours on channels that are neighbours in memory already, where the kernel transposes nothing. Peers run their own code:
`mamba_selective_scan` of transformers is what its Mamba layers call for a whole sequence when mamba_ssm is absent;
mambapy's is `MambaBlock.selective_scan` with the softplus it expects done before.

`speedup_possible` is the best peer's time over the bound of `benchmarks/roofline.py` for the operations and bytes of
this design: about where its speedup ends on this machine. `large_pages` rows are CPU time with new memory for the
results in small pages, and in large ones as the operators ask for. `peak_memory_ratio` is the growth of a process of
its own over inputs and outputs.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from roofline import scan_inputs, scan_work
from ssmclip.ops import selective_scan
from ssmclip.ops.memory import NEVER_KEPT
from ssmclip.ops.simd import REGISTER_BYTES
from ssmclip.rows import Result, append_rows, describe_run, read_rows, write_rows
from ssmclip.rows.condition import parse

OURS = "ssmclip"
LAST_METRIC = "state_updates_per_s"  # a shape and pass that has such a row is complete
STAGES = [(4 * 192, 3136), (4 * 384, 784), (4 * 768, 196), (4 * 1536, 49)]  # VMamba-T/S/B at 224 px
REPETITIONS = 7  # of a run below a second
SLOW = 20.0  # seconds: what nobody waits for unless it may be the best peer
BEHIND = 10.0  # times the best peer: a peer so far behind is not repeated


def machine() -> dict[str, int]:
    """Threads, and the width of our vectors."""
    return {"threads": torch.get_num_threads(), "vector_bytes": REGISTER_BYTES}


def free_memory() -> float:
    """Bytes a peer may take: three quarters of what is free."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 0.75 * 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 8 * 2**30


def repetitions_of(seconds: float, best: float, most: int) -> tuple[int, str]:
    """(how often to run what takes so long, why only once). best: seconds of the best peer so far."""
    if seconds > 10:
        return 1, "more than 10 s"
    if seconds > BEHIND * best:
        return 1, f"more than {BEHIND:g} times the best peer"
    return (most if seconds < 1 else min(most, 3)), ""


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
        return f"dim={self.dim}, length={self.length}, state={self.states}, batch={self.batch}, pass={which}"


SHAPES = [Shape(b, d, n, s) for d, n in STAGES for s in (1, 16) for b in (1, 8)] + [Shape(8, 1536, 77, 16)]
SHAPES.sort(key=lambda shape: (shape.updates, shape.length))  # the cheap ones first: rows are written as measured
QUICK = [Shape(1, d, n, s) for d, n in STAGES[2:] for s in (1, 16)]


def make_inputs(shape: Shape) -> dict[str, torch.Tensor]:
    return scan_inputs(shape.batch, shape.dim, shape.length, shape.states)


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


# The cheapest backward passes first: they are what the others are judged by.
PEERS = {
    OURS: Peer(ours, lambda s, backward: 0),
    "mambapy": Peer(
        with_mambapy, lambda s, backward: _needs(s, 10 if backward else 6, 2 ** math.ceil(math.log2(s.length)))
    ),
    "transformers": Peer(with_transformers, lambda s, backward: _needs(s, 8 if backward else 4)),
    "loop": Peer(loop, lambda s, backward: _needs(s, 5) if backward else 0),
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


class Forecast:
    """Seconds a peer will take, from what it took for the last shape with as many states: in proportion to the updates,
    and in the loops' backward passes to the length once more, as each step's gradient is as large as the sequence."""

    def __init__(self) -> None:
        self.seen: dict[tuple[str, bool, int], tuple[Shape, float]] = {}

    def add(self, name: str, backward: bool, shape: Shape, seconds: float) -> None:
        self.seen[name, backward, shape.states] = shape, seconds

    def seconds(self, name: str, backward: bool, shape: Shape) -> float:
        """0 for a peer that has not run yet."""
        if (name, backward, shape.states) not in self.seen:
            return 0.0
        smaller, seconds = self.seen[name, backward, shape.states]
        again = shape.length / smaller.length if backward and name in ("loop", "transformers") else 1.0
        return seconds * shape.updates / smaller.updates * again

    def remember(self, rows: list[Result], shapes: list[Shape]) -> None:
        """What the rows of an earlier start tell."""
        measured = {(row.model, row.condition): row for row in rows if row.metric == "latency_ms" and row.n}
        for shape, backward, name in itertools.product(shapes, (False, True), PEERS):
            if row := measured.get((name, shape.condition(backward))):
                self.add(name, backward, shape, row.value / 1e3)


def left_out(name: str, shape: Shape, backward: bool, best: float, forecast: Forecast) -> str:
    """Why a peer is not run at all, "" if it is. best: seconds of the best peer so far, infinity for none."""
    memory, free = PEERS[name].memory(shape, backward), free_memory()
    if memory > free:
        return f"needs about {memory / 2**30:.1f} GiB of memory, {free / 2**30:.1f} may be taken"
    seconds = forecast.seconds(name, backward, shape)
    if seconds > max(SLOW, BEHIND * best) and best < math.inf:
        return f"would take about {seconds:.0f} s by its smaller shapes, the best peer takes {best:.2g} s"
    return ""


def measure(shape: Shape, backward: bool, repetitions: int, forecast: Forecast) -> list[Result]:
    """Rows of one shape and pass."""
    inputs = make_inputs(shape)
    condition, threads = shape.condition(backward), machine()
    rows, running, left, once, wanted, best = [], {}, {}, {}, None, math.inf
    for name, peer in PEERS.items():
        if reason := left_out(name, shape, backward, best, forecast):
            rows.append(
                Result(name, "scan", "latency_ms", math.nan, where=parse(condition)[0], n=0, extra={"not_run": reason})
            )
            continue
        seconds, y = one_run(peer, inputs, backward)  # the warm-up, and what a slow one is judged by
        wanted = y if wanted is None else wanted
        if (difference := float((y - wanted).norm() / wanted.norm())) > 1e-3:
            raise RuntimeError(f"{name} computes something else at {condition}: relative difference {difference:.1e}")
        left[name], once[name] = repetitions_of(seconds, math.inf if name == OURS else best, repetitions)
        running[name] = [] if left[name] > 1 else [seconds]
        if name != OURS:
            forecast.add(name, backward, shape, seconds)
            best = min(best, seconds)
    for turn in range(repetitions):
        for name, times in running.items():
            if 1 < left[name] > turn:
                if not times or times[0] < 1:  # not timed: threads of the peer before still spin, its memory is gone
                    one_run(PEERS[name], inputs, backward)
                times.append(one_run(PEERS[name], inputs, backward)[0])

    medians = {name: statistics.median(times) for name, times in running.items()}
    for name, seconds in medians.items():
        extra = {**threads, "fastest_ms": 1e3 * min(running[name])} | ({"once": once[name]} if once[name] else {})
        rows.append(
            Result(
                name, "scan", "latency_ms", 1e3 * seconds, where=parse(condition)[0], n=len(running[name]), extra=extra
            )
        )
    return rows + compare(shape, backward, medians, threads)


def compare(shape: Shape, backward: bool, medians: dict[str, float], threads: dict[str, int]) -> list[Result]:
    """Ours against the best peer, and against what the machine allows. The last row of a shape and pass."""
    condition, mine, rows = shape.condition(backward), medians[OURS], []
    bound, by = scan_work(shape.batch, shape.dim, shape.length, shape.states, backward).bound(threads["threads"])
    if peers := {name: seconds for name, seconds in medians.items() if name != OURS}:
        best = min(peers, key=peers.get)
        extra = {**threads, "over": best}
        rows.append(Result(OURS, "scan", "speedup", peers[best] / mine, where=parse(condition)[0], extra=extra))
        extra |= {"bound_ms": 1e3 * bound, "bound_by": by}
        rows.append(
            Result(OURS, "scan", "speedup_possible", peers[best] / bound, where=parse(condition)[0], extra=extra)
        )
    rows.append(Result(OURS, "scan", LAST_METRIC, shape.updates / mine, where=parse(condition)[0], extra=threads))
    return rows


def measure_kernel(shape: Shape, repetitions: int) -> list[Result]:
    """State updates a second of the forward pass, channels innermost."""
    inputs = make_inputs(shape)
    for name in ("u", "delta", "B", "C"):
        inputs[name] = inputs[name].transpose(1, 2).contiguous().transpose(1, 2)
    one_run(PEERS[OURS], inputs, False)
    seconds = statistics.median(one_run(PEERS[OURS], inputs, False)[0] for _ in range(repetitions))
    extra = {**machine(), "latency_ms": 1e3 * seconds}
    rate = shape.updates / seconds
    return [
        Result(
            OURS, "scan_kernel", LAST_METRIC, rate, where=parse(shape.condition(False))[0], n=repetitions, extra=extra
        )
    ]


MEMORY = """
import sys
sys.path.insert(0, {folder!r})
from pathlib import Path
from scan import PEERS, OURS, Shape, make_inputs, one_run
def status(field):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
one_run(PEERS[OURS], make_inputs(Shape(1, 16, 8, {states})), True)
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = status("VmRSS")
inputs = make_inputs(Shape({batch}, {dim}, {length}, {states}))
one_run(PEERS[OURS], inputs, True)
print((status("VmHWM") - before) / (sum(t.nbytes for t in inputs.values()) + inputs["u"].nbytes))
"""


def measure_memory(shape: Shape) -> list[Result]:
    """Peak resident memory of forward and backward over that of inputs and outputs, in a process of its own (Linux)."""
    code = MEMORY.format(folder=str(Path(__file__).parent), **vars(shape))
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    return [Result(OURS, "scan", "peak_memory_ratio", float(output), where=parse(shape.condition(True))[0], n=1)]


PAGES = """
import statistics, sys, time
sys.path.insert(0, {folder!r})
import torch
from scan import Shape, make_inputs, ours
from ssmclip.ops import memory
torch.set_num_threads(1)
if not {large}:
    memory._madvise = None
leaves = {{k: v.requires_grad_() for k, v in make_inputs(Shape({batch}, {dim}, {length}, {states})).items()}}
upstream = torch.ones_like(leaves["u"])
times = []
for _ in range(10):
    start = time.process_time()
    y = ours(leaves)
    gradients = torch.autograd.grad(y, leaves.values(), upstream)
    times.append(time.process_time() - start)
    del y, gradients
print(statistics.median(times[1:]))
"""


def measure_pages(shape: Shape) -> list[Result]:
    """CPU time of forward and backward, one thread, with new memory in small and in large pages."""
    rows = []
    for pages, large in (("small", False), ("large", True)):
        code = PAGES.format(folder=str(Path(__file__).parent), large=large, **vars(shape))
        run = [sys.executable, "-c", code]
        output = subprocess.run(run, capture_output=True, text=True, check=True).stdout
        condition = f"{shape.condition(True)}, pages={pages}"
        rows.append(
            Result(
                OURS, "large_pages", "cpu_ms", 1e3 * float(output), where=parse(condition)[0], n=9, extra={"threads": 1}
            )
        )
    return rows


def measurements(
    shapes: list[Shape], repetitions: int, forecast: Forecast
) -> list[tuple[tuple[str, str, str], Callable]]:
    """((task, condition, metric) of the last row, what makes the rows) of each."""
    steps = []
    for shape in shapes:
        one_pass = shape.condition(False)
        steps.append((("scan_kernel", one_pass, LAST_METRIC), partial(measure_kernel, shape, repetitions)))
        for backward in (False, True):
            key = "scan", shape.condition(backward), LAST_METRIC
            steps.append((key, partial(measure, shape, backward, repetitions, forecast)))
    for shape in shapes:
        if shape.batch == 8 and shape.length > 100 and Path("/proc/self/clear_refs").exists():
            key = "scan", shape.condition(True), "peak_memory_ratio"
            steps.append((key, partial(measure_memory, shape)))
        if 4 * shape.batch * shape.dim * shape.length >= NEVER_KEPT:
            key = "large_pages", f"{shape.condition(True)}, pages=large", "cpu_ms"
            steps.append((key, partial(measure_pages, shape)))
    return steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/scan.jsonl"))
    parser.add_argument("--quick", action="store_true", help="few shapes, few repetitions")
    parser.add_argument("--only", help="a task or metric: scan, scan_kernel, large_pages, peak_memory_ratio")
    args = parser.parse_args()
    shapes, repetitions = (QUICK, 3) if args.quick else (SHAPES, REPETITIONS)
    if not args.out.exists():
        write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads()))
    earlier, forecast = read_rows(args.out)[1], Forecast()
    there = {(row.task, row.condition, row.metric) for row in earlier}
    forecast.remember(earlier, shapes)
    steps = measurements(shapes, repetitions, forecast)
    steps = [(key, make) for key, make in steps if key not in there and args.only in (None, key[0], key[2])]
    peers = PEERS.values() if any(key[2] == LAST_METRIC for key, _ in steps) else [PEERS[OURS]]
    for peer, backward in itertools.product(peers, (False, True)):  # compiles the kernels, imports the peers
        one_run(peer, make_inputs(Shape(1, 16, 8, 1)), backward)
    bar = tqdm(steps, unit="measurement", dynamic_ncols=True)
    for key, make in bar:
        bar.set_postfix_str(key[1])
        rows = make()
        append_rows(args.out, rows)
        for row in rows:
            note = row.extra.get("over") or row.extra.get("not_run") or row.extra.get("once", "")
            bar.write(f"{row.condition:60} {row.model:13} {row.metric:20} {row.value:.5g} {note}")


if __name__ == "__main__":
    main()
