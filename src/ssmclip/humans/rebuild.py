"""The published parametric data sets, rebuilt from ImageNet's training images."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq

from ssmclip.data.distortions import GEIRHOS
from ssmclip.data.distortions.folder import Job
from ssmclip.data.distortions.pictures import picture_seed
from ssmclip.humans.stimuli import CATEGORIES, STIMULUS_SETS
from ssmclip.registry import UnknownName


@dataclass(frozen=True)
class Recipe:
    """Jobs that rebuild published sets, and the pictures that were not found: image id -> stimuli that need it."""

    jobs: list[Job]
    missing: dict[str, int]


def rebuild_jobs(
    humans: Path, imagenet: Path, out: Path, datasets: Iterable[str] | None = None, seed: int = 0
) -> Recipe:
    """Return jobs that rebuild the parametric sets of Geirhos et al. 2021 from ILSVRC2012's training images.

    humans: a parquet file with dataset, condition, category and image_id (or imagename): every stimulus that anyone
    saw. imagenet: a folder with n01234567/n01234567_89.JPEG, or with train/ or ILSVRC/Data/CLS-LOC/train/ above that.
    Files are OUT/DATASET/dnn/session-1/NUMBER_CODE_dnn_CONDITION_CATEGORY_K_IMAGEID.png; numbers count the stimuli in
    the order of conditions, categories and ids. How the published images were cropped is not published: see `crop`.

    Raises UnknownName for a set that is not parametric, ValueError for a file without those columns or sets,
    FileNotFoundError for a folder without image folders.
    """
    names = list(GEIRHOS if datasets is None else datasets)
    for name in names:
        if name not in GEIRHOS:
            raise UnknownName("parametric data set", name, GEIRHOS)
    root = _image_root(Path(imagenet))
    jobs: list[Job] = []
    missing: dict[str, int] = {}
    for name, stimuli in _stimuli(Path(humans), names).items():
        count = STIMULUS_SETS[name].count // len(STIMULUS_SETS[name].conditions) // len(CATEGORIES)
        for number, (condition, category, image_id) in enumerate(stimuli, 1):
            stem = image_id.removesuffix(".png")
            source = root / stem.split("_")[0] / f"{stem}.JPEG"
            if not source.is_file():
                missing[stem] = missing.get(stem, 0) + 1
                continue
            code = STIMULUS_SETS[name].code
            file = f"{number:04}_{code}_dnn_{condition}_{category}_{count}_{stem}.png"
            target = Path(out) / name / "dnn" / "session-1" / file
            jobs.append(Job(source, target, name, condition, picture_seed(seed, name, stem)))
    return Recipe(sorted(jobs, key=lambda job: job.source), missing)


def _stimuli(humans: Path, names: list[str]) -> dict[str, list[tuple[str, str, str]]]:
    """Return name -> (condition, category, image id) of its stimuli, sorted."""
    columns = pq.read_schema(humans).names
    key = "image_id" if "image_id" in columns else "imagename"
    wanted = ["dataset", "condition", "category", key]
    if absent := set(wanted) - set(columns):
        raise ValueError(f"{humans} lacks the columns {', '.join(sorted(absent))}; it has {', '.join(columns)}")
    stimuli: dict[str, set[tuple[str, str, str]]] = {name: set() for name in names}
    for row in pq.read_table(humans, columns=wanted).to_pylist():
        if row["dataset"] in stimuli:
            image_id = "_".join(row[key].split("_")[-2:])
            stimuli[row["dataset"]].add((row["condition"], row["category"], image_id))
    if empty := [name for name, found in stimuli.items() if not found]:
        raise ValueError(f"{humans} contains no stimulus of {', '.join(empty)}")
    order = {name: STIMULUS_SETS[name].conditions for name in names}
    return {
        name: sorted(found, key=lambda s, name=name: (order[name].index(s[0]), *s[1:]))
        for name, found in stimuli.items()
    }


def _image_root(imagenet: Path) -> Path:
    for root in (imagenet, imagenet / "train", imagenet / "ILSVRC" / "Data" / "CLS-LOC" / "train"):
        if root.is_dir() and any(root.glob("n[0-9]*")):
            return root
    raise FileNotFoundError(f"{imagenet} must contain class folders such as n01234567 or train/n01234567")
