"""One measurement in a process of its own: `python -m ssmclip.analyze.cost.measure` reads and answers JSON.

A fresh process, because the peak of its memory is then that of one model at one size, and because one that grows
beyond the machine's memory can die without taking the others along.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import resource
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from ssmclip.models import names, towers

__all__ = ["Job", "measure", "memory_limit"]

KERNELS = ("SS2D", "Mamba", "Mamba2")  # modules whose kernels are compiled when they first run
POWER = Path("/sys/class/powercap")  # Intel's and AMD's counters of energy (RAPL)
FREE_MEMORY = Path("/proc/meminfo")
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "bad_alloc")


@dataclass(frozen=True)
class Job:
    """What to measure.

    model: see `names.build_model`; image_size: (height, width), or length: tokens, of what goes in; training: a step
    of forward, backward and AdamW in place of inference; batch_size: of memory and throughput (latency: 1);
    seconds: how long each timing goes on, of 3 repetitions at least; attention: "fused", PyTorch's choice |
    "plain", all pairs in memory; precision: "float32" | "bfloat16" | "float16", of autocast; memory_limit: bytes
    beyond which the process gives up (`measure` itself sets no limit), None for what `memory_limit` says.
    """

    model: str
    image_size: tuple[int, int] | None = None
    length: int | None = None
    training: bool = False
    batch_size: int = 1
    device: str = "cpu"
    seconds: float = 2.0
    attention: str = "fused"
    precision: str = "float32"
    memory_limit: int | None = None
    seed: int = 0


def measure(job: Job) -> dict[str, Any]:
    """Return one job's results: {"memory_mb": ..., "time": {...}, ...}, or {"failed": why} if memory ran out.

    memory_mb: peak in 10^6 bytes, weights included: on the CPU weights, optimiser state and the growth of this
    process's resident memory; on a GPU the allocator's. batch, single: seconds of a run of batch_size and of 1 (not for
    training): median, low and high quartile, count. energy_j: of a batch; no_energy: why the machine does not tell.
    """
    torch.manual_seed(job.seed)
    try:
        with _attention(job.attention):
            return _measure(job)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY):
            return {"failed": f"out of memory: {str(error).splitlines()[0][:200] if str(error) else 'MemoryError'}"}
        raise


def _measure(job: Job) -> dict[str, Any]:
    model = names.build_model(job.model, job.image_size, job.length).to(job.device).train(job.training)
    tower = towers.tower_parameters(model, "image" if job.length is None else "text")
    optimiser = torch.optim.AdamW(tower, lr=1e-6) if job.training else None

    def run(inputs: Tensor) -> None:
        _run(model, inputs, job, optimiser)

    if any(type(module).__name__ in KERNELS for module in model.modules()):
        run(_inputs(model, job, 1, small=True))
    if optimiser is not None:
        optimiser.zero_grad(set_to_none=True)
    kept = sum(p.numel() * p.element_size() for p in tower)
    if optimiser is not None:
        kept += sum(x.numel() * x.element_size() for state in optimiser.state.values() for x in state.values())
    inputs = _inputs(model, job, job.batch_size)
    memory, bound = _peak_memory(lambda: run(inputs), job, kept)
    answer = {
        "memory_mb": memory / 1e6,
        "memory_is": bound,
        "parameters": sum(p.numel() for p in tower),
        **_timed(lambda: run(inputs), job),
    }
    if not job.training:
        single = inputs[:1].clone()
        answer["single"] = answer["batch"] if len(inputs) == 1 else _timed(lambda: run(single), job)["batch"]
    return answer


def _inputs(model: nn.Module, job: Job, batch: int, small: bool = False) -> Tensor:
    """Return the inputs of a job. small: the smallest that compile the same kernels."""
    if job.length is not None:
        fixed = hasattr(getattr(model, "text", model), "attn_mask")
        return towers.tokens_of(model, batch, min(job.length, 8) if small and not fixed else job.length, job.device)
    fixed = towers.patch_size(towers.image_tower(model)) is not None
    size = (64, 64) if small and not fixed else job.image_size
    return torch.randn(batch, 3, *size, device=job.device)


def _run(model: nn.Module, inputs: Tensor, job: Job, optimiser: torch.optim.Optimizer | None) -> None:
    encode = model.encode_text if job.length is not None else lambda images: towers.encode_image(model, images)
    mixed = contextlib.nullcontext()
    if job.precision != "float32":
        mixed = torch.autocast(torch.device(job.device).type, getattr(torch, job.precision))
    with torch.set_grad_enabled(job.training), mixed:
        features = encode(inputs)
    if optimiser is not None:
        optimiser.zero_grad(set_to_none=True)
        features.float().square().mean().backward()
        optimiser.step()
    if inputs.is_cuda:
        torch.cuda.synchronize(inputs.device)


def _peak_memory(run: Callable[[], None], job: Job, kept: int) -> tuple[int, str]:
    """Return (bytes, how measured). kept: bytes of weights and optimiser state, allocated before."""
    gc.collect()
    if job.device != "cpu":
        torch.cuda.reset_peak_memory_stats(job.device)
        run()
        return torch.cuda.max_memory_allocated(job.device), "the allocator's peak"
    with contextlib.suppress(OSError, AttributeError):  # only glibc can; elsewhere free memory may hide some
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what is free must not hide what is needed
    exact = _forget_peak()
    before = _resident() if exact else _peak_resident()
    run()
    return kept + _peak_resident() - before, "resident memory" if exact else "resident memory, a lower bound"


def _forget_peak() -> bool:
    """Reset the peak of resident memory, if the system supports it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def _resident() -> int:
    return _status("VmRSS")


def _peak_resident() -> int:
    try:
        return _status("VmHWM")
    except (OSError, KeyError):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def memory_limit(job: Job) -> int | None:
    """Return the bytes a job may take: its own limit, or nine tenths of what is free; None without a limit.

    That is on a GPU (CUDA reserves addresses by the terabyte), and where there is no Linux.
    """
    if job.device != "cpu":
        return None
    if job.memory_limit is not None:
        return job.memory_limit
    try:
        lines = FREE_MEMORY.read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024 * 9 // 10
    except (OSError, StopIteration):
        return None


def _limit_memory(limit: int) -> None:
    """Let allocations beyond this many more bytes fail, before the system kills processes."""
    try:
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + limit, hard))
    except (OSError, KeyError, ValueError):
        return  # no Linux: there is nothing to limit it by


def _timed(run: Callable[[], None], job: Job) -> dict[str, Any]:
    """Return {"batch": {median, low, high, n}, and energy_j or no_energy} of one run; the first is not counted."""
    run()
    times, start, energy = [], time.perf_counter(), _energy(job.device)
    while len(times) < 3 or (time.perf_counter() - start < job.seconds and len(times) < 100):
        before = time.perf_counter()
        run()
        times.append(time.perf_counter() - before)
    after = _energy(job.device)
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    found: dict[str, Any] = {"batch": {"median": median, "low": low, "high": high, "n": len(times)}}
    if energy is not None and after is not None and after > energy:  # the counter starts again at its maximum
        found["energy_j"] = (after - energy) / 1e6 / len(times)
    else:
        found["no_energy"] = f"no counter in {POWER}" if job.device == "cpu" else "NVML or pynvml is missing"
    return found


def _energy(device: str) -> float | None:
    """Return the microjoules used by all packages, or the card; None if the machine does not report them."""
    if device != "cpu":
        return _energy_of_card(device)
    counters = [p / "energy_uj" for p in POWER.glob("*-rapl:*") if p.name.count(":") == 1]
    try:
        return sum(float(counter.read_text()) for counter in counters) or None
    except OSError:
        return None


def _energy_of_card(device: str) -> float | None:
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        card = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
        return 1e3 * pynvml.nvmlDeviceGetTotalEnergyConsumption(card)  # it says millijoules
    except pynvml.NVMLError:
        return None


@contextlib.contextmanager
def _attention(kind: str):
    if kind not in ("fused", "plain"):
        raise ValueError(f"attention must be 'fused' or 'plain' (got {kind!r})")
    with sdpa_kernel(SDPBackend.MATH) if kind == "plain" else contextlib.nullcontext():
        yield


def to_json(job: Job) -> str:
    return json.dumps(asdict(job))


def main() -> None:
    fields = json.loads(sys.stdin.read())
    fields["image_size"] = fields["image_size"] and tuple(fields["image_size"])
    job = Job(**fields)
    if (limit := memory_limit(job)) is not None:
        _limit_memory(limit)
    sys.stdout.write(json.dumps(measure(job)) + "\n")


if __name__ == "__main__":
    main()
