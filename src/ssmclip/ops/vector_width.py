"""How many bytes a vector of the CPU kernels has: one width in a process, the widest that pays on its processor.

The processor's features decide, except with AVX-512: some cores compute 64 bytes at once, others in two halves, or at a
lower clock, where wider vectors only waste the ends of rows. There fused multiply-adds are timed at both widths, and
the answer is kept next to the compiled kernels, so that all processes of a machine compute with the same one.

What depends on the width, in the last bit: gradients of B and C, which are sums over channels, lane by lane first.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

from llvmlite import binding

log = logging.getLogger(__name__)

VARIABLE = "SSMCLIP_VECTOR_BYTES"
WIDTHS = (16, 32, 64)
PAYS = 1.25  # times the multiply-adds of half the width: cores have either about 1.0 or from 1.6 on
CHAINS = 10  # two pipes that take four cycles each need eight independent chains


def vector_bytes(environment: Mapping[str, str], folder: Path | None) -> int:
    """Return the width that `SSMCLIP_VECTOR_BYTES` names, else the widest that pays on this processor.

    folder: where a measurement is kept, None for nowhere. Raises ValueError for a width that is not in WIDTHS.
    """
    if asked := environment.get(VARIABLE, "").strip():
        if asked not in map(str, WIDTHS):
            raise ValueError(f"{VARIABLE} must be {', '.join(map(str, WIDTHS[:-1]))} or {WIDTHS[-1]} (got {asked!r})")
        return int(asked)
    features = binding.get_host_cpu_features()
    widest = widest_register(features)
    if widest < WIDTHS[-1]:
        return widest
    if folder is None:
        return wider_if_it_pays(multiply_adds_per_s)[0]
    machine = f"{binding.get_host_cpu_name()} {features.flatten()}"
    name = f"vector_bytes-{hashlib.sha256(machine.encode()).hexdigest()[:12]}.json"
    return kept(folder / name, lambda: wider_if_it_pays(multiply_adds_per_s))


def widest_register(features: Mapping[str, bool]) -> int:
    """Return the bytes of the widest vector register; features: as LLVM names them, without any for NEON."""
    return 64 if features.get("avx512f") else 32 if features.get("avx2") else 16


def wider_if_it_pays(rate: Callable[[tuple[int, ...]], dict[int, float]]) -> tuple[int, dict[int, float]]:
    """Return (64 or 32, the rates by width). rate: widths -> multiply-adds a second at each."""
    rates = rate((32, 64))
    return (64 if rates[64] >= PAYS * rates[32] else 32), rates


def kept(path: Path, choose: Callable[[], tuple[int, dict[int, float]]]) -> int:
    """Return the width in the file, which is written first if there is none; of several processes the first decides."""
    if (width := _read(path)) is None:
        with suppress(OSError):
            path.unlink(missing_ok=True)  # what cannot be read is of no use to anyone
        width, rates = choose()
        log.info("vectors of %d bytes, by multiply-adds a second of %s; kept in %s", width, rates, path)
        _write(path, {"vector_bytes": width, "multiply_adds_per_s": rates})
    return _read(path) or width


def _read(path: Path) -> int | None:
    with suppress(OSError, ValueError, KeyError, TypeError):
        width = json.loads(path.read_text(encoding="utf-8"))["vector_bytes"]
        return width if width in WIDTHS else None
    return None


def _write(path: Path, choice: dict) -> None:
    part = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        part.write_text(json.dumps(choice), encoding="utf-8")
        with suppress(FileExistsError):
            os.link(part, path)
    except OSError as error:
        log.warning("the width of vectors is measured again in every process: %s", error)
    finally:
        with suppress(OSError):
            part.unlink(missing_ok=True)


# ---- the measurement, in LLVM's language: no kernel of either width is needed for it


def multiply_adds_per_s(widths: tuple[int, ...], rounds: int = 10_000, turns: int = 40) -> dict[int, float]:
    """Return how many float32 multiply-adds a second one core makes on registers of each width: the best of `turns`.

    The widths take turns, so that the clock is the same for all. A turn takes some 20 us.
    """
    engine, programs = _compile(widths)
    fastest = dict.fromkeys(widths, float("inf"))
    for _ in range(turns):
        for width, program in programs.items():
            start = time.perf_counter()
            program(rounds)
            fastest[width] = min(fastest[width], time.perf_counter() - start)
    del engine  # the programs are its memory
    return {width: rounds * CHAINS * width // 4 / seconds for width, seconds in fastest.items()}


def _compile(widths: tuple[int, ...]):
    """(what owns the machine code, the programs by width)."""
    binding.initialize_native_target()
    binding.initialize_native_asmprinter()
    features = binding.get_host_cpu_features().flatten()
    machine = binding.Target.from_default_triple().create_target_machine(
        cpu=binding.get_host_cpu_name(), features=features, opt=2
    )
    module = binding.parse_assembly("\n".join(_program(width) for width in widths))
    engine = binding.create_mcjit_compiler(module, machine)
    engine.finalize_object()
    kind = ctypes.CFUNCTYPE(ctypes.c_float, ctypes.c_int64)
    return engine, {width: kind(engine.get_function_address(f"multiply_add_{width}")) for width in widths}


def _program(width: int) -> str:
    """A loop over independent chains of multiply-adds, each on one register."""
    lanes = width // 4
    vector, fma = f"<{lanes} x float>", f"@llvm.fma.v{lanes}f32"

    def splat(value: float) -> str:
        return f"<{', '.join([f'float {value:e}'] * lanes)}>"

    chains = range(CHAINS)
    starts = [f"%c{k} = phi {vector} [{splat(float(k))}, %entry], [%d{k}, %loop]" for k in chains]
    steps = [
        f"%d{k} = call {vector} {fma}({vector} %c{k}, {vector} {splat(0.5)}, {vector} {splat(1.0)})" for k in chains
    ]
    sums = [f"%s{k} = fadd {vector} %{f's{k - 1}' if k > 1 else 'd0'}, %d{k}" for k in chains[1:]]
    lines = [
        f"declare {vector} {fma}({vector}, {vector}, {vector})",
        f"define float @multiply_add_{width}(i64 %rounds) {{",
        "entry:",
        "br label %loop",
        "loop:",
        "%i = phi i64 [0, %entry], [%next, %loop]",
        *starts,
        *steps,
        "%next = add i64 %i, 1",
        "%done = icmp sge i64 %next, %rounds",
        "br i1 %done, label %end, label %loop",
        "end:",
        *sums,
        f"%sum = extractelement {vector} %s{CHAINS - 1}, i32 0",
        "ret float %sum",
        "}",
    ]
    return "\n".join(lines)
