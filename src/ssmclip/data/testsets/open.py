"""Evaluation sets. What a set is stands on its card (`cards/NAME.toml`), how its files are read in the layouts."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from importlib import resources
from pathlib import Path
from typing import Any

import huggingface_hub
from PIL import Image

from ssmclip.data.testsets.card import LAYOUTS, SORTED, Card, Found
from ssmclip.data.testsets.layouts import captioned, originals, parquet
from ssmclip.data.testsets.layouts import folders as layouts
from ssmclip.data.testsets.prompts import Names, Prompts, chosen, folders_on, names_on, plain, templates_on
from ssmclip.registry import UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Card", "Classification", "Retrieval", "list_cards", "load_card", "open_dataset", "read_card"]

KINDS = ("classification", "retrieval")
FORMS = (layouts, originals, parquet, captioned)  # the modules whose layouts a card may name
HUB = "hub:"
FOLDER = "folder:"


class _Pictures:
    """What both kinds of set have in common.

    where: the files; n: images there are; expected: images in the whole test set; partial: whether there are fewer.
    """

    def __init__(self, card: Card, found: Found):
        self.card = card
        self.where = found.where
        self.keys = found.keys
        self.n = len(found.keys)
        self.expected = card.test_size or self.n
        self.partial = self.n < self.expected
        self.files = found.files
        self.groups = found.groups
        self.said = found.said
        self._pictures = found.pictures

    def __len__(self) -> int:
        return self.n


class Classification(_Pictures):
    """`ds[i]` is (PIL picture, label), or raises BadImage; ds.labels, ds.classnames, ds.templates.

    classnames: a name for each class, or several that mean the same; prompts: where names and templates come from.
    """

    def __init__(self, card: Card, found: Found, prompts: Prompts | None = None):
        super().__init__(card, found)
        self.labels = found.labels
        self.classnames: Names = found.classnames or names_on(card)
        self.templates = found.templates or templates_on(card)
        self.prompts = "the data set's own" if found.templates else "the card's"
        _check_labels(self)
        if prompts is not None:
            self.classnames, self.templates = chosen(prompts, card, self.classnames)
            self.prompts = prompts.source
        if card.classes and len(self.classnames) != card.classes:
            self.said = f"{len(self.classnames)} of {card.classes} classes"

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
    """The card of that name; of `folder:PATH`, a card for a person's own class folders, in PATH or PATH/test.

    Raises UnknownName, FileNotFoundError for a folder that isn't there, ValueError for a card with a mistake in it.
    """
    if name.startswith(FOLDER):
        return _folder_card(Path(name.removeprefix(FOLDER)))
    if name not in (known := list_cards()):
        raise UnknownName("data set", name, known)
    return read_card(name, (_cards() / f"{name}.toml").read_text(encoding="utf-8"))


def read_card(name: str, text: str) -> Card:
    """A card from its TOML text. Raises ValueError naming keys and kinds nobody knows, missing keys, double names."""
    values: dict[str, Any] = tomllib.loads(text)
    known = {field.name for field in fields(Card)} - {"name"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"card {name}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    try:
        card = Card(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"card {name}: {error}") from error
    if card.kind not in KINDS:
        raise ValueError(f"card {name}: kind {card.kind!r}, there are {', '.join(KINDS)}")
    for layout in card.layouts:
        LAYOUTS[layout]  # an unknown one raises
    if not isinstance(card.classnames, str):
        _check_names(f"card {name}", card.classnames)
    if isinstance(card.templates, tuple) and (without := [t for t in card.templates if "{}" not in t]):
        raise ValueError(f"card {name}: templates without {{}}, where the class's name goes: {without}")
    return card


def open_dataset(
    card: Card | str, root: str | Path, *, prompts: Prompts | None = None, download: bool = True
) -> Classification | Retrieval:
    """The test set of a card, found under `root`: in it, or in a folder of the card's name (or one of card.aliases).

    root: a folder; or "hub:OWNER", whose wds_* repositories on the Hugging Face hub (CLIP_benchmark's are owned by
    clip-benchmark) are downloaded to its cache, or, without download, only looked for there. prompts: labels and
    templates in place of the card's.
    A copy with fewer images than the card's test_size is used, and says so (`partial`, `n`, `expected`).
    Raises UnknownName; FileNotFoundError listing what was looked for and where; ValueError for damaged files, labels
    without a class, class folders without pictures and names that occur twice.
    """
    card = load_card(card) if isinstance(card, str) else card
    looked = []
    for folder in _places(card, root, download):
        for layout in card.layouts:
            found = LAYOUTS[layout](folder, card)
            if isinstance(found, Found):
                return Retrieval(card, found) if card.kind == "retrieval" else Classification(card, found, prompts)
            looked.append(f"{folder}: {found}")
    raise FileNotFoundError(f"the data set {card.name} is not under {root}. Looked for\n  " + "\n  ".join(looked))


def _places(card: Card, root: str | Path, download: bool) -> Iterator[Path]:
    if Path(card.source).is_absolute():  # a person's own folder
        yield Path(card.source)
        return
    if str(root).startswith(HUB):
        yield _from_hub(card, str(root).removeprefix(HUB), download)
        return
    root = Path(root)
    names = (card.name, *card.aliases)
    spelled = [spelling for name in names for spelling in (name, name.replace("_", "-"))]
    shards = [f"wds_{name.replace('/', '-')}" for name in names]
    yield root
    for name in dict.fromkeys([*spelled, *shards]):
        yield root / name
        # Where the Hugging Face hub keeps what was downloaded.
        yield from sorted(root.glob(f"datasets--*--{name.replace('/', '-')}/snapshots/*"))


def _from_hub(card: Card, owner: str, download: bool) -> Path:
    """The folder of a wds_* repository in the hub's cache. Raises FileNotFoundError for what the hub doesn't have."""
    errors = []
    for name in (card.name, *card.aliases):
        repo = f"{owner}/wds_{name.replace('/', '-')}"
        try:
            patterns = ["*.txt", f"{card.split}/*", "test/*"]
            return Path(
                huggingface_hub.snapshot_download(
                    repo, repo_type="dataset", allow_patterns=patterns, local_files_only=not download
                )
            )
        except (OSError, huggingface_hub.errors.HfHubHTTPError) as error:
            errors.append(f"{repo}: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
    raise FileNotFoundError(f"the data set {card.name} can't be had from the hub:\n  " + "\n  ".join(errors))


def _folder_card(path: Path) -> Card:
    place = next((place for place in (path / "test", path / "val", path) if place.is_dir()), None)
    if place is None:
        raise FileNotFoundError(f"there is no folder {path}")
    return Card(
        name=path.name,
        title=path.name,
        citation="",
        source=str(path.resolve()),
        licence="",
        kind="classification",
        metric="top1",
        test_size=0,
        layouts=("metadata_csv", "class_folders"),
        templates=("a photo of a {}.",),
    )


def _check_labels(dataset: Classification) -> None:
    card = dataset.card
    known_names = names_on(card)
    allowed = {name for name, count in Counter(known_names).items() if count > 1}  # ImageNet has two missiles
    _check_names(dataset.where, dataset.classnames, allowed)
    names, known = ({plain(name) for name in names} for names in (dataset.classnames, known_names))
    # Where folders are told apart by codes, the names of classes are a matter of taste.
    alike = 2 * len(names & known) >= len(known) or bool(folders_on(card)) or card.folders == SORTED
    if known and (len(dataset.classnames) != len(known_names) or not alike):
        raise ValueError(
            f"{dataset.where} has {len(names)} classes ({', '.join(sorted(names)[:5])} ...), {card.name} has "
            f"{len(known)} ({', '.join(sorted(known)[:5])} ...): it is another data set"
        )
    count = len(dataset.classnames)
    if outside := [i for i, label in enumerate(dataset.labels) if not 0 <= label < count]:
        first = outside[0]
        raise ValueError(
            f"{dataset.where}: {len(outside)} labels are outside the {count} classes; the first is "
            f"{dataset.labels[first]} of {dataset.keys[first]}"
        )


def _check_names(where: str, names: Sequence[str], allowed: set[str] = frozenset()) -> None:
    if twice := [name for name, count in Counter(names).items() if count > 1 and name not in allowed]:
        raise ValueError(f"{where}: class names that occur more than once: {', '.join(twice)}")


def _cards() -> Any:
    return resources.files("ssmclip.data.testsets") / "cards"
