"""The trials (subject, stimulus, response) of people and of models on the sets of `stimuli.py`, as arrays.

h people · m models · n stimuli · t trials · i images

Read are parquet and csv files, and folders of csv files as model-vs-human keeps them (raw-data/SET/SET_WHO_*.csv).
Columns in any order and any case: dataset, subject (subj), image_id (imagename), condition, category, object_response
(and source, where equal names stand for different subjects); or a table with a column s01, s02, ... of response codes
for each person.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Int, Shaped
from pyarrow import csv

from ssmclip.data.delimited import Delimited, unpack
from ssmclip.data.images import files_below
from ssmclip.humans.stimuli import CATEGORIES, STIMULUS_SETS

NO_ANSWER = -1  # the subject was asked and gave none of the categories: an error
NOT_SHOWN = -2
UNKNOWN = -1  # of a condition or category: the table doesn't say

NAMES = {"subj": "subject", "imagename": "image_id", "image": "image_id", "response": "object_response"}
NEEDED = ("subject", "image_id", "object_response")
PERSON = re.compile(r"s\d+")
A_PERSON = re.compile(r"(subject|s)?\d+")  # of a name without marks: subject-01, s01, 1
NOTHING = ("", "na", "nan", "none", "null", "<na>")
# The id is the last field; an ImageNet id, n04111531_14126, is the last two.
IMAGE_ID = r"(?:^|[_/])(?P<id>n0[^_/]*_[^_/]+|[^_/]+)$"


@dataclass(frozen=True)
class Trials:
    """A table of trials, as codes.

    dataset: place in STIMULUS_SETS; subject: place in `subjects`; image: place in `images` (image ids, lower case, no
    suffix); condition: place in the set's `conditions`; category, response: place in CATEGORIES. UNKNOWN stands for a
    condition or category the table leaves out, NO_ANSWER for a missing response.
    notes: what was odd, in words, with counts.
    """

    dataset: Int[np.ndarray, " t"]
    subject: Int[np.ndarray, " t"]
    image: Int[np.ndarray, " t"]
    condition: Int[np.ndarray, " t"]
    category: Int[np.ndarray, " t"]
    response: Int[np.ndarray, " t"]
    subjects: tuple[str, ...]
    images: Shaped[np.ndarray, " i"]
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.dataset)


@dataclass(frozen=True)
class Answers:
    """One data set: the stimuli people saw, in the order of conditions and image ids, and each subject's responses.

    conditions, categories: places in the set's conditions and in CATEGORIES.
    humans, models: names; human, model: their responses, places in CATEGORIES, NO_ANSWER or NOT_SHOWN.
    """

    dataset: str
    images: Shaped[np.ndarray, " n"]
    conditions: Int[np.ndarray, " n"]
    categories: Int[np.ndarray, " n"]
    humans: tuple[str, ...]
    human: Int[np.ndarray, "h n"]
    models: tuple[str, ...]
    model: Int[np.ndarray, "m n"]


def read_trials(source: str | Path | Iterable[str | Path]) -> Trials:
    """Read the trials from a parquet or csv file, a folder of them (searched recursively), or several of these.

    A csv file without a column `dataset` is of the set its name begins with, or its folder's. Raises
    FileNotFoundError, and ValueError for columns that are missing, data sets nobody knows and category names that are
    none of the 16. Responses that are no category are counted in `notes` and stand as errors, as in the literature.
    """
    files = [file for one in ([source] if isinstance(source, (str, Path)) else source) for file in _files(Path(one))]
    if not files:
        raise ValueError("no file of trials given: name at least one")
    return _joined([_trials(_read(file), str(file)) for file in files])


def match_trials(humans: Trials, models: Trials) -> tuple[list[Answers], list[str]]:
    """Return the models' and people's trials for each data set, and notes on what could not be used.

    A trial is matched by data set, image id and, where the set has several and the table gives it, condition. People
    are told by their names (subject-01, s01, 1), so both tables may be one. Left out and noted: data sets and stimuli
    no person saw. Models that lack stimuli of a data set are noted and kept. Raises ValueError for two trials of one
    subject and stimulus, for people who did not see all stimuli of their data set, and for two tables that give a
    stimulus different categories.
    """
    notes = [*humans.notes, *models.notes]
    humans = _named(humans, True, "the table of people has subjects whose names are not those of people", notes)
    models = _named(models, False, "the table of decisions has people", notes)
    images = np.unique(np.concatenate([humans.images, models.images]))
    humans, models = (_recoded(trials, images) for trials in (humans, models))
    found = []
    for code, name in enumerate(STIMULUS_SETS):
        seen, asked = _select(humans, humans.dataset == code), _select(models, models.dataset == code)
        if not len(seen):
            if len(asked):
                notes.append(f"{name}: ignored, as its {len(asked):,} decisions have no trials of people")
            continue
        found.append(_matched(name, seen, asked, notes))
    if not found:
        raise ValueError("nothing to compare with: the table of people has no trials of a known data set")
    return found, notes


def _named(trials: Trials, people: bool, says: str, notes: list[str]) -> Trials:
    person = np.array([A_PERSON.fullmatch(_plain(name)) is not None for name in trials.subjects], bool)
    fits = (person == people)[trials.subject]
    if not fits.all():
        others = [name for name, other in zip(trials.subjects, person != people, strict=True) if other]
        more = f" and {len(others) - 5} more" if len(others) > 5 else ""
        notes.append(f"{says}; ignored: {', '.join(others[:5])}{more} ({(~fits).sum():,} trials)")
    return _select(trials, fits)


def _matched(name: str, seen: Trials, asked: Trials, notes: list[str]) -> Answers:
    several = len(STIMULUS_SETS[name].conditions) > 1
    if several and (seen.condition == UNKNOWN).any():
        raise ValueError(f"{name}: {(seen.condition == UNKNOWN).sum()} trials of people have no condition")
    if (seen.category == UNKNOWN).any():
        raise ValueError(f"{name}: {(seen.category == UNKNOWN).sum()} trials of people have no category")
    keys = _keys(seen)
    stimuli, first = np.unique(keys, return_index=True)
    place_human = np.searchsorted(stimuli, keys)
    human = _responses(name, seen, place_human, len(stimuli))
    if (unseen := (human == NOT_SHOWN).sum(axis=1)).any():
        who = _used(seen)[int(unseen.argmax())]
        raise ValueError(
            f"{name}: person {who} saw {len(stimuli) - unseen.max():,} of the {len(stimuli):,} stimuli of the others; "
            "all people must have seen the same stimuli"
        )
    categories = seen.category[first]
    _same_category(name, seen, place_human, categories)
    place = _places(asked, stimuli)
    if strangers := (place < 0).sum():
        example = seen.images[asked.image[place < 0][0]]
        notes.append(
            f"{name}: {strangers:,} of {len(asked):,} decisions are on stimuli no person saw, such as {example}"
        )
    asked, place = _select(asked, place >= 0), place[place >= 0]
    _same_category(name, asked, place, categories)
    model = _responses(name, asked, place, len(stimuli))
    for who, missing in zip(_used(asked), (model == NOT_SHOWN).sum(axis=1), strict=True):
        if missing:
            notes.append(f"{name}: {who} has {len(stimuli) - missing:,} of {len(stimuli):,} stimuli")
    return Answers(
        name, seen.images[seen.image[first]], seen.condition[first], categories, _used(seen), human, _used(asked), model
    )


def _keys(trials: Trials) -> np.ndarray:
    return trials.condition.astype(np.int64) * len(trials.images) + trials.image


def _places(asked: Trials, stimuli: np.ndarray) -> np.ndarray:
    """Return each trial's place among the stimuli people saw, or -1; without a condition, by the image."""
    keys = _keys(asked)
    if (unknown := asked.condition == UNKNOWN).any():
        image_of = stimuli % len(asked.images)
        order = np.argsort(image_of, kind="stable")
        at = np.searchsorted(image_of[order], asked.image[unknown]).clip(max=len(order) - 1)
        keys[unknown] = np.where(image_of[order][at] == asked.image[unknown], stimuli[order][at], -1)
    place = np.searchsorted(stimuli, keys).clip(max=len(stimuli) - 1)
    return np.where(stimuli[place] == keys, place, -1)


def _responses(name: str, trials: Trials, place: np.ndarray, n: int) -> np.ndarray:
    codes = np.unique(trials.subject)
    cell = np.searchsorted(codes, trials.subject) * n + place
    counts = np.bincount(cell, minlength=len(codes) * n)
    if (counts > 1).any():
        twice = np.flatnonzero(counts > 1)
        trial = int(np.flatnonzero(cell == twice[0])[0])
        raise ValueError(
            f"{name}: {len(twice):,} stimuli have more than one trial of the same subject; the first: "
            f"{trials.subjects[trials.subject[trial]]}, {trials.images[trials.image[trial]]}. Remove the repetitions, "
            "or give the subjects different names"
        )
    responses = np.full(len(codes) * n, NOT_SHOWN, np.int8)
    responses[cell] = trials.response
    return responses.reshape(len(codes), n)


def _same_category(name: str, trials: Trials, place: np.ndarray, categories: np.ndarray) -> None:
    other = (trials.category != UNKNOWN) & (trials.category != categories[place])
    if other.any():
        trial = int(np.flatnonzero(other)[0])
        raise ValueError(
            f"{name}: {other.sum():,} trials have another category than other trials of their stimulus; the first: "
            f"{trials.subjects[trials.subject[trial]]}, {trials.images[trials.image[trial]]} is "
            f"{CATEGORIES[trials.category[trial]]!r} or {CATEGORIES[categories[place[trial]]]!r}"
        )


def _used(trials: Trials) -> tuple[str, ...]:
    return tuple(trials.subjects[code] for code in np.unique(trials.subject))


def _select(trials: Trials, where: np.ndarray) -> Trials:
    columns = (trials.dataset, trials.subject, trials.image, trials.condition, trials.category, trials.response)
    return Trials(*(column[where] for column in columns), trials.subjects, trials.images)


def _recoded(trials: Trials, images: np.ndarray) -> Trials:
    place = np.searchsorted(images, trials.images)
    columns = (trials.dataset, trials.subject, place[trials.image], trials.condition, trials.category, trials.response)
    return Trials(*columns, trials.subjects, images, trials.notes)


def _joined(parts: Sequence[Trials]) -> Trials:
    if len(parts) == 1:
        return parts[0]
    images = np.unique(np.concatenate([part.images for part in parts]))
    spelling: dict[str, str] = {}
    for part in parts:
        for name in part.subjects:
            spelling.setdefault(_plain(name), name)
    subjects = tuple(spelling.values())
    code = {plain: i for i, plain in enumerate(spelling)}
    moved = [
        (_recoded(part, images), np.array([code[_plain(name)] for name in part.subjects], np.int32)) for part in parts
    ]
    return Trials(
        np.concatenate([part.dataset for part in parts]),
        np.concatenate([codes[part.subject] for part, codes in moved]),
        np.concatenate([part.image for part, _ in moved]),
        np.concatenate([part.condition for part in parts]),
        np.concatenate([part.category for part in parts]),
        np.concatenate([part.response for part in parts]),
        subjects,
        images,
        tuple(dict.fromkeys(note for part in parts for note in part.notes)),
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        found = files_below(path, ("csv", "parquet"))
        if not found:
            raise FileNotFoundError(f"{path} contains no csv or parquet file")
        return found
    if not path.is_file():
        raise FileNotFoundError(f"file of trials not found: {path}")
    return [path]


def _read(file: Path) -> pa.Table:
    """Read the file's table with the column names used here; values of a csv file stay text."""
    try:
        if file.suffix.lower() == ".csv":
            Delimited(file, unpack(file)).check()
            with csv.open_csv(file) as opened:
                header = opened.schema.names
            as_text = csv.ConvertOptions(column_types=dict.fromkeys(header, pa.string()), strings_can_be_null=False)
            table = csv.read_csv(file, convert_options=as_text)
        else:
            table = pq.read_table(file)
            table = table.drop_columns([name for name in table.column_names if name.lower() == "probabilities"])
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file} is not a valid table: {error}") from error
    names = [NAMES.get(name.strip().lower(), name.strip().lower()) for name in table.column_names]
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{file} has more than one column for {', '.join(twice)}")
    table = table.rename_columns(names)
    if "dataset" not in names:
        table = table.append_column("dataset", pa.array([_set_of(file)] * len(table)))
    return table


def _set_of(file: Path) -> str:
    """Return the data set of a csv file: the start of its name, contrast_subject-01_session_1.csv, or its folder."""
    known = _set_codes()
    for word in (file.name.split("_")[0], file.parent.name):
        if _plain(word) in known:
            return word
    raise ValueError(
        f"{file} does not name its data set: add a column `dataset`, or rename it to SET_… or its folder to SET; "
        f"known: {', '.join(STIMULUS_SETS)}"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _set_codes() -> dict[str, int]:
    return {_plain(name): code for code, name in enumerate(STIMULUS_SETS)}


def _trials(table: pa.Table, where: str) -> Trials:
    if "object_response" not in table.column_names and any(map(PERSON.fullmatch, table.column_names)):
        table = _long(table, where)
    if missing := [name for name in NEEDED if name not in table.column_names]:
        raise ValueError(f"{where} lacks the columns {', '.join(missing)}; it has {', '.join(table.column_names)}")
    sets, of_set = _encoded(table["dataset"])
    known = _set_codes()
    if unknown := [name for name in sets if _plain(name) not in known]:
        raise ValueError(
            f"{where}: unknown data sets {unknown[:5]} ({len(unknown)} in all); known: {', '.join(STIMULUS_SETS)}"
        )
    dataset = np.array([known[_plain(name)] for name in sets], np.int64)[of_set]
    images, image = _image_ids(table["image_id"], where)
    subjects, subject = _subjects(*_encoded(table["subject"]))
    if "source" in table.column_names:
        subjects, subject = _by_source(subjects, subject, dataset, *_encoded(table["source"]))
    notes: list[str] = []
    return Trials(
        dataset,
        subject,
        image,
        _conditions(table, dataset, where, notes),
        _categories(table, where),
        _object_responses(table["object_response"], where, notes),
        subjects,
        images,
        tuple(notes),
    )


def _long(table: pa.Table, where: str) -> pa.Table:
    """Return one row per person and stimulus, from a table with a column of response codes for each person."""
    people = [name for name in table.column_names if PERSON.fullmatch(name)]
    rest = table.drop_columns(people)
    words = pa.array([*CATEGORIES, "na"])
    parts = []
    for name in people:
        codes = table[name].combine_chunks()
        keep = pc.is_valid(codes)
        codes = codes.filter(keep).cast(pa.int64())
        if len(codes) and not (-1 <= pc.min(codes).as_py() and pc.max(codes).as_py() < len(CATEGORIES)):
            raise ValueError(f"{where}: column {name} has codes outside -1 .. {len(CATEGORIES) - 1}")
        said = pc.take(words, pc.if_else(pc.less(codes, 0), len(CATEGORIES), codes))
        part = rest.filter(keep)
        parts.append(
            part.append_column("subject", pa.array([name] * len(part), pa.string())).append_column(
                "object_response", said
            )
        )
    return pa.concat_tables(parts)


def _encoded(column: pa.ChunkedArray) -> tuple[list[str], np.ndarray]:
    """Return a column as (its distinct values as text, "" for none; each row's place among them)."""
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):  # of several dictionaries
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.string())
    if not pa.types.is_dictionary(array.type):
        array = array.dictionary_encode()
    values = ["" if value is None else str(value) for value in array.dictionary.to_pylist()]
    codes = array.indices.cast(pa.int32()).fill_null(len(values)).to_numpy(zero_copy_only=False)
    return values + [""] * bool(array.null_count), codes


def _subjects(names: list[str], codes: np.ndarray) -> tuple[tuple[str, ...], np.ndarray]:
    """Return the subjects; names that differ in case and punctuation only (swag-vit-b16, SWAG_ViT_B16) are one."""
    kept: dict[str, str] = {}
    for name in names:
        kept.setdefault(_plain(name), name)
    code = {plain: i for i, plain in enumerate(kept)}
    return tuple(kept.values()), np.array([code[_plain(name)] for name in names], np.int32)[codes]


def _by_source(
    subjects: tuple[str, ...], subject: np.ndarray, dataset: np.ndarray, sources: list[str], source: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """Split subjects with trials of one data set from several sources: "resnet50 (their@fork)"."""
    triples = np.unique(np.stack([subject, dataset, source]), axis=1)
    pairs, times = np.unique(triples[:2], axis=1, return_counts=True)
    split = np.unique(pairs[0, times > 1])
    if not len(split):
        return subjects, subject
    names = {(who, -1): subjects[who] for who in range(len(subjects))}
    names |= {(who, i): f"{subjects[who]} ({name})" for who in split.tolist() for i, name in enumerate(sources)}
    width = len(sources) + 1
    key = subject * width + np.where(np.isin(subject, split), source + 1, 0)
    used, code = np.unique(key, return_inverse=True)
    return tuple(names[k // width, k % width - 1] for k in used.tolist()), code


def _image_ids(column: pa.ChunkedArray, where: str) -> tuple[np.ndarray, np.ndarray]:
    names, codes = _encoded(column)
    lower = pc.replace_substring_regex(pc.utf8_lower(pa.array(names)), r"\.(png|jpe?g)$", "")
    ids = pc.struct_field(pc.extract_regex(lower, IMAGE_ID), "id")
    if (bad := np.flatnonzero(np.isin(codes, np.flatnonzero(pc.is_null(ids).to_numpy(zero_copy_only=False))))).size:
        raise ValueError(f"{where}: {bad.size:,} trials have no image id; the first: {names[codes[bad[0]]]!r}")
    ids = ids.fill_null("").dictionary_encode()
    images, place = np.unique(np.array(ids.dictionary.to_pylist(), dtype=str), return_inverse=True)
    return images, place[ids.indices.to_numpy(zero_copy_only=False)][codes]


def _conditions(table: pa.Table, dataset: np.ndarray, where: str, notes: list[str]) -> np.ndarray:
    """Return the place of each trial's label in its set. Files write 0.90, 3 and true for 0.9, 3.0 and True."""
    condition = np.full(len(dataset), UNKNOWN, np.int16)
    labels, codes = (
        _encoded(table["condition"]) if "condition" in table.column_names else ([""], np.zeros_like(dataset))
    )
    sets = tuple(STIMULUS_SETS)
    for code in np.unique(dataset):
        known = STIMULUS_SETS[sets[code]].conditions
        here = dataset == code
        if len(known) == 1:  # whatever the label says: models' files say nan
            condition[here] = 0
            continue
        place = np.array([_condition(label, known) for label in labels], np.int16)
        condition[here] = place[codes[here]]
        unknown = [labels[c] for c in np.unique(codes[here]) if place[c] == UNKNOWN and not _nothing(labels[c])]
        if unknown:
            raise ValueError(
                f"{where}: {sets[code]} has no condition {', '.join(map(repr, unknown))}; known: {', '.join(known)}"
            )
    return condition


def _condition(label: str, known: Sequence[str]) -> int:
    for place, name in enumerate(known):
        if _spelled(label) == _spelled(name):
            return place
    return UNKNOWN


def _spelled(label: str) -> tuple[str, float | None]:
    """Return a label independent of case and number format.

    >>> _spelled("0.90") == _spelled("0.9"), _spelled("c05") == _spelled("C5"), _spelled("True") == _spelled("true")
    (True, True, True)
    """
    text = label.strip().lower()
    number = re.fullmatch(r"([a-z]*)(\d+(?:\.\d+)?)", text)
    return (number[1], float(number[2])) if number else (text, None)


def _nothing(label: str) -> bool:
    return label.strip().lower() in NOTHING


def _categories(table: pa.Table, where: str) -> np.ndarray:
    if "category" not in table.column_names:
        return np.full(len(table), UNKNOWN, np.int8)
    names, codes = _encoded(table["category"])
    place = {name: i for i, name in enumerate(CATEGORIES)}
    used = [names[code] for code in np.unique(codes)]
    if unknown := [name for name in used if name.strip().lower() not in place and not _nothing(name)]:
        raise ValueError(f"{where}: unknown categories {unknown[:5]}; known: {', '.join(CATEGORIES)}")
    return np.array([place.get(name.strip().lower(), UNKNOWN) for name in names], np.int8)[codes]


def _object_responses(column: pa.ChunkedArray, where: str, notes: list[str]) -> np.ndarray:
    names, codes = _encoded(column)
    place = {name: i for i, name in enumerate(CATEGORIES)}
    coded = np.array([place.get(name.strip().lower(), NO_ANSWER) for name in names], np.int8)
    odd = {code: names[code] for code in np.unique(codes) if coded[code] < 0 and not _nothing(names[code])}
    if odd:
        count = int(np.isin(codes, list(odd)).sum())
        words = ", ".join(map(repr, list(odd.values())[:5]))
        notes.append(f"{where}: {count:,} responses are not categories ({words}) and count as errors")
    return coded[codes]
