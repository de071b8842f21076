"""Seconds until a command answers, over those of `import torch`.

    python benchmarks/startup.py --out results/startup.jsonl    a minute; --quick: a few seconds

Fresh processes in turn, medians, by the clock. `time_ratio`: over `import torch` of the same turn; `memory_mb`: the
largest resident size; `ssmclip search` is over opening the model it asks, in a process that does nothing else.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from ssmclip.rows import Result, describe_run, write_rows

TASK = "startup"
MODEL = "CLIP-VMamba-Nano"
TORCH = "import torch"
LOAD = "load the model"
SAVE = """
import sys, ssmclip
config = ssmclip.clip_config(sys.argv[1])
ssmclip.save_model(ssmclip.create_clip(config), config, sys.argv[2])
"""
COMMANDS = ("--help", "evaluate --help", "datasets", "report --help", "report", "search")


def commands(folder: Path) -> dict[str, list[str]]:
    """Return what is timed: a name and the arguments of a Python process. folder: gets the files that commands read."""
    import numpy as np
    from PIL import Image

    pictures, index = folder / "pictures", folder / "index"
    pictures.mkdir()
    for i in range(4):
        Image.fromarray(np.full((96, 96, 3), 60 * i, np.uint8)).save(pictures / f"{i}.png")
    python, ssmclip = [sys.executable, "-c"], [sys.executable, "-m", "ssmclip"]
    model = str(folder / "model")
    subprocess.run([*python, SAVE, MODEL, model], check=True)
    subprocess.run([*ssmclip, "embed", str(pictures), "--model", model, "--out", str(index)], check=True)
    write_rows(folder / "rows.jsonl", [Result("A", "digits", "top1", 0.5, 0.4, 0.6, 100)])
    more = {
        "datasets": ["--data", str(folder)],
        "report": [str(folder / "rows.jsonl"), "--out", str(folder / "report")],
        "search": ["a grey square", str(index)],
    }
    codes = {TORCH: TORCH, "import ssmclip": "import ssmclip", LOAD: f"import ssmclip; ssmclip.load({model!r})"}
    timed = {name: [*python, code] for name, code in codes.items()}
    return timed | {f"ssmclip {name}": [*ssmclip, *name.split(), *more.get(name, [])] for name in COMMANDS}


def seconds_and_memory(command: list[str]) -> tuple[float, float]:
    """Run a process; return its seconds by the clock and its largest resident size in MB."""
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one turn instead of nine")
    args = parser.parse_args()
    turns = 1 if args.quick else 9
    with tempfile.TemporaryDirectory() as folder:
        timed = commands(Path(folder))
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in timed}
        for turn in range(turns + 1):
            for name, command in timed.items():
                measured = seconds_and_memory(command)
                if turn:  # the first fills the disk's cache
                    taken[name].append(measured)
    rows = []
    for name, measured in taken.items():
        over = LOAD if name == "ssmclip search" else TORCH
        ratios = [mine[0] / other[0] for mine, other in zip(measured, taken[over], strict=True)]
        for metric, value, extra in (
            ("seconds", statistics.median(s for s, _ in measured), {}),
            ("memory_mb", statistics.median(mb for _, mb in measured), {}),
            ("time_ratio", statistics.median(ratios), {"over": over, "low": min(ratios), "high": max(ratios)}),
        ):
            rows.append(Result(name, TASK, metric, value, n=turns, extra=extra))
    write_rows(args.out, rows, describe_run())
    for row in rows:
        if row.metric == "time_ratio":
            print(f"{row.model:28} {row.value:6.2f} x {row.extra['over']}")


if __name__ == "__main__":
    main()
