"""Is the scan needed? Six encoders with one field changed each, three seeds, two data sets and a CLIP, as rows.

    python benchmarks/scan_needed.py train --runs runs/scan_needed
    python benchmarks/scan_needed.py evaluate --runs runs/scan_needed --out results/scan_needed.jsonl
    python benchmarks/scan_needed.py compare results/scan_needed.jsonl --out results/scan_needed_claims.jsonl

What is there is not done again. `compare` answers two claims of Yu and Wang 2025 (MambaOut, arXiv:2405.07992) from the
rows: "the SSM is not needed for classification" (hypothesis 1), and "causal mixing hurts" (figure 3b). Each is a
difference of accuracies with an interval over images and seeds: yes, no or not shown.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ssmclip.config import TrainConfig, load_recipe
from ssmclip.evaluate import Settings, Study, open_tasks
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.rows import Result, append_rows, describe_run, read_rows
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
# data set -> image sizes to evaluate at: those trained at 64 pixels, and up to four times that
SIZES = {"gtsrb": (32, 48, 64, 96, 128, 256), "cifar10": (32, 48, 64, 96, 128, 256), "flickr8k": (64, 128, 256)}
METRICS = {"gtsrb": "top1", "cifar10": "top1", "flickr8k": "image_to_text_recall@10"}
TRAINED_AT = 64
MARGIN = 0.02  # a difference within which two models are said to be equally good
RESAMPLES = 10_000


@dataclass(frozen=True)
class Claim:
    """A claim about the difference between two encoders. holds_if: "worse": the first is worse than the second;
    "not better": it is better by at most MARGIN."""

    text: str
    first: str
    second: str
    holds_if: str


CLAIMS = (
    Claim("hypothesis 1: the scan is not needed", "VMamba, scan", "VMamba, no scan", "not better"),
    Claim("hypothesis 1: VMamba is no better than MambaOut", "VMamba, scan", "MambaOut", "not better"),
    Claim("causal attention hurts", "ViT, causal", "ViT", "worse"),
    Claim("a scan in one direction hurts", "VMamba, one direction", "VMamba, scan", "worse"),
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
        flip = dataclasses.replace(config.data.augment, flip=data == "cifar10")
        config = dataclasses.replace(
            config, data=dataclasses.replace(config.data, source=f"dataset:{data}", augment=flip)
        )
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
            settings = Settings(batch_size=50, max_images=500 if size > 128 else None, examples=0)
            study = Study({label: folder}, tasks[data], settings, image_size=size)
            rows = [row for row in study.rows() if row.metric in (METRICS[data], "mean_per_class")]
            append_rows(out, [_at(row, size) for row in rows])
            print(f"{label} on {data} at {size} px: {rows[0].value:.3f}", flush=True)


def _at(row: Result, size: int) -> Result:
    kept = {key: row.extra[key] for key in ("right", "images", "chance") if key in row.extra}
    return dataclasses.replace(row, where={**row.where, IMAGE: size}, extra=kept)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "evaluate"])
    parser.add_argument("--runs", type=Path, default=Path("runs/scan_needed"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("results/scan_needed.jsonl"))
    parser.add_argument("--only", default="", help="part of a data set's name, such as gtsrb")
    args = parser.parse_args()
    if args.step == "train":
        train_all(args.runs, args.only)
    else:
        evaluate_all(args.runs, args.data, args.out, args.only)


if __name__ == "__main__":
    main()
