"""Evaluation sets. What a set is stands on its card (`cards/NAME.toml`), how its files are read in `layouts.py`."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any

from PIL import Image
from torch.utils.data import Dataset

from ssmclip.data.layouts import LAYOUTS, Found, plain
from ssmclip.registry import UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

KINDS = ("classification", "retrieval")
OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class Card:
    """What is known of a data set without its files.

    kind: "classification" or "retrieval"; metric: the headline one; test_size: images in the whole test set;
    classnames: in label order; templates: prompts with {} for the class name;
    layouts: names in layouts.LAYOUTS, tried in order; folders: names it goes by under a root, besides its own.
    """

    name: str
    title: str
    citation: str
    source: str
    licence: str
    kind: str
    metric: str
    test_size: int
    layouts: tuple[str, ...]
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    note: str = ""


class _Pictures(Dataset):
    """What both kinds of set have in common.

    where: the files; n: images there are; expected: images in the whole test set; partial: whether there are fewer.
    """

    def __init__(self, card: Card, found: Found):
        self.card = card
        self.where = found.where
        self.keys = found.keys
        self.n = len(found.keys)
        self.expected = card.test_size
        self.partial = self.n < card.test_size
        self._pictures = found.pictures

    def __len__(self) -> int:
        return self.n


class Classification(_Pictures):
    """`ds[i]` is (PIL picture, label), or raises BadImage; ds.labels, ds.classnames, ds.templates."""

    def __init__(self, card: Card, found: Found):
        super().__init__(card, found)
        self.labels = found.labels
        self.classnames = found.classnames or card.classnames
        self.templates = found.templates or card.templates
        _check_labels(self)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self._pictures[index], self.labels[index]


class Retrieval(_Pictures):
    """`ds[i]` is a PIL picture, `ds.captions[i]` the list of its captions."""

    def __init__(self, card: Card, found: Found):
        super().__init__(card, found)
        self.captions = found.captions

    def __getitem__(self, index: int) -> Image.Image:
        return self._pictures[index]


def list_cards() -> list[str]:
    """The names `load_card` knows."""
    return sorted(path.name.removesuffix(".toml") for path in _cards().iterdir() if path.name.endswith(".toml"))


def load_card(name: str) -> Card:
    """The card of that name. Raises UnknownName, and ValueError for a card with a mistake in it."""
    if name not in (known := list_cards()):
        raise UnknownName("data set", name, known)
    return read_card(name, (_cards() / f"{name}.toml").read_text(encoding="utf-8"))


def read_card(name: str, text: str) -> Card:
    """A card from its TOML text. Raises ValueError naming keys and kinds nobody knows, missing keys, double names."""
    values: dict[str, Any] = tomllib.loads(text)
    known = {field.name for field in fields(Card)} - {"name"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"card {name}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if isinstance(values.get("templates"), str):
        values["templates"] = _open_clip_templates(values["templates"])
    try:
        card = Card(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"card {name}: {error}") from error
    if card.kind not in KINDS:
        raise ValueError(f"card {name}: kind {card.kind!r}, there are {', '.join(KINDS)}")
    for layout in card.layouts:
        LAYOUTS[layout]  # an unknown one raises
    _check_names(f"card {name}", card.classnames)
    return card


def open_dataset(card: Card | str, root: str | Path) -> Classification | Retrieval:
    """The test set of a card, found under `root`: in it, or in a folder of the card's name (or one of card.folders).

    A copy with fewer images than the card's test_size is used, and says so (`partial`, `n`, `expected`).
    Raises UnknownName; FileNotFoundError listing what was looked for and where; ValueError for damaged files, labels
    without a class, class folders without pictures and names that occur twice.
    """
    card = load_card(card) if isinstance(card, str) else card
    root = Path(root)
    names = dict.fromkeys([card.name, card.name.replace("_", "-"), f"wds_{card.name}", *card.folders])
    looked = []
    for folder in (root, *(root / name for name in names)):
        for layout in card.layouts:
            found = LAYOUTS[layout](folder, card.classnames, card.kind)
            if isinstance(found, Found):
                return Classification(card, found) if card.kind == "classification" else Retrieval(card, found)
            looked.append(f"{folder}: {found}")
    raise FileNotFoundError(f"the data set {card.name} is not under {root}. Looked for\n  " + "\n  ".join(looked))


def _check_labels(dataset: Classification) -> None:
    _check_names(dataset.where, dataset.classnames)
    names, known = ({plain(name) for name in names} for names in (dataset.classnames, dataset.card.classnames))
    if len(names) != len(known) or 2 * len(names & known) < len(known):
        raise ValueError(
            f"{dataset.where} has {len(names)} classes ({', '.join(sorted(names)[:5])} ...), {dataset.card.name} has "
            f"{len(known)} ({', '.join(sorted(known)[:5])} ...): it is another data set"
        )
    count = len(dataset.classnames)
    if outside := [i for i, label in enumerate(dataset.labels) if not 0 <= label < count]:
        first = outside[0]
        raise ValueError(
            f"{dataset.where}: {len(outside)} labels are outside the {count} classes; the first is "
            f"{dataset.labels[first]} of {dataset.keys[first]}"
        )


def _check_names(where: str, names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise ValueError(f"{where}: class names that occur more than once: {', '.join(twice)}")


def _open_clip_templates(name: str) -> tuple[str, ...]:
    from open_clip import zero_shot_metadata  # seconds to import

    return tuple(template("{}") for template in getattr(zero_shot_metadata, name.removeprefix(OPEN_CLIP)))


def _cards() -> Any:
    return resources.files("ssmclip.data") / "cards"
