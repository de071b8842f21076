"""The stimuli of model-vs-human (Geirhos et al. 2021, arXiv:2106.07411): 17 data sets, their files and file names.

A stimulus of the parametric sets is called NUMBER_CODE_SUBJECT_CONDITION_CATEGORY_K_IMAGEID.png, where K is the count
of images per category and condition and IMAGEID may hold one more underscore (n04111531_14126). Sketch and stylized
share the form with other image ids. Edges, silhouettes and cue conflicts lie on disks under the image id alone
(airplane1-bicycle2.png), in a folder per category; the human data name them in the long form.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from ssmclip.registry import Registry

# Alphabetical; the response codes of the human data count in this order.
CATEGORIES = tuple(
    "airplane bear bicycle bird boat bottle car cat chair clock dog elephant keyboard knife oven truck".split()
)
# The sets of the paper, as its tables average them: a set that is added to STIMULUS_SETS is none of these.
PARAMETRIC_SETS = (
    "colour",
    "contrast",
    "high-pass",
    "low-pass",
    "phase-scrambling",
    "power-equalisation",
    "false-colour",
    "rotation",
    "eidolonI",
    "eidolonII",
    "eidolonIII",
    "uniform-noise",
)
CUE_CONFLICT = "cue-conflict"
GEIRHOS_2021 = (*PARAMETRIC_SETS, "sketch", "stylized", "edge", "silhouette", CUE_CONFLICT)

# The forms of image ids.
PARAMETRIC = re.compile(r"n\d{8}_\d+\.png")
NOT_PARAMETRIC = re.compile(r"[a-z]+-\d{4}-(ilsvrc2012-val-\d{8}|sketch-\d+)\.png", re.IGNORECASE)
SHAPE = re.compile(r"([a-z]+)\d+(-[a-z]+\d+)?\.png")


class BadName(ValueError):
    """A file name that does not follow its data set's form, or several; the message names and counts them."""


@dataclass(frozen=True)
class StimulusSet:
    """One data set of stimuli.

    code: the second field of its file names; conditions: labels as the human data give them, undistorted first;
    count: stimuli per observer; folders: other names the folder goes by; image_id: the form of its image ids.
    """

    name: str
    code: str
    conditions: tuple[str, ...]
    count: int
    folders: tuple[str, ...] = ()
    image_id: re.Pattern = PARAMETRIC


@dataclass(frozen=True)
class Stimulus:
    """One file of a data set.

    number: its place in the order of presentation; subject: "s01" ..., or "dnn"; both None under short names.
    condition: the label as in the human data ("0.9" where the file says "0.90"), category: one of CATEGORIES;
    image_id: what the human data match stimuli by, with its suffix, "n04111531_14126.png" or "oven10.png".
    """

    dataset: str
    name: str
    number: int | None
    code: str
    subject: str | None
    condition: str
    category: str
    image_id: str
    path: Path | None = None


STIMULUS_SETS: Registry[StimulusSet] = Registry("stimulus set")


def _add(name: str, code: str, conditions: str, count: int, **fields) -> None:
    STIMULUS_SETS.register(name)(StimulusSet(name, code, tuple(conditions.split()), count, **fields))


_add("colour", "cl", "cr bw", 1280)
_add("contrast", "cop", "c100 c50 c30 c15 c10 c05 c03 c01", 1280)
_add("high-pass", "hp", "inf 3.0 1.5 1.0 0.7 0.55 0.45 0.4", 1280)
_add("low-pass", "lp", "0 1 3 5 7 10 15 40", 1280)
_add("phase-scrambling", "ps", "0 30 60 90 120 150 180", 1120)
_add("power-equalisation", "pow", "0 pow", 1120)
_add("false-colour", "fc", "True False", 1120)
_add("rotation", "rot", "0 90 180 270", 1280)
_add("eidolonI", "eid", "1-10-10 2-10-10 4-10-10 8-10-10 16-10-10 32-10-10 64-10-10 128-10-10", 1280)
_add("eidolonII", "eid", "1-3-10 2-3-10 4-3-10 8-3-10 16-3-10 32-3-10 64-3-10 128-3-10", 1280)
_add("eidolonIII", "eid", "1-0-10 2-0-10 4-0-10 8-0-10 16-0-10 32-0-10 64-0-10 128-0-10", 1280)
_add("uniform-noise", "nse", "0.0 0.03 0.05 0.1 0.2 0.35 0.6 0.9", 1280)
_add("sketch", "ske", "0", 800, image_id=NOT_PARAMETRIC)
_add("stylized", "sty", "0", 800, image_id=NOT_PARAMETRIC)
# The other folder names are those of rgeirhos/texture-vs-shape, which publishes the same files.
_add("edge", "edg", "0", 160, folders=("edges",), image_id=SHAPE)
_add("silhouette", "sif", "0", 160, folders=("silhouettes", "filled-silhouettes"), image_id=SHAPE)
_add("cue-conflict", "s5n", "0", 1280, folders=("style-transfer-preprocessed-512",), image_id=SHAPE)


def parse_stimulus_name(name: str, dataset: str) -> Stimulus:
    """Parse a file name. Raises BadName if it does not follow the data set's form, UnknownName for the set.

    >>> parse_stimulus_name("0001_nse_s01_0.90_knife_10_n03041632_82878.png", "uniform-noise").condition
    '0.9'
    >>> parse_stimulus_name("airplane1-bicycle2.png", "cue-conflict").category
    'airplane'
    """
    known = STIMULUS_SETS[dataset]
    if "_" not in name and known.image_id is SHAPE:
        return Stimulus(dataset, name, None, known.code, None, known.conditions[0], *_category(name, name, known))
    fields = name.split("_", maxsplit=6)
    if len(fields) < 7:
        raise BadName(
            f"{name!r} must be NUMBER_{known.code}_SUBJECT_CONDITION_CATEGORY_K_IMAGEID (got {len(fields)} fields)"
        )
    number, code, subject, condition, category, count, image_id = fields
    if not (number.isdigit() and count.isdigit()):
        raise BadName(f"{name!r}: {number if count.isdigit() else count!r} must be a number")
    if code != known.code:
        raise BadName(f"{name!r}: the code of {dataset} must be {known.code!r} (got {code!r})")
    found, image_id = _category(name, image_id, known)
    if category not in CATEGORIES or found not in (category, ""):
        raise BadName(f"{name!r}: {category!r} is not its category; known: {', '.join(CATEGORIES)}")
    return Stimulus(dataset, name, int(number), code, subject, _condition(name, condition, known), category, image_id)


def _category(name: str, image_id: str, known: StimulusSet) -> tuple[str, str]:
    """Return (category that the image id begins with, or ""; image id)."""
    if not known.image_id.fullmatch(image_id):
        raise BadName(f"{name!r}: {image_id!r} is not an image id of {known.name}")
    category = "" if known.image_id is PARAMETRIC else re.match("[a-z]+", image_id, re.IGNORECASE).group().lower()
    if category and category not in CATEGORIES:
        raise BadName(f"{name!r}: {category!r} is not one of {', '.join(CATEGORIES)}")
    return category, image_id


def _condition(name: str, text: str, known: StimulusSet) -> str:
    """Return the label used in the human data: files write 0.90, 3 and false for 0.9, 3.0 and False."""
    for label in known.conditions:
        if text.lower() == label.lower() or _number(text) == _number(label) is not None:
            return label
    raise BadName(f"{name!r}: {text!r} is not a condition of {known.name}; known: {', '.join(known.conditions)}")


def _number(text: str) -> float | None:
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else None


def find_stimuli(root: Path | str, dataset: str, *, rejected: list[str] | None = None) -> list[Stimulus]:
    """Return the data set's files under `root`, sorted by name: dnn/session-1/*.png or CATEGORY/*.png.

    root: the folder of all data sets (`datasets/`, `stimuli/`), or of this one. rejected: a list that takes a message
    for each PNG whose name does not parse; without one, such files raise BadName, which names five and counts all.
    Raises FileNotFoundError when no such folder or no PNG is there, ValueError for two files of one image id and
    condition.
    """
    folder = _folder(Path(root), STIMULUS_SETS[dataset])
    session = folder / "dnn"
    files = sorted(
        path
        for path in (session if session.is_dir() else folder).rglob("*")
        if path.suffix.lower() == ".png" and not path.name.startswith(".")
    )
    stimuli: list[Stimulus] = []
    bad: list[str] = []
    for path in files:
        try:
            stimulus = parse_stimulus_name(path.name, dataset)
        except BadName as error:
            bad.append(f"{path.relative_to(folder)}: {error}")
        else:
            stimuli.append(replace(stimulus, path=path))
    if bad and rejected is None:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise BadName(
            f"{len(bad)} of {len(files)} files in {folder} are not named as in {dataset}: {'; '.join(bad[:5])}{more}"
        )
    if rejected is not None:
        rejected += bad
    if not stimuli:
        raise FileNotFoundError(
            f"{folder} contains no stimulus of {dataset} ({len(files)} PNG files, none with its names)"
        )
    _refuse_twice(stimuli, folder)
    return stimuli


def _folder(root: Path, known: StimulusSet) -> Path:
    names = (known.name, *known.folders)
    places = [root / name for name in names] + [root / "datasets" / known.name]
    if root.name in names:
        places.append(root)
    for place in places:
        if place.is_dir():
            return place
    raise FileNotFoundError(f"{known.name} not found: none of {', '.join(map(str, places))} is a folder")


def _refuse_twice(stimuli: list[Stimulus], folder: Path) -> None:
    seen: dict[tuple[str, str], str] = {}
    for stimulus in stimuli:
        key = (stimulus.image_id, stimulus.condition)
        if key in seen:
            raise ValueError(f"{folder}: {seen[key]} and {stimulus.name} are the same image in the same condition")
        seen[key] = stimulus.name
