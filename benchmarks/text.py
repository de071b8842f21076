"""Language models on a CPU: ours against transformers' MambaModel and Mamba2Model without mamba_ssm.

    python benchmarks/text.py --out results/text.jsonl          two layers; --layers 24: the whole of mamba-130m

One process, the same weights and tokens for both, turns taken, medians. The shape is that of mamba-130m and
mamba2-130m, 768 channels, but for the token table, which has 1,000 rows: looking them up is the same for both.
--clock cpu counts the process's own time, which a busy machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

from ssmclip.models.mamba_text import LanguageModel, read_config
from ssmclip.results import Result, append_rows, describe_run, write_rows

OURS, PEER = "ssmclip", "transformers"
FIELDS = {
    "mamba": dict(vocab_size=1000, hidden_size=768),
    "mamba2": dict(vocab_size=1000, hidden_size=768, num_heads=24, n_groups=1),
}
SHAPES = [(8, 77), (2, 1024)]  # (batch, length)
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def make_models(kind: str, layers: int) -> dict[str, Callable[[torch.Tensor], torch.Tensor]]:
    """By name: tokens (batch, length) -> hidden states (batch, length, 768), the same of both."""
    import transformers

    fields = FIELDS[kind] | {"num_hidden_layers": layers}
    config = {"mamba": transformers.MambaConfig, "mamba2": transformers.Mamba2Config}[kind](**fields, use_cache=False)
    torch.manual_seed(0)
    ours, theirs = (
        LanguageModel(read_config({"model_type": kind, **fields})),
        transformers.AutoModel.from_config(config),
    )
    theirs.load_state_dict(ours.state_dict())
    return {OURS: ours.eval(), PEER: theirs.eval()}


def one_run(model: nn.Module, tokens: torch.Tensor, backward: bool, clock: Callable) -> tuple[float, torch.Tensor]:
    """(seconds, hidden states). The gradient is that of all parameters for an upstream gradient of ones."""
    model.zero_grad()
    with torch.set_grad_enabled(backward):
        start = clock()
        states = model(tokens)
        states = getattr(states, "last_hidden_state", states)
        if backward:
            states.sum().backward()
        return clock() - start, states.detach()


def measure(
    kind: str, layers: int, shape: tuple[int, int], backward: bool, repetitions: int, clock: str
) -> Iterator[Result]:
    """Rows of one kind, shape and pass."""
    models = make_models(kind, layers)
    tokens = torch.randint(0, 1000, shape)
    which = "forward+backward" if backward else "forward"
    condition = f"kind={kind},layers={layers},batch={shape[0]},length={shape[1]},pass={which}"
    first = {name: one_run(model, tokens, backward, CLOCKS[clock])[1] for name, model in models.items()}
    difference = float((first[OURS] - first[PEER]).norm() / first[PEER].norm())
    if difference > 1e-4:
        raise RuntimeError(f"{OURS} computes something else at {condition}: relative difference {difference:.1e}")
    times = {name: [] for name in models}
    for _ in range(repetitions):
        for name, model in models.items():
            times[name].append(one_run(model, tokens, backward, CLOCKS[clock])[0])
    medians = {name: statistics.median(own) for name, own in times.items()}
    how = {"threads": torch.get_num_threads(), "clock": clock}
    for name, seconds in medians.items():
        extra = {**how, "fastest_ms": 1e3 * min(times[name])}
        yield Result(name, "text", condition, "latency_ms", 1e3 * seconds, n=repetitions, extra=extra)
    speedup = medians[PEER] / medians[OURS]
    yield Result(OURS, "text", condition, "speedup", speedup, n=repetitions, extra={**how, "over": PEER})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/text.jsonl"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    args = parser.parse_args()
    write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads(), clock=args.clock))
    for kind in FIELDS:
        for shape in SHAPES:
            for backward in (False, True):
                for row in measure(kind, args.layers, shape, backward, args.repetitions, args.clock):
                    append_rows(args.out, [row])
                    print(f"{row.condition:70} {row.model:13} {row.metric:12} {row.value:.5g}", flush=True)


if __name__ == "__main__":
    main()
