"""Many pictures distorted, from files to files: a folder of one's own, or the published sets rebuilt from ImageNet.

Written are PNGs, whole or not at all, so that a run that was stopped goes on with what is missing. A picture's seed
comes from its name: it gets the same noise whatever else the folder holds, and other noise than its neighbours.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from tqdm import tqdm

from ssmclip.data.distortions.geirhos import DISTORTIONS, Table, distort, load_table, parse_level
from ssmclip.data.images import SUFFIXES, BadImage, open_image
from ssmclip.humans.stimuli import CATEGORIES, STIMULUS_SETS

SIDE = 224  # pixels, of all published stimuli
RESIZE = 256 / 224  # of the short side over the crop's


@dataclass(frozen=True)
class Job:
    """One file to write: the picture at `source`, distorted."""

    source: Path
    target: Path
    distortion: str
    level: str
    seed: int


@dataclass
class Outcome:
    """What became of the jobs. written, present: counts of files; unreadable: a picture's path -> why it gave none."""

    written: int = 0
    present: int = 0
    unreadable: dict[Path, str] = field(default_factory=dict)

    def summary(self) -> str:
        lines = [f"{self.written} written, {self.present} already there, {len(self.unreadable)} pictures unreadable"]
        return "\n".join(lines + [f"unreadable: {path}: {reason}" for path, reason in self.unreadable.items()])


def crop(image: Image.Image, side: int) -> Image.Image:
    """The middle square after the short side is resized to 256 / 224 of `side`, as torchvision's Resize, CenterCrop."""
    scale = RESIZE * side / min(image.size)
    width, height = (max(int(s * scale), side) for s in image.size)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    left, top = round((width - side) / 2), round((height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def run_jobs(jobs: Sequence[Job], *, side: int | None = SIDE, amplitude: Table = None, gamma: Table = None) -> Outcome:
    """Write what is missing. Pictures that don't open are kept in the outcome and the rest goes on.

    side: pictures are resized and cropped to side x side first, unless they have that size; None leaves them as they
    are. Raises ValueError for two jobs with one target, and for levels and tables that don't fit.
    """
    targets = [job.target for job in jobs]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise ValueError(f"two pictures would be written to {twice}")
    tables = {}
    for job in {job.distortion: job for job in jobs}.values():
        kinds = DISTORTIONS[job.distortion].tables if job.distortion in DISTORTIONS else ()
        given = {"amplitude": amplitude, "gamma": gamma}
        tables[job.distortion] = {kind: load_table(kind, given[kind], job.distortion) for kind in kinds}
    outcome = Outcome()
    missing = [job for job in jobs if not job.target.exists()]
    outcome.present = len(jobs) - len(missing)
    with tqdm(total=len(missing), desc="pictures", unit="file", leave=False, disable=None) as bar:
        for source, group in groupby(missing, key=lambda job: job.source):
            group = list(group)
            try:
                image = open_image(source)
            except BadImage as error:
                outcome.unreadable[source] = str(error)
            else:
                if side is not None and image.size != (side, side):
                    image = crop(image, side)
                pixels = np.array(image)
                for job in group:
                    _write(
                        distort(pixels, job.distortion, job.level, seed=job.seed, **tables[job.distortion]), job.target
                    )
                outcome.written += len(group)
            bar.update(len(group))
    return outcome


def _write(pixels: np.ndarray, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f".{target.name}.partial")
    Image.fromarray(pixels).save(partial, "PNG", compress_level=1)
    partial.replace(target)


def picture_seed(seed: int, *names: str) -> int:
    """A picture's own seed, by its name: the same whatever else there is, and at every level."""
    return zlib.crc32("/".join([str(seed), *names]).encode())


# ---- a folder --------------------------------------------------------------------------------------------------------


def folder_jobs(
    folder: Path, out: Path, distortions: Iterable[str], levels: Sequence[str] | None = None, seed: int = 0
) -> list[Job]:
    """Every picture under `folder` at every level, as OUT/DISTORTION/LEVEL/its/own/folders/NAME.png.

    levels: numbers or labels of the human data, the same for all distortions; None: each one's published levels.
    Two files that differ in their suffixes alone keep them (NAME.jpg.png). Raises ValueError for levels that don't fit,
    FileNotFoundError for a folder without pictures.
    """
    folder, out = Path(folder), Path(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} lies in {folder}: its pictures would be distorted again by the next run")
    pictures = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower().lstrip(".") in SUFFIXES and not path.name.startswith(".")
    )
    if not pictures:
        raise FileNotFoundError(f"no picture ({', '.join(SUFFIXES)}) in {folder}")
    stems = [path.with_suffix("") for path in pictures]
    shared = {stem for stem, next_stem in pairwise(stems) if stem == next_stem}
    chosen = [(name, label) for name in distortions for label in _labels(name, levels)]
    jobs = []
    for path, stem in zip(pictures, stems, strict=True):
        name = path.relative_to(folder)
        png = name.with_name(f"{name.name}.png" if stem in shared else f"{name.stem}.png")
        for distortion, label in chosen:
            target = out / distortion / label / png
            jobs.append(Job(path, target, distortion, label, picture_seed(seed, distortion, name.as_posix())))
    return jobs


def _labels(name: str, levels: Sequence[str] | None) -> list[str]:
    if name.startswith("imagenet-c/"):
        return list(levels or "12345")
    if levels is None:
        return list(DISTORTIONS[name].levels)
    for level in levels:
        parse_level(name, level)
    return list(levels)


# ---- the published sets ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recipe:
    """Jobs that rebuild published sets, and the pictures that were not found: image id -> stimuli that need it."""

    jobs: list[Job]
    missing: dict[str, int]


def rebuild_jobs(
    humans: Path, imagenet: Path, out: Path, datasets: Iterable[str] | None = None, seed: int = 0
) -> Recipe:
    """The parametric sets of Geirhos et al. 2021 from ILSVRC2012's training images, by the ids in the human data.

    humans: a parquet file with dataset, condition, category and image_id (or imagename): every stimulus that anyone
    saw. imagenet: a folder with n01234567/n01234567_89.JPEG, or with train/ or ILSVRC/Data/CLS-LOC/train/ above that.
    Files are OUT/DATASET/dnn/session-1/NUMBER_CODE_dnn_CONDITION_CATEGORY_K_IMAGEID.png; numbers count the stimuli in
    the order of conditions, categories and ids. How the published images were cropped is not published: see `crop`.

    Raises ValueError for a file without those columns or sets, FileNotFoundError for a folder without image folders.
    """
    names = list(DISTORTIONS) if datasets is None else [DISTORTIONS[name].name for name in datasets]
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
    """name -> (condition, category, image id) of its stimuli, sorted."""
    columns = pq.read_schema(humans).names
    key = "image_id" if "image_id" in columns else "imagename"
    wanted = ["dataset", "condition", "category", key]
    if absent := set(wanted) - set(columns):
        raise ValueError(f"{humans} has no column {', '.join(sorted(absent))}; it has {', '.join(columns)}")
    stimuli: dict[str, set[tuple[str, str, str]]] = {name: set() for name in names}
    for row in pq.read_table(humans, columns=wanted).to_pylist():
        if row["dataset"] in stimuli:
            image_id = "_".join(row[key].split("_")[-2:])
            stimuli[row["dataset"]].add((row["condition"], row["category"], image_id))
    if empty := [name for name, found in stimuli.items() if not found]:
        raise ValueError(f"{humans} has no stimulus of {', '.join(empty)}")
    order = {name: STIMULUS_SETS[name].conditions for name in names}
    return {
        name: sorted(found, key=lambda s, name=name: (order[name].index(s[0]), *s[1:]))
        for name, found in stimuli.items()
    }


def _image_root(imagenet: Path) -> Path:
    for root in (imagenet, imagenet / "train", imagenet / "ILSVRC" / "Data" / "CLS-LOC" / "train"):
        if root.is_dir() and any(root.glob("n[0-9]*")):
            return root
    raise FileNotFoundError(f"{imagenet} has no folders n01234567, nor train/n01234567")
