"""Language models on a CPU: ours against transformers' MambaModel and Mamba2Model without mamba_ssm.

    python benchmarks/text.py --out results/text.jsonl          two layers; --layers 24: the whole of mamba-130m
    python benchmarks/text.py --only kind=mamba2 batch=8        the conditions that hold all these

One process, the same weights and tokens for both, turns taken, medians; where a model takes more than a minute, its
first run is its only one (`n` of the row). The shape is that of mamba-130m and mamba2-130m, 768 channels, but for the
token table, which has 1,000 rows: looking them up is the same for both. --clock cpu counts the process's own time,
which a busy machine disturbs less.

A third takes its turn: the matrix products of the same linear layers and nothing else, by the same BLAS in all three.
Its speedup is about the most that any scan, convolution or norm could reach: it still cuts its tensors between layers,
which costs a gradient.

Mamba's loop in transformers keeps and fills gradients of (batch, 1536, length, 16) for every position: its backward
pass at length 1024 takes gigabytes and minutes.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.rows import Result, append_rows, describe_run, write_rows
from ssmclip.rows.condition import parse

OURS, PEER, PRODUCTS = "ssmclip", "transformers", "linear layers alone"
FIELDS = {
    "mamba": dict(vocab_size=1000, hidden_size=768),
    "mamba2": dict(vocab_size=1000, hidden_size=768, num_heads=24, n_groups=1),
}
SHAPES = [(8, 77), (2, 1024)]  # (batch, length)
SLOW = 60.0  # seconds
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
    return {OURS: ours.eval(), PEER: theirs.eval(), PRODUCTS: LinearLayers(ours)}


class LinearLayers(nn.Module):
    """A language model's blocks without what stands between their linear layers."""

    def __init__(self, model: LanguageModel):
        super().__init__()
        self.embeddings, self.mixers = model.embeddings, [layer.mixer for layer in model.layers]

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embeddings(tokens)
        for mixer in self.mixers:
            inner = mixer.out_proj.in_features
            h = mixer.in_proj(x)[..., :inner]
            if hasattr(mixer, "x_proj"):
                h = h + mixer.dt_proj(mixer.x_proj(h)[..., : mixer.dt_rank])
            x = mixer.out_proj(h)
        return x


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


@dataclass(frozen=True)
class Case:
    kind: str
    layers: int
    batch: int
    length: int
    backward: bool

    @property
    def condition(self) -> str:
        which = "forward+backward" if self.backward else "forward"
        return f"kind={self.kind},layers={self.layers},batch={self.batch},length={self.length},pass={which}"


def measure(case: Case, repetitions: int, clock: str) -> Iterator[Result]:
    models = make_models(case.kind, case.layers)
    tokens = torch.randint(0, 1000, (case.batch, case.length))
    condition, backward = case.condition, case.backward
    first = {name: one_run(model, tokens, backward, CLOCKS[clock]) for name, model in models.items()}
    wanted = first[PEER][1]
    difference = float((first[OURS][1] - wanted).norm() / wanted.norm())
    if difference > 1e-4:
        raise RuntimeError(f"{OURS} computes something else at {condition}: relative difference {difference:.1e}")
    times = {name: [seconds] if seconds > SLOW else [] for name, (seconds, _) in first.items()}
    again = {name: model for name, model in models.items() if not times[name]}
    for _ in range(repetitions):
        for name, model in again.items():
            times[name].append(one_run(model, tokens, backward, CLOCKS[clock])[0])
    medians = {name: statistics.median(own) for name, own in times.items()}
    how = {"threads": torch.get_num_threads(), "clock": clock}
    for name, seconds in medians.items():
        extra = {**how, "fastest_ms": 1e3 * min(times[name])}
        yield Result(
            name, "text", "latency_ms", 1e3 * seconds, where=parse(condition)[0], n=len(times[name]), extra=extra
        )
    for name in (OURS, PRODUCTS):
        speedup, n = medians[PEER] / medians[name], min(len(times[PEER]), len(times[name]))
        yield Result(name, "text", "speedup", speedup, where=parse(condition)[0], n=n, extra={**how, "over": PEER})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/text.jsonl"))
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="of a condition, such as batch=8")
    args = parser.parse_args()
    write_rows(args.out, [], describe_run(seed=0, threads=torch.get_num_threads(), clock=args.clock))
    every = itertools.product(FIELDS, [args.layers], SHAPES, (False, True))
    cases = [Case(kind, layers, *shape, backward) for kind, layers, shape, backward in every]
    for case in (c for c in cases if set(args.only) <= set(c.condition.split(","))):
        for row in measure(case, args.repetitions, args.clock):
            append_rows(args.out, [row])
            print(f"{row.condition:70} {row.model:19} {row.metric:12} {row.value:.5g}", flush=True)


if __name__ == "__main__":
    main()
