"""The kernels on a GPU: are they right, how fast are they, and what do they make of training.

    python benchmarks/gpu.py

On a GPU, into results/gpu_CARD.jsonl: less than 8 minutes, --minutes sets another limit. Without one, into
results/gpu.jsonl: small shapes in Triton's interpreter, 2 minutes.

Parts, each in a process of its own; what the file has of a part is not measured again (a file is of one card), and a
part that fails or comes too late is a row `ran` of 0 that says why:

- registers: the kernels compiled for a card that need not be there (sm_90): registers a thread, bytes spilled
- an operator: `relative_error` against the loop in float64, values and gradients, the largest;
  `latency_ms` (median), and `bandwidth_fraction`: bytes of inputs and results, each once, a second, over those of a
  copy of a gigabyte; of Triton, the chunked form, that under torch.compile, the loop, and mamba_ssm if it is installed
- training: images a second of a step (forward, backward, AdamW) of VMamba-T, -S and -B at 224 px, batch 128, bfloat16
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ssmclip import ops
from ssmclip.rows import Result, append_rows, describe_run, read_rows
from ssmclip.rows.condition import parse

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
INTERPRETER = "none: Triton's interpreter"
TARGET = ("cuda", 90, 32)
REPETITIONS = 20 if GPU else 3
TASK = "gpu"

# Sizes of (small, on a GPU) of a CLIP: stages of VMamba at 224 px, a text tower of 77 tokens.
SHAPES: dict[str, tuple[list[dict[str, int]], list[dict[str, int]]]] = {
    "selective_scan": (
        [dict(batch=1, dim=16, length=20, state=1), dict(batch=1, dim=16, length=20, state=16)],
        [dict(batch=128, dim=3072, length=196, state=1), dict(batch=128, dim=1536, length=77, state=16)],
    ),
    "cross_selective_scan": (
        [dict(batch=1, side=5, dim=16, state=1)],
        [dict(batch=128, side=side, dim=dim, state=1) for side, dim in ((56, 192), (28, 384), (14, 768), (7, 1536))],
    ),
    "ssd": (
        [dict(batch=1, length=20, heads=2, width=16, state=16)],
        [dict(batch=128, length=77, heads=24, width=64, state=128)],
    ),
    "causal_conv1d": ([dict(batch=1, dim=16, length=20)], [dict(batch=128, dim=1536, length=77)]),
}
TRAINED = {
    "vmamba_tiny_s1l8": "training VMamba-T",
    "vmamba_small_s2l15": "training VMamba-S",
    "vmamba_base_s2l15": "training VMamba-B",
}


def make_inputs(operator: str, shape: dict[str, int], dtype: torch.dtype) -> dict[str, Tensor]:
    """Leaves for the operator, activations in `dtype` and parameters in float32, as in mixed precision."""
    torch.manual_seed(0)
    b, n = shape["batch"], shape.get("state", 0)

    def draw(*size: int) -> Tensor:
        return torch.randn(size, device=DEVICE, dtype=dtype)

    if operator == "selective_scan":
        d, length = shape["dim"], shape["length"]
        inputs = {"u": draw(b, d, length), "delta": draw(b, d, length), "A": -draw(d, n).float().exp()}
        inputs |= {"B": draw(b, 1, n, length), "C": draw(b, 1, n, length), "D": draw(d).float()}
    elif operator == "cross_selective_scan":
        side, d = shape["side"], shape["dim"]
        inputs = {"x": draw(b, side, side, d), "delta": draw(b, 4, side, side, d), "A": -draw(4, d, n).float().exp()}
        inputs |= {"B": draw(b, 4, side, side, n), "C": draw(b, 4, side, side, n), "D": draw(4, d).float()}
    elif operator == "ssd":
        length, h, p = shape["length"], shape["heads"], shape["width"]
        inputs = {"x": draw(b, length, h, p), "dt": draw(b, length, h), "A": -draw(h).float().exp()}
        inputs |= {"B": draw(b, length, 1, n), "C": draw(b, length, 1, n), "D": draw(h).float()}
    else:
        d, length = shape["dim"], shape["length"]
        inputs = {"x": draw(b, length, d).transpose(1, 2), "weight": draw(d, 4).float(), "bias": draw(d).float()}
    return {name: x.detach().requires_grad_() for name, x in inputs.items()}


SOFTPLUS = {"selective_scan": "delta_softplus", "cross_selective_scan": "delta_softplus", "ssd": "dt_softplus"}


def call(operator: str, backend: str, inputs: dict[str, Tensor]) -> Tensor:
    options = {SOFTPLUS[operator]: True} if operator in SOFTPLUS else {}
    return getattr(ops, operator)(**inputs, **options, backend=backend)


def with_mamba_ssm(operator: str, inputs: dict[str, Tensor]) -> Tensor:
    """The authors' kernels, by their own names; raises ImportError where they are not installed."""
    if operator == "selective_scan":
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return selective_scan_fn(**inputs, delta_softplus=True)
    if operator == "ssd":
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return mamba_chunk_scan_combined(**inputs, chunk_size=256, dt_softplus=True)
    if operator == "causal_conv1d":
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(**{name: x.to(inputs["x"].dtype) for name, x in inputs.items()})
    raise ImportError("mamba_ssm scans no maps")


def peers(operator: str) -> dict[str, Callable[[dict[str, Tensor]], Tensor]]:
    chunked = partial(call, operator, "chunked")
    found = {"chunked": chunked}
    if GPU:  # an interpreter's time says nothing
        found |= {"triton": partial(call, operator, "triton"), "chunked, compiled": torch.compile(chunked)}
    return {**found, "loop": partial(call, operator, "reference"), "mamba_ssm": partial(with_mamba_ssm, operator)}


def seconds_of(run: Callable[[], Any], most: float = 1.0) -> tuple[float, int]:
    """(median, count) after warming up; what takes a second runs once."""
    times = []
    for _ in range(3 if GPU else 1):
        run()
    while len(times) < REPETITIONS and sum(times) < most:
        if GPU:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if GPU:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times), len(times)


def copy_bandwidth() -> float:
    """Bytes a second, read and written, of a copy of a gigabyte (of 16 megabytes without a GPU)."""
    source = torch.ones(2**28 if GPU else 2**22, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: target.copy_(source))[0]


def measure_operator(operator: str) -> Iterator[Result]:
    bandwidth = copy_bandwidth()
    yield Result("copy", TASK, "bytes_per_s", bandwidth, where=parse(operator)[0])
    for shape in SHAPES[operator][GPU]:
        condition = f"{operator} " + ",".join(f"{name}={value}" for name, value in shape.items())
        try:
            yield from errors(operator, {**shape, "batch": min(shape["batch"], 2)}, condition)
        except RuntimeError as error:  # no Triton, a kernel that does not compile
            yield did_not_run("triton", condition, f"{type(error).__name__}: {error}")
        inputs = make_inputs(operator, shape, torch.bfloat16 if GPU else torch.float32)
        for name, run in peers(operator).items():
            try:
                yield from timings(name, run, inputs, condition, bandwidth)
            except (RuntimeError, ImportError) as error:  # memory, a compiler, a package that is not there
                yield did_not_run(name, condition, f"{type(error).__name__}: {error}")
            if GPU:
                torch.cuda.empty_cache()


def did_not_run(name: str, condition: str, why: str) -> Result:
    return Result(name, TASK, "ran", 0.0, where=parse(condition)[0], extra={"why": why.strip().splitlines()[0][:300]})


def errors(operator: str, shape: dict[str, int], condition: str) -> Iterator[Result]:
    """The largest relative error over the values and all gradients, Euclidean norms."""
    for dtype in (torch.float32, torch.bfloat16):
        inputs = make_inputs(operator, shape, dtype)
        exact = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
        got, wanted = call(operator, "triton", inputs), call(operator, "reference", exact)
        upstream = torch.sin(torch.arange(wanted.numel(), device=DEVICE)).view(wanted.shape).to(dtype)
        pairs = zip(
            (got.detach(), *torch.autograd.grad(got, inputs.values(), upstream)),
            (wanted.detach(), *torch.autograd.grad(wanted, exact.values(), upstream.double())),
            strict=True,
        )
        worst = max(float((g.double() - w).norm() / w.norm()) for g, w in pairs)
        name = str(dtype).removeprefix("torch.")
        yield Result("triton", TASK, "relative_error", worst, where=parse(f"{condition},type={name}")[0])


def timings(name: str, run: Callable, inputs: dict[str, Tensor], condition: str, bandwidth: float) -> Iterator[Result]:
    read = sum(x.nbytes for x in inputs.values())
    with torch.no_grad():
        seconds, n = seconds_of(lambda: run(inputs))
    y = run(inputs)
    upstream = torch.ones_like(y)
    both, m = seconds_of(lambda: torch.autograd.grad(run(inputs), inputs.values(), upstream))
    # Forward reads the inputs and writes y; backward reads inputs and dy, and writes a gradient of each input.
    passes = {"forward": (seconds, n, read + y.nbytes), "backward": (both - seconds, m, 2 * read + y.nbytes)}
    for which, (took, count, moved) in passes.items():
        here = f"{condition},pass={which}"
        yield Result(name, TASK, "latency_ms", 1e3 * took, where=parse(here)[0], n=count, extra={"bytes": moved})
        if GPU:  # an interpreter moves nothing at any bandwidth
            yield Result(name, TASK, "bandwidth_fraction", moved / took / bandwidth, where=parse(here)[0], n=count)


def measure_training(name: str) -> Iterator[Result]:
    import timm

    import ssmclip.models  # noqa: F401  registers ours with timm

    size, batch, name = (224, 128, name) if GPU else (32, 2, "test_vmamba")
    for backend in ("triton", "chunked") if GPU else ("auto",):
        condition = f"{name},image={size},batch={batch},precision={'bfloat16' if GPU else 'float32'}"
        model = timm.create_model(name, num_classes=512).to(DEVICE).train()
        optimiser = torch.optim.AdamW(model.parameters(), lr=1e-4)
        images = torch.randn(batch, 3, size, size, device=DEVICE)

        def step(model=model, optimiser=optimiser, images=images):
            with torch.autocast("cuda", torch.bfloat16) if GPU else nullcontext():
                loss = model(images).float().square().mean()
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()

        try:
            with ops.using(backend):
                seconds, n = seconds_of(step, most=8.0)
            yield Result(backend, TASK, "training_images_per_s", batch / seconds, where=parse(condition)[0], n=n)
            if GPU:
                peak = torch.cuda.max_memory_allocated() / 1e6
                yield Result(backend, TASK, "training_memory_mb", peak, where=parse(condition)[0])
                torch.cuda.reset_peak_memory_stats()
        except RuntimeError as error:
            yield did_not_run(backend, condition, str(error))


def measure_registers() -> Iterator[Result]:
    """Every kernel compiled at the sizes a GPU gets, launched nowhere."""
    global DEVICE
    DEVICE = "cpu"
    for operator, (_, shapes) in SHAPES.items():
        for shape in shapes:
            condition = f"{operator} " + ",".join(f"{name}={value}" for name, value in shape.items() if name != "batch")
            inputs = make_inputs(operator, {**shape, "batch": 1}, torch.bfloat16)
            found: list[tuple[str, dict[str, int]]] = []
            with Compiled(found):
                y = call(operator, "triton", inputs)
                y.backward(torch.zeros_like(y))
            for which, counts in found:
                for metric, value in counts.items():
                    extra = {"target": f"sm_{TARGET[1]}"}
                    yield Result(
                        "triton", TASK, metric, float(value), where=parse(f"{condition},pass={which}")[0], extra=extra
                    )


class Compiled:
    """Inside, a launch of one of our Triton kernels compiles it for `TARGET`, in place of running it."""

    def __init__(self, found: list[tuple[str, dict[str, int]]]):
        self.found = found

    def __enter__(self):
        from ssmclip.ops.causal_conv import triton_kernels as convolution
        from ssmclip.ops.selective_scan import triton_kernels as scan
        from ssmclip.ops.ssd import triton_kernels as ssd

        self.real = [(m, name, getattr(m, name)) for m in (scan, ssd, convolution) for name in ("forward", "backward")]
        for module, name, kernel in self.real:
            setattr(module, name, Launch(kernel, name, self.found))

    def __exit__(self, *_):
        for module, name, kernel in self.real:
            setattr(module, name, kernel)


@dataclasses.dataclass
class Launch:
    kernel: Any
    name: str
    found: list[tuple[str, dict[str, int]]]

    def __getitem__(self, grid):
        return self.compile

    def compile(self, *arguments: Any, **constants: Any) -> None:
        import triton
        from triton.backends.compiler import GPUTarget

        settings = {
            k: constants.pop(k) for k in list(constants) if k in ("num_warps", "num_stages", "enable_fp_fusion")
        }
        names = self.kernel.arg_names
        given = dict(zip(names, arguments, strict=False)) | constants
        # As Triton specialises a launch: None and 1 are constants, what 16 divides is said so.
        fixed = {(i,): given[x] for i, x in enumerate(names) if x in constants or _is_constant(given[x])}
        kinds = {x: "constexpr" if (i,) in fixed else _kind(given[x]) for i, x in enumerate(names)}
        by16 = {
            (i,): [["tt.divisibility", 16]]
            for i, x in enumerate(names)
            if (i,) not in fixed and (isinstance(given[x], Tensor) or given[x] % 16 == 0)
        }
        source = triton.compiler.ASTSource(self.kernel, kinds, fixed, by16)
        kernel = triton.compile(source, target=GPUTarget(*TARGET), options=settings)
        self.found.append((self.name, {**_resources(kernel.asm["cubin"]), "shared_bytes": kernel.metadata.shared}))


def _is_constant(x: Any) -> bool:
    return x is None or (isinstance(x, int) and x == 1)


def _kind(x: Any) -> str:
    """Triton's name of an argument's type."""
    if not isinstance(x, Tensor):
        return "i32"
    return {2: "*bf16", 4: "*fp32", 8: "*fp64"}[x.element_size()]


def _resources(cubin: bytes) -> dict[str, int]:
    """What cuobjdump, which comes with Triton, says of the machine code."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    number = {name: int(value) for name, value in re.findall(r"(REG|STACK):(\d+)", said.stdout)}
    return {"registers": number["REG"], "stack_bytes": number["STACK"]}


def run_on_the_cpu() -> None:
    """Let the back end `triton` take tensors of the CPU: its kernels are interpreted there, or compiled and not run."""
    for backends in ops.BACKENDS.values():
        backends["triton"] = dataclasses.replace(backends["triton"], devices=())


PARTS: dict[str, Callable[[], Iterator[Result]]] = {
    "registers": measure_registers,
    **{operator: partial(measure_operator, operator) for operator in SHAPES},
    # Without a GPU one tiny model stands for all.
    **{part: partial(measure_training, name) for name, part in list(TRAINED.items())[: None if GPU else 1]},
}


def in_fresh_process(part: str, seconds: float) -> list[Result]:
    """The rows of a part, the last of them `ran`: 1, or 0 with the reason."""
    if seconds < 5:
        return [did_not_run(part, "", "no time was left: more --minutes, or the same command again")]
    environment = dict(os.environ)
    if not GPU and part != "registers":
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, __file__, "--part", part]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        said, why = done.stdout, (done.stderr.strip().splitlines() or ["no message"])[-1] if done.returncode else ""
    except subprocess.TimeoutExpired as expired:
        said = (expired.stdout or b"").decode()
        why = f"took more than the {seconds:.0f} s that were left"
    rows = [Result(**json.loads(line)) for line in said.splitlines() if line.startswith("{") and line.endswith("}")]
    return [*rows, did_not_run(part, "", why) if why else Result(part, TASK, "ran", 1.0)]


def file_of(card: str) -> Path:
    """Where the rows of a card go unless --out says otherwise."""
    name = "" if card == INTERPRETER else "_" + re.sub("[^a-z0-9]+", "_", card.lower()).strip("_")
    return Path(f"results/gpu{name}.jsonl")


def parts_done(out: Path, card: str) -> set[str]:
    """The parts that ran to their end. Raises ValueError for a file of another card."""
    if not out.exists():
        return set()
    run, rows = read_rows(out)
    if (theirs := run.get("card")) != card:
        raise ValueError(f"{out} has rows of another card ({theirs}), this is {card}: give another --out")
    return {row.model for row in rows if row.metric == "ran" and row.value}


def main() -> None:
    card = torch.cuda.get_device_name() if GPU else INTERPRETER
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=file_of(card), help="default: %(default)s")
    parser.add_argument("--minutes", type=float, default=7.8, help="for all parts together (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="with commas (default: %(default)s)")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)  # print the rows of one part
    args = parser.parse_args()
    if args.part:
        if not GPU or args.part == "registers":
            run_on_the_cpu()
        for row in PARTS[args.part]():
            print(json.dumps(dataclasses.asdict(row)), flush=True)
        return
    if unknown := set(args.parts.split(",")) - set(PARTS):
        raise SystemExit(f"--parts: {', '.join(sorted(unknown))} unknown, known: {', '.join(PARTS)}")
    end = time.monotonic() + 60 * args.minutes
    try:
        done = parts_done(args.out, card)
    except ValueError as error:
        raise SystemExit(str(error)) from error
    about = {"card": card, "triton": importlib.util.find_spec("triton") is not None}
    for part in tqdm([p for p in args.parts.split(",") if p not in done], desc="parts"):
        rows = in_fresh_process(part, end - time.monotonic())
        append_rows(args.out, rows, describe_run(0, DEVICE, **about))
        for row in rows:
            note = row.extra.get("why", "")
            tqdm.write(f"{row.model:18} {row.condition:64} {row.metric:22} {row.value:.5g} {note}")


if __name__ == "__main__":
    main()
