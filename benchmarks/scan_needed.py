"""Is the scan needed? Six encoders with one field changed each, three seeds, as classifiers and in CLIPs, as rows.

    python benchmarks/scan_needed.py train --runs runs/scan_needed
    python benchmarks/scan_needed.py evaluate --runs runs/scan_needed --out results/scan_needed.jsonl
    python benchmarks/scan_needed.py compare --out results/scan_needed.jsonl

What is there is not done again. `compare` answers two claims of Yu and Wang 2025 (MambaOut, arXiv:2405.07992) from the
rows: "the SSM is not needed for classification" (hypothesis 1), and "causal mixing hurts" (figure 3b). Each is a
difference of accuracies with an interval over images and seeds: yes, no or not shown. It adds them to the same file.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmclip.config import TrainConfig, load_recipe
from ssmclip.evaluate import Settings, Study, open_tasks
from ssmclip.evaluate.statistics.paired import unmarked
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.rows import Result, append_rows, describe_run, read_rows, write_rows
from ssmclip.rows.condition import CASE, IMAGE
from ssmclip.train import train
from ssmclip.train.checkpoint import last_checkpoint

RECIPES = Path(__file__).parents[1] / "recipes"
SEEDS = (0, 1, 2)
VMAMBA, VIT, MAMBAOUT = "vmamba_nano", "vit_nano_patch16", "mambaout_nano_linear_head"
ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "VMamba, scan": (VMAMBA, {}),
    "VMamba, one direction": (VMAMBA, {"directions": 1}),
    "VMamba, no scan": (VMAMBA, {"mixer": "gated_conv"}),
    "MambaOut": (MAMBAOUT, {}),
    "ViT": (VIT, {}),
    "ViT, causal": (VIT, {"mixing": "causal"}),
}
CLIPS = {VMAMBA: "CLIP-VMamba-Nano", VIT: "CLIP-ViT-Nano", MAMBAOUT: "CLIP-MambaOut-Nano"}
# data set -> image sizes to evaluate at: half the side of those trained at, the same, and four times the pixels
SIZES = {"cifar10": (32, 64, 128), "flickr8k": (64, 128)}
METRICS = {"cifar10": "top1", "flickr8k": "image_to_text_recall@10"}
CLAIM = "claim: "
MARGIN = 0.02  # a difference within which two models are said to be equally good
RESAMPLES = 10_000


CAUSAL, NEEDLESS = "causal mixing hurts", "the scan is not needed"


@dataclass(frozen=True)
class Claim:
    """A claim about two encoders. needless: that the first is no better than the second, within MARGIN; else that the
    first is worse."""

    text: str
    first: str
    second: str

    def verdict(self, low: float, high: float) -> str:
        """Return the answer of an interval of the difference, the first encoder's accuracy less the second's."""
        if self.text == NEEDLESS:
            return "yes" if high <= MARGIN else "no" if low > MARGIN else "not shown"
        return "yes" if high < 0 else "no" if low > -MARGIN else "not shown"


CLAIMS = (
    Claim(NEEDLESS, "VMamba, scan", "VMamba, no scan"),
    Claim(NEEDLESS, "VMamba, scan", "MambaOut"),
    Claim(CAUSAL, "ViT, causal", "ViT"),
    Claim(CAUSAL, "VMamba, one direction", "VMamba, scan"),
)


def config_of(encoder: str, data: str, seed: int) -> TrainConfig:
    """Return the settings of one run: those of a recipe, but for the encoder, the data and the seed."""
    name, fields = ENCODERS[encoder]
    if data == "flickr8k":
        config = load_recipe(RECIPES / "scan_needed_flickr8k.py")
        changes = config.model.changes | {"vision_cfg": {"timm_model_name": name_with_fields(name, fields)}}
        model = dataclasses.replace(config.model, name=CLIPS[name], changes=changes)
    else:
        config = load_recipe(RECIPES / "scan_needed.py")
        model = dataclasses.replace(config.model, name=name, changes=fields)
    return dataclasses.replace(config, model=model, seed=seed)


def folder_of(runs: Path, encoder: str, data: str, seed: int) -> Path:
    return runs / f"{data}-{encoder.replace(', ', '-').replace(' ', '-')}-{seed}".lower()


def every_run(only: str) -> list[tuple[str, str, int]]:
    """Return (data set, encoder, seed) of all runs whose data set's name contains `only`."""
    return [(data, encoder, seed) for seed in SEEDS for data in SIZES for encoder in ENCODERS if only in data]


def train_all(runs: Path, only: str) -> None:
    for data, encoder, seed in every_run(only):
        folder, config = folder_of(runs, encoder, data, seed), config_of(encoder, data, seed)
        last = last_checkpoint(folder)
        if last is None or last.name != f"step_{config.steps:08d}":
            train(config, folder, resume=last is not None)


def evaluate_all(runs: Path, root: Path, out: Path, only: str) -> None:
    """Write the rows of every finished run at every image size, with the marks of single images."""
    done = {(row.model, row.task, row.where.get(IMAGE)) for row in read_rows(out)[1]} if out.exists() else set()
    if not out.exists():
        append_rows(out, [], describe_run(0, "cpu", tasks=list(SIZES)))
    tasks = {data: open_tasks([data], root) for data in SIZES if only in data}
    for data, encoder, seed in every_run(only):
        folder = folder_of(runs, encoder, data, seed)
        label = f"{encoder}, seed {seed}"
        for size in SIZES[data]:
            if (label, data, size) in done or last_checkpoint(folder) is None:
                continue
            settings = Settings(batch_size=50, examples=0)
            study = Study({label: folder}, tasks[data], settings, image_size=size)
            rows = [row for row in study.rows() if row.metric in (METRICS[data], "mean_per_class")]
            append_rows(out, [_at(row, size) for row in rows])
            print(f"{label} on {data} at {size} px: {rows[0].value:.3f}", flush=True)


def _at(row: Result, size: int) -> Result:
    kept = {key: row.extra[key] for key in ("right", "images", "chance") if key in row.extra}
    return dataclasses.replace(row, where={**row.where, IMAGE: size}, extra=kept)


def compare(file: Path) -> None:
    """Add a row for each claim, data set and image size: the difference, and what it says about the claim."""
    head, rows = read_rows(file)
    rows = [row for row in rows if not row.task.startswith(CLAIM)]
    marks = {(row.model, row.task, row.where[IMAGE]): unmarked(row) for row in rows if "right" in row.extra}
    made = []
    for claim in CLAIMS:
        for data, sizes in SIZES.items():
            for size in sizes:
                made += [answer(claim, data, size, marks)]
                print(f"{claim.text}: {claim.first} - {claim.second}, {data} at {size} px:", made[-1].extra["said"])
    write_rows(file, [*rows, *made], head)


def answer(claim: Claim, data: str, size: int, marks: dict[tuple[str, str, int], Any]) -> Result:
    """Return the row of a claim. marks: (model, data set, image size) -> which images were right."""
    first, second = (
        np.stack([marks[f"{encoder}, seed {seed}", data, size].numpy() for seed in SEEDS]).astype(float)
        for encoder in (claim.first, claim.second)
    )
    low, high = interval(first, second)
    value = float(first.mean() - second.mean())
    verdict = claim.verdict(low, high)
    said = f"{verdict} ({100 * value:+.1f} points, {100 * low:+.1f} to {100 * high:+.1f})"
    return Result(
        claim.first,
        f"{CLAIM}{claim.text}",
        f"difference in {METRICS[data]}",
        value,
        low,
        high,
        n=first.shape[1],
        against=claim.second,
        where={IMAGE: size, CASE: data},
        extra={"said": said, "verdict": verdict},
    )


def interval(first: np.ndarray, second: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a difference of mean accuracies, by resampling images (the same for both) and seeds.

    first, second: right or wrong, (seeds, images). With three seeds it is a rough one; their spread is part of it.
    """
    draws = np.random.default_rng(seed)
    seeds, images = first.shape
    made = []
    for _ in range(RESAMPLES):
        weights = np.bincount(draws.integers(images, size=images), minlength=images) / images
        chosen = [draws.integers(seeds, size=seeds) for _ in range(2)]
        made.append((first[chosen[0]] @ weights).mean() - (second[chosen[1]] @ weights).mean())
    return tuple(float(edge) for edge in np.percentile(made, (2.5, 97.5)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "evaluate", "compare"])
    parser.add_argument("--runs", type=Path, default=Path("runs/scan_needed"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("results/scan_needed.jsonl"))
    parser.add_argument("--only", default="", help="part of a data set's name, such as cifar")
    args = parser.parse_args()
    if args.step == "train":
        train_all(args.runs, args.only)
    elif args.step == "evaluate":
        evaluate_all(args.runs, args.data, args.out, args.only)
    else:
        compare(args.out)


if __name__ == "__main__":
    main()
