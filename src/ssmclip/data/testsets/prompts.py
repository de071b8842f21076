"""Class names and prompts: from a card, from installed packages, or from a file of labels and templates."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

from ssmclip.config.lists import split_list
from ssmclip.data.images import is_litter
from ssmclip.data.lines import split_lines
from ssmclip.data.testsets.card import Card
from ssmclip.data.testsets.files import read_json

OPEN_CLIP, CLIP_BENCHMARK, TIMM = "open_clip:", "clip_benchmark:", "timm:"
IMAGENET_NAMES = f"{OPEN_CLIP}IMAGENET_CLASSNAMES"  # in the order of its WordNet ids
INSTALL = "pip install clip-benchmark (it is read, not run), or give --prompts FILE"

Names = tuple[str | tuple[str, ...], ...]


@dataclass(frozen=True)
class Prompts:
    """Labels and templates of several data sets, by name. A label is a name, or several that mean the same.

    fallback: whose templates serve a data set that has none ("": that is an error).
    """

    labels: Mapping[str, Names] = field(default_factory=dict)
    templates: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    source: str = ""
    fallback: str = ""


def read_prompts(paths: str | Sequence[str]) -> Prompts:
    """Return the prompts in files of labels and of templates.

    paths: one, or several with commas between, or a list; a folder stands for labels.json, templates.json ... in it. A
    file is an object data set -> list, as in SLIP (whose
    protocol CLIP-Mamba's is) and CLIP_benchmark: of names or lists of synonyms; or of templates, with {} or {c} for the
    name in each. Raises FileNotFoundError, and ValueError that names the file and what in it is neither.
    """
    labels: dict[str, Names] = {}
    templates: dict[str, tuple[str, ...]] = {}
    paths = split_list(paths, os.path.exists) if isinstance(paths, str) else paths
    files = [file for path in paths for file in _json_files(Path(path))]
    if not files:
        raise FileNotFoundError(f"no file of prompts at {paths!r}")
    for file in files:
        content = _read_object(file)
        if all(isinstance(item, str) and _is_template(item) for items in content.values() for item in items):
            templates |= {name: tuple(map(_braces, items)) for name, items in content.items()}
        elif any(isinstance(item, str) and _is_template(item) for items in content.values() for item in items):
            bad = next(i for items in content.values() for i in items if not (isinstance(i, str) and _is_template(i)))
            raise ValueError(f"{file} mixes templates with something without {{}}, where the name goes: {bad!r}")
        else:
            labels |= {name: tuple(map(_synonyms, items)) for name, items in content.items()}
    return Prompts(labels, templates, ", ".join(file.name for file in files))


def _json_files(path: Path) -> list[Path]:
    return [file for file in sorted(path.glob("*.json")) if not is_litter(file.name)] if path.is_dir() else [path]


def clip_benchmark_prompts() -> Prompts:
    """What CLIP_benchmark asks: its English class names and templates, ImageNet's templates where it has none."""
    labels = {name: tuple(items) for name, items in _clip_benchmark("en_classnames.json").items()}
    templates = {
        name: tuple(map(_braces, items))
        for name, items in _clip_benchmark("en_zeroshot_classification_templates.json").items()
        if isinstance(items, list)
    }
    return Prompts(labels, templates, "CLIP_benchmark", fallback="imagenet1k")


def names_on(card: Card) -> tuple[str, ...]:
    """The class names a card stands for, () when they come from its files. Raises ValueError for a missing package."""
    if not isinstance(card.classnames, str):
        return card.classnames
    names = _referred(card, card.classnames, "en_classnames.json")
    wnids = folders_on(card)
    if card.classnames.startswith(OPEN_CLIP) and wnids and len(wnids) < len(names):
        place = {wnid: i for i, wnid in enumerate(_synsets("imagenet_synsets"))}
        names = tuple(names[place[wnid]] for wnid in wnids)
    return names


def templates_on(card: Card) -> tuple[str, ...]:
    """The templates a card stands for. Raises ValueError for a missing package."""
    if not isinstance(card.templates, str):
        return card.templates
    return _referred(card, card.templates, "en_zeroshot_classification_templates.json")


def folders_on(card: Card) -> tuple[str, ...]:
    """The names of a card's class folders in label order, () when the card does not list them."""
    if isinstance(card.folders, str):
        return _synsets(card.folders.removeprefix(TIMM)) if card.folders.startswith(TIMM) else ()
    return card.folders


def synsets_on(card: Card) -> tuple[str, ...]:
    """The WordNet ids of a card's classes in label order, () where they are not ImageNet's."""
    if folders := folders_on(card):
        return folders if all(re.fullmatch(r"n\d{8}", folder) for folder in folders) else ()
    return _synsets("imagenet_synsets") if card.classnames == IMAGENET_NAMES else ()


def chosen(prompts: Prompts, card: Card, classnames: Sequence[str]) -> tuple[Names, tuple[str, ...]]:
    """(labels, templates) of a card's data set from a file of prompts, in the data set's own label order.

    classnames: those of the data set in label order. Labels the file spells alike are put in that order; others must
    be as many, and are taken in their own. Raises ValueError for templates that are missing and labels too many or few.
    """
    templates = _first(prompts.templates, card) or prompts.templates.get(prompts.fallback)
    if not templates:
        raise ValueError(f"{prompts.source} has no templates for {' or '.join(_keys(card))}")
    labels = _first(prompts.labels, card)
    if labels is None:
        return tuple(classnames), templates
    if len(labels) != len(classnames):
        raise ValueError(
            f"{prompts.source} has {len(labels)} labels for {card.name}, the data set {len(classnames)} classes "
            f"({', '.join(classnames[:5])} ...)"
        )
    return _ordered(labels, (classnames, names_on(card), folders_on(card)), prompts.source), templates


def _ordered(labels: Names, spellings: Sequence[Sequence[str]], source: str) -> Names:
    """Labels in label order: by name where they are spelled like the classes, as they stand where they are others."""
    places = Spellings(labels)
    for names in spellings:
        found = [places.find(name) for name in names]
        if names and None not in found and len(set(found)) == len(found):
            return tuple(labels[place] for place in found)
    names = spellings[0]
    for i, name in enumerate(names):
        found = places.find(name)
        if found not in (None, i) and plain(name) != plain(names[found]):
            raise ValueError(
                f"{source} has {name!r} as label {found}, the data set as class {i}, and other names differ: which "
                "label is which class can't be told. Spell them like the data set's"
            )
    if all(name.isdecimal() for name in names) and sorted(names, key=int) != list(names):
        raise ValueError(
            f"{source} has other names for classes that are numbers, in the order {', '.join(names[:4])} ...: which "
            "label is which class can't be told. Give the folders the names, or the same number of digits (00, 01 ...)"
        )
    return labels


class Spellings:
    """Finds names in a list: as they are spelled, or else by `plain`, where that is the spelling of one of them alone.

    >>> Spellings(["C", "C++", "T-shirt/top"]).find("t_shirt_top"), Spellings(["C", "C++"]).find("c")
    (2, None)
    """

    def __init__(self, labels: Sequence[str | Sequence[str]]):
        self._exact: dict[str, set[int]] = {}
        self._plain: dict[str, set[int]] = {}
        for place, label in enumerate(labels):
            for name in [label] if isinstance(label, str) else label:
                self._exact.setdefault(name, set()).add(place)
                self._plain.setdefault(plain(spoken(name)), set()).add(place)

    def __len__(self) -> int:
        return len(self._exact)

    def find(self, name: str) -> int | None:
        """Return the place of the one label of that name, None where there is none, or several."""
        exact = self._exact.get(name)
        alike = plain(spoken(name))
        found = exact or (self._plain.get(alike, set()) if alike else set())
        return next(iter(found)) if len(found) == 1 else None


def plain(name: str) -> str:
    """A class name as it is compared: letters and digits only, without case.

    >>> plain("ApplyEyeMakeup") == plain("apply eye makeup"), plain("T-shirt/top")
    (True, 'tshirttop')
    """
    return re.sub(r"[\W_]+", "", name.lower())


def spoken(folder: str) -> str:
    """A folder's name as a class name: 007.Yellow_billed_Cuckoo -> Yellow billed Cuckoo.

    >>> spoken("007.Yellow_billed_Cuckoo"), spoken("ApplyEyeMakeup"), spoken("707-320")
    ('Yellow billed Cuckoo', 'Apply Eye Makeup', '707-320')
    """
    name = re.sub(r"^\d+\.(?=\D)", "", folder)
    apart = name if set(name) & set("_ -") else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name)
    return apart.replace("_", " ").strip()


def own_names(names: Sequence[str]) -> tuple[str, ...]:
    """The names of a person's own classes as prompts say them: with spaces for underscores, no number in front.

    Nothing else is respelled: capitals inside are meant. Names that would become the same stay as they are.

    >>> own_names(["iPhone", "007.hot_dog", "McDonald"]), own_names(["1.cat", "2.cat"])
    (('iPhone', 'hot dog', 'McDonald'), ('1.cat', '2.cat'))
    """
    said = [re.sub(r"^\d+\.(?=\D)", "", name).replace("_", " ").strip() or name for name in names]
    return tuple(s if said.count(s) == 1 else name for s, name in zip(said, names, strict=True))


def _keys(card: Card) -> tuple[str, ...]:
    return (card.name, *card.aliases)


def _first(content: Mapping[str, Any], card: Card) -> Any:
    return next((content[key] for key in _keys(card) if key in content), None)


def _referred(card: Card, reference: str, file: str) -> tuple[str, ...]:
    """What "open_clip:NAME" or "clip_benchmark:KEY" stands for."""
    if reference.startswith(OPEN_CLIP):
        found = getattr(_zero_shot_metadata(), reference.removeprefix(OPEN_CLIP))
        return tuple(item if isinstance(item, str) else item("{}") for item in found)
    if reference.startswith(CLIP_BENCHMARK):
        return tuple(_braces(item) for item in _clip_benchmark(file)[reference.removeprefix(CLIP_BENCHMARK)])
    raise ValueError(f"card {card.name}: {reference!r} is neither {OPEN_CLIP}NAME nor {CLIP_BENCHMARK}KEY")


def _installed(package: str) -> Path:
    """Return a package's folder without importing it. Raises ModuleNotFoundError."""
    spec = util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    return Path(spec.submodule_search_locations[0])


@cache
def _zero_shot_metadata() -> ModuleType:
    """Return open_clip's names and templates, a file of plain Python: open_clip itself takes seconds to import."""
    path = _installed("open_clip") / "zero_shot_metadata.py"
    spec = util.spec_from_file_location("open_clip.zero_shot_metadata", path)
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def _clip_benchmark(file: str) -> dict[str, Any]:
    # Not imported: its data set builder wants packages it does not declare, and downloads through a shell.
    try:
        package = _installed("clip_benchmark")
    except ModuleNotFoundError as error:
        text = f"CLIP_benchmark's class names and prompts are needed and it is not installed: {INSTALL}"
        raise ValueError(text) from error
    return json.loads((package / "datasets" / file).read_text(encoding="utf-8"))


def timm_info(file: str) -> Path:
    """The path of one of timm's lists about ImageNet."""
    return _installed("timm") / "data" / "_info" / file


@cache
def _synsets(name: str) -> tuple[str, ...]:
    text = timm_info(f"{name}.txt").read_text(encoding="utf-8")
    return tuple(line.strip() for line in split_lines(text) if line.strip())


def _read_object(file: Path) -> dict[str, list]:
    content = read_json(file)
    if not isinstance(content, dict) or not content:
        raise ValueError(f"{file} must be an object: data set -> list of labels, or of templates")
    for name, items in content.items():
        if not isinstance(items, list) or not items:
            raise ValueError(f"{file}: {name} must be a list of labels or templates, it is {str(items)[:40]!r}")
    return content


def _is_template(text: str) -> bool:
    return "{}" in text or "{c}" in text


def _braces(template: str) -> str:
    return template.replace("{c}", "{}")


def _synonyms(label: Any) -> str | tuple[str, ...]:
    if isinstance(label, str):
        return label
    if isinstance(label, list) and label and all(isinstance(name, str) for name in label):
        return tuple(label)
    raise ValueError(f"a label is a name or a list of names, not {str(label)[:40]!r}")
