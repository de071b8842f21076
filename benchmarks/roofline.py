"""The machine's peaks, and how near to them each CPU kernel comes.

    python benchmarks/roofline.py --out results/roofline.jsonl    two minutes a width on two idle cores, after compiling

Each width of vectors is measured in a process of its own; its rows say `vector_bytes`. Where the processor has no
registers of 64 bytes, give `--widths 32`.

Peaks: fused multiply-adds on registers of that width, and copies of memory (bytes read and bytes written both count)
of 1 to 256 MB, with one and two threads. Kernels run on one thread, in CPU time, so that other processes on the
machine disturb little. Work is counted by hand from the kernels' code: operations are vector instructions of
arithmetic times the numbers in a register (a fused multiply-add is one; so are the shuffles of a transpose), bytes are
inputs read and outputs written once per pass. `bound_ms` is the longer of operations over the peak and bytes over the
bandwidth of a copy of as many bytes; `fraction` is bound over time. A core with more pipes than its two for
multiply-adds can exceed 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from ssmclip.ops import causal_conv1d, cross_selective_scan, selective_scan, ssd
from ssmclip.ops.selective_scan.launch import steps_between_saved_states
from ssmclip.ops.simd import REGISTER_BYTES, broadcast, compiled, fill, fma, store
from ssmclip.ops.threads import run_tasks
from ssmclip.ops.vector_width import VARIABLE
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.rows.condition import parse

ITEM = 4  # bytes of a float32
LANES = REGISTER_BYTES // ITEM
CHAINS = 10  # two pipes that take four cycles each need eight independent chains
COPIES = (1, 4, 16, 64, 256)  # megabytes read and written
WIDTH = {"vector_bytes": REGISTER_BYTES}


@compiled(nogil=True)
def _multiply_add(rounds, like, address):
    a = broadcast(like)
    b, c0, c1, c2, c3, c4 = fill(a, 0.999), fill(a, 0.0), fill(a, 0.1), fill(a, 0.2), fill(a, 0.3), fill(a, 0.4)
    c5, c6, c7, c8, c9 = fill(a, 0.5), fill(a, 0.6), fill(a, 0.7), fill(a, 0.8), fill(a, 0.9)
    for _ in range(rounds):
        c0, c1, c2, c3, c4 = fma(c0, b, a), fma(c1, b, a), fma(c2, b, a), fma(c3, b, a), fma(c4, b, a)
        c5, c6, c7, c8, c9 = fma(c5, b, a), fma(c6, b, a), fma(c7, b, a), fma(c8, b, a), fma(c9, b, a)
    store(address, c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9)


def seconds_of(run: Callable[[], object], threads: int, repetitions: int = 9) -> list[float]:
    """CPU time on one thread, wall time on more; the first run is not counted."""
    clock = time.process_time if threads == 1 else time.perf_counter
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    run()
    times = []
    for _ in range(repetitions):
        start = clock()
        run()
        times.append(clock() - start)
    torch.set_num_threads(before)
    return times


@lru_cache
def arithmetic_peak(threads: int) -> float:
    """Operations a second: fused multiply-adds times the numbers in a register."""
    rounds, out = 1_000_000, np.zeros((threads, 16), np.float32)

    def work(first: int, last: int) -> None:
        for k in range(first, last):
            _multiply_add(rounds, np.float32(0.001), out[k].ctypes.data)

    seconds = min(seconds_of(lambda: run_tasks(work, threads, parallel=threads > 1), threads))
    return threads * rounds * CHAINS * LANES / seconds


@lru_cache
def copy_bandwidth(megabytes: int, threads: int) -> float:
    """Bytes read and written a second when so many are copied again and again: in a cache where they fit into one."""
    source = torch.ones(megabytes * 2**20 // (2 * ITEM))
    target = torch.zeros_like(source)
    turns = max(1, 64 // megabytes)

    def run() -> None:
        for _ in range(turns):
            target.copy_(source)

    return turns * 2 * source.nbytes / min(seconds_of(run, threads))


def bandwidth_for(size: float, threads: int) -> float:
    """The copy bandwidth at the largest measured size that is no larger than so many bytes."""
    fitting = [megabytes for megabytes in COPIES if megabytes * 2**20 <= size]
    return copy_bandwidth(max(fitting, default=COPIES[0]), threads)


@dataclass(frozen=True)
class Work:
    operations: float
    bytes: float

    def bound(self, threads: int) -> tuple[float, str]:
        """(seconds at the peaks, what sets them)."""
        arithmetic = self.operations / arithmetic_peak(threads)
        memory = self.bytes / bandwidth_for(self.bytes, threads)
        return max((arithmetic, "arithmetic"), (memory, "memory"))


# Vector instructions, counted in vector_math.py and selective_scan/loops.py.
# exp2: 3 additions, 5 multiply-adds, a shift and an integer addition.
EXP2 = 10
SOFTPLUS = EXP2 + 3 + 7 + 2  # of a negative absolute value, then a polynomial of degree 7
SIGMOID = 4  # once softplus has the exponential
PREPARE = SOFTPLUS + 1 + 2 + 2  # with the bias, delta u, D u and the largest step
TRANSPOSE = LANES.bit_length() - 1  # 24 shuffles for 8 registers, 64 for 16


def scan_work(batch: int, dim: int, length: int, states: int, backward: bool, transposed: int = 1) -> Work:
    """Of the selective scan with softplus, D and delta_bias, forward or forward and backward.

    transposed: 1 where channels are no neighbours in memory, else 0.
    """
    elements, per_position = batch * dim * length, batch * length * states
    updates = elements * states
    saved = updates / steps_between_saved_states(states)
    operations = updates * (1 + EXP2 + 3) + elements * (PREPARE + 3 * TRANSPOSE * transposed)
    read_and_written = 3 * elements + 2 * per_position
    if backward:
        operations += updates * (1 + EXP2 + 2 + 8) + elements * (PREPARE + SIGMOID + 8 + 5 * TRANSPOSE * transposed)
        read_and_written += 5 * elements + 4 * per_position + 2 * saved
    return Work(operations, ITEM * read_and_written)


@dataclass(frozen=True)
class Kernel:
    name: str
    condition: str
    work: Work
    run: Callable[[], object]


def scan_inputs(batch: int, dim: int, length: int, states: int) -> dict[str, torch.Tensor]:
    """u, delta: (batch, dim, length); A: (dim, state); B, C: (batch, state, length); D, delta_bias: (dim,)."""
    torch.manual_seed(0)
    return {
        "u": torch.randn(batch, dim, length),
        "delta": torch.randn(batch, dim, length),
        "A": -torch.arange(1.0, states + 1).repeat(dim, 1),
        "B": torch.randn(batch, states, length),
        "C": torch.randn(batch, states, length),
        "D": torch.ones(dim),
        "delta_bias": torch.full((dim,), -4.0),
    }


def _scan(batch: int, dim: int, length: int, states: int, backward: bool) -> Kernel:
    inputs = {name: x.requires_grad_(backward) for name, x in scan_inputs(batch, dim, length, states).items()}
    upstream = torch.ones_like(inputs["u"])

    def run():
        y = selective_scan(**inputs, delta_softplus=True)
        return torch.autograd.grad(y, inputs.values(), upstream) if backward else y

    which = "forward+backward" if backward else "forward"
    condition = f"dim={dim},length={length},state={states},batch={batch},pass={which}"
    return Kernel("selective_scan", condition, scan_work(batch, dim, length, states, backward), run)


def _cross_scan(batch: int, side: int, dim: int, states: int) -> Kernel:
    """The first stage of VMamba-T at 224 px: channels are neighbours, x and y are shared by four directions."""
    torch.manual_seed(0)
    x, A = torch.randn(batch, side, side, dim), -torch.ones(4, dim, states)
    delta = torch.randn(batch, 4, side, side, dim)
    B, C = torch.randn(2, batch, 4, side, side, states)
    D, bias = torch.ones(4, dim), torch.full((4, dim), -4.0)
    operations = scan_work(batch, 4 * dim, side * side, states, False, transposed=0).operations + 3 * delta.numel() / 4
    read_and_written = 2 * x.numel() + delta.numel() + B.numel() + C.numel()
    condition = f"dim=4x{dim},length={side * side},state={states},batch={batch},pass=forward"
    work = Work(operations, ITEM * read_and_written)
    return Kernel("cross_selective_scan", condition, work, lambda: cross_selective_scan(x, delta, A, B, C, D, bias))


def _causal_conv(batch: int, dim: int, length: int, width: int) -> Kernel:
    torch.manual_seed(0)
    x, weight = torch.randn(batch, dim, length), torch.randn(dim, width)
    condition = f"dim={dim},length={length},width={width},batch={batch},pass=forward"
    work = Work(width * x.numel(), ITEM * 2 * x.numel())
    return Kernel("causal_conv1d", condition, work, lambda: causal_conv1d(x, weight))


def _ssd(batch: int, length: int, heads: int, channels: int, states: int) -> Kernel:
    """Mamba-2's scan of a text, one chunk: C B' once, and times x for each head."""
    torch.manual_seed(0)
    x, dt = torch.randn(batch, length, heads, channels), torch.rand(batch, length, heads)
    A = -torch.ones(heads)
    B, C = torch.randn(2, batch, length, 1, states)
    operations = batch * length**2 * (states + heads * channels)
    read_and_written = 2 * x.numel() + dt.numel() + B.numel() + C.numel()
    condition = f"heads={heads}x{channels},length={length},state={states},batch={batch},pass=forward"
    return Kernel("ssd", condition, Work(operations, ITEM * read_and_written), lambda: ssd(x, dt, A, B, C))


def kernels() -> list[Callable[[], Kernel]]:
    scans = [(1, 768, 3136, 1), (8, 6144, 49, 1), (1, 768, 3136, 16), (8, 1536, 77, 16)]
    return [
        *(lambda s=shape, b=backward: _scan(*s, b) for shape in scans for backward in (False, True)),
        lambda: _cross_scan(1, 56, 192, 1),
        lambda: _causal_conv(8, 1536, 77, 4),
        lambda: _ssd(8, 77, 24, 64, 128),
    ]


def measure_peaks(threads: int) -> list[Result]:
    extra = {"threads": threads, "clock": "cpu" if threads == 1 else "wall"}
    rows = [Result("machine", "roofline", "operations_per_s", arithmetic_peak(threads), where=WIDTH, extra=extra)]
    for megabytes in COPIES:
        value = copy_bandwidth(megabytes, threads)
        where = {"megabytes": megabytes, **WIDTH}
        rows.append(Result("machine", "roofline", "bytes_per_s", value, where=where, extra=extra))
    return rows


def measure_kernel(kernel: Kernel) -> list[Result]:
    with torch.set_grad_enabled(kernel.condition.endswith("backward")):
        times = seconds_of(kernel.run, 1)
    seconds = statistics.median(times)
    bound, by = kernel.work.bound(1)
    extra = {"threads": 1, "clock": "cpu", "bound_ms": 1e3 * bound, "bound_by": by}
    extra |= {"operations": kernel.work.operations, "bytes": kernel.work.bytes, "fastest_ms": 1e3 * min(times)}
    where = parse(kernel.condition)[0] | WIDTH
    values = {"latency_ms": 1e3 * seconds, "fraction": bound / seconds}
    return [
        Result(kernel.name, "roofline", metric, value, where=where, n=len(times), extra=extra)
        for metric, value in values.items()
    ]


def measure(out: Path, threads: list[int]) -> None:
    """Add this process's rows to the file: those of one width."""
    torch.set_num_threads(1)
    steps = [lambda n=n: measure_peaks(n) for n in threads]
    steps += [lambda make=make: measure_kernel(make()) for make in kernels()]
    for step in tqdm(steps, unit="measurement", dynamic_ncols=True):
        rows = step()
        append_rows(out, rows)
        for row in rows:
            bound = f"{row.extra['bound_ms']:.3g} ms by {row.extra['bound_by']}" if "bound_by" in row.extra else ""
            tqdm.write(f"{row.model:20} {row.condition:75} {row.metric:16} {row.value:.4g} {bound}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/roofline.jsonl"))
    parser.add_argument("--threads", default="1,2", help="numbers of threads for the peaks")
    parser.add_argument("--widths", default="32,64", help="bytes of a vector; empty to add this process's own width")
    args = parser.parse_args()
    if not args.widths:
        measure(args.out, [int(n) for n in args.threads.split(",")])
        return
    write_rows(args.out, [], describe_run(seed=0, threads=1))
    for width in args.widths.split(","):
        command = [sys.executable, __file__, "--out", str(args.out), "--threads", args.threads, "--widths", ""]
        subprocess.run(command, env=os.environ | {VARIABLE: width}, check=True)


if __name__ == "__main__":
    main()
