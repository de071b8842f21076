"""Distort many picture files.

PNGs are written atomically, so an interrupted run continues with the missing ones. A picture's seed
comes from its name: its noise differs from its neighbours' and does not depend on the folder's other files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from ssmclip.data.distortions.apply import distort
from ssmclip.data.distortions.pictures import SIDE, crop, picture_seed
from ssmclip.data.distortions.registry import DISTORTIONS, Table, parse_level, prepare
from ssmclip.data.images import SUFFIXES, BadImage, open_image, pictures_below


@dataclass(frozen=True)
class Job:
    """A file to write: the picture at `source`, distorted."""

    source: Path
    target: Path
    distortion: str
    level: str
    seed: int


@dataclass
class Outcome:
    """The result of the jobs. written, present: counts of files; unreadable: a picture's path -> the reason."""

    written: int = 0
    present: int = 0
    unreadable: dict[Path, str] = field(default_factory=dict)

    def summary(self) -> str:
        lines = [f"{self.written} written, {self.present} already there, {len(self.unreadable)} pictures unreadable"]
        return "\n".join(lines + [f"unreadable: {path}: {reason}" for path, reason in self.unreadable.items()])


def run_jobs(jobs: Sequence[Job], *, side: int | None = SIDE, amplitude: Table = None, gamma: Table = None) -> Outcome:
    """Write the missing files. Pictures that cannot be opened are listed in the outcome; the others are still written.

    side: pictures are resized and cropped to side x side first, unless they have that size; None leaves them as they
    are. Raises ValueError for two jobs with one target, and for levels and tables that don't fit.
    """
    targets = [job.target for job in jobs]
    if len(set(targets)) < len(targets):
        twice = next(target for target in targets if targets.count(target) > 1)
        raise ValueError(f"two pictures would be written to {twice}: rename one")
    given = {"amplitude": amplitude, "gamma": gamma}
    tables = {name: prepare(name, given) for name in dict.fromkeys(job.distortion for job in jobs)}
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


# ---- a folder --------------------------------------------------------------------------------------------------------


def folder_jobs(
    folder: Path, out: Path, distortions: Iterable[str], levels: Sequence[str] | None = None, seed: int = 0
) -> list[Job]:
    """Return jobs for every picture under `folder` at every level, as OUT/DISTORTION/LEVEL/SUBFOLDERS/NAME.png.

    levels: numbers or labels, the same for all distortions; None: the levels of each.
    Two files that differ in their suffixes alone keep them (NAME.jpg.png). Raises ValueError for levels that don't fit,
    FileNotFoundError for a folder without pictures.
    """
    folder, out = Path(folder), Path(out)
    if out.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"{out} must not be inside {folder}: its pictures would be distorted again by the next run")
    pictures = pictures_below(folder)
    if not pictures:
        raise FileNotFoundError(f"{folder} contains no pictures ({', '.join(SUFFIXES)})")
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
    if levels is None:
        return list(DISTORTIONS[name].levels)
    for level in levels:
        parse_level(name, level)
    return list(levels)
