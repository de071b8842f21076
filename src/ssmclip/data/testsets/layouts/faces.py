"""Test sets of faces, whose groups are the annotations of their authors: how unequally is a model right?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ssmclip.data.images import pictures_below
from ssmclip.data.testsets.card import LAYOUTS, WHOLE, Card, Found
from ssmclip.data.testsets.files import picture_files, read_rows

GENDERS = ("Male", "Female")  # in the order of the cards' classes, and of UTKFace's numbers
RACES = ("White", "Black", "Asian", "Indian", "Others")  # by UTKFace's numbers
UTK_NAME = re.compile(r"\d+_([01])_([0-4])_\d+\.jpe?g(\.chip\.jpg)?", re.IGNORECASE)
PLACES = ("", "UTKFace", "utkface_aligned_cropped/UTKFace", "crop_part1")


@LAYOUTS.register("fairface_csv")
def fairface_csv(folder: Path, card: Card) -> Found | str:
    """fairface_label_val.csv (file, age, gender, race) and val/*.jpg; also those of train. Groups are races."""
    split = card.part or "val"
    table = folder / f"fairface_label_{split}.csv"
    if not table.is_file():
        return table.name
    rows = read_rows(table)
    if missing := {"file", "gender", "race"} - set(rows[0]):
        raise ValueError(f"{table} has no column {' and no '.join(sorted(missing))}; it has {', '.join(rows[0])}")
    if other := [row for row in rows if row["gender"] not in GENDERS]:
        raise ValueError(
            f"{table}: the gender of {other[0]['file']} must be Male or Female (got {other[0]['gender']!r})"
        )
    paths = [folder / row["file"] for row in rows]
    labels = [GENDERS.index(row["gender"]) for row in rows]
    return _faces(table, folder, paths, labels, [row["race"] for row in rows], split)


@LAYOUTS.register("utkface_names")
def utkface_names(folder: Path, card: Card) -> Found | str:
    """[UTKFace/]AGE_GENDER_RACE_DATE.jpg.chip.jpg: all faces, for which no split was published. Groups are races.

    Pictures of other names, of which the authors' copy has a few, are left out and counted.
    """
    read = ({path: UTK_NAME.fullmatch(path.name) for path in _direct(folder / place)} for place in PLACES)
    named = next((names for names in read if any(names.values())), {})
    known = {path: (int(found[1]), RACES[int(found[2])]) for path, found in named.items() if found}
    if not known:
        return "UTKFace/AGE_GENDER_RACE_DATE.jpg.chip.jpg"
    others = len(named) - len(known)
    labels, races = [label for label, _ in known.values()], [race for _, race in known.values()]
    said = f"{others} pictures whose names do not say age, gender and race are left out" if others else ""
    return _faces(next(iter(known)).parent, folder, list(known), labels, races, WHOLE, said)


def _direct(folder: Path) -> list[Path]:
    return [path for path in pictures_below(folder) if path.parent == folder] if folder.is_dir() else []


def _faces(
    where: Path,
    folder: Path,
    paths: Sequence[Path],
    labels: Sequence[int],
    groups: Sequence[str],
    split: str,
    said: str = "",
) -> Found:
    there = [place for place, path in enumerate(paths) if path.is_file()]
    if not there:
        raise ValueError(f"{where} names {len(paths)} pictures and none of them is there")
    files = [paths[place] for place in there]
    return Found(
        where=str(where),
        pictures=picture_files(files),
        keys=[path.relative_to(folder).as_posix() for path in files],
        labels=[labels[place] for place in there],
        groups=[groups[place] for place in there],
        files=tuple(files),
        said=said,
        split=split,
    )
