"""Evaluation sets. What a set is stands on its card (`cards/NAME.toml`), how its files are read in the layouts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from ssmclip.data.testsets.card import LAYOUTS, Card, Found
from ssmclip.data.testsets.prompts import Prompts
from ssmclip.data.testsets.splits import spellings
from ssmclip.data.testsets.testset import KINDS, Classification, Retrieval, TestSet, check_names
from ssmclip.registry import UnknownName

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["Card", "Classification", "Retrieval", "TestSet", "list_cards", "load_card", "open_dataset", "read_card"]

HUB = "hub:"
FOLDER = "folder:"
CARD = "card:"
OWN_LAYOUTS = ("metadata_csv", "class_folders")  # of `folder:PATH`
OWN_TEMPLATES = ("a photo of a {}.",)
PARTS = ("train", "val")  # other splits than the one that is tested on


def list_cards() -> list[str]:
    """The names `load_card` knows."""
    return sorted(path.name.removesuffix(".toml") for path in _cards().iterdir() if path.name.endswith(".toml"))


def load_card(name: str) -> Card:
    """Return the card of that name.

    Of `folder:PATH` a card for a person's own class folders, in PATH or PATH/test; of `card:PATH.toml` the card in that
    file, for a data set of a person's own in any layout (`read_own_card`).
    Raises UnknownName, FileNotFoundError for a folder or file that isn't there, ValueError for a card with a mistake in
    it.
    """
    if name.startswith(FOLDER):
        return _folder_card(Path(name.removeprefix(FOLDER)))
    if name.startswith(CARD):
        return read_own_card(Path(name.removeprefix(CARD)))
    if name not in (known := list_cards()):
        raise UnknownName("data set", name, known)
    return read_card(name, (_cards() / f"{name}.toml").read_text(encoding="utf-8"))


def read_card(name: str, text: str) -> Card:
    """Return a card from its TOML text.

    Raises ValueError naming keys and kinds nobody knows, missing keys, double names.
    """
    return _card(name, tomllib.loads(text))


def read_own_card(file: Path) -> Card:
    """Return the card of a person's own data set from a file anywhere, such as

        kind = "retrieval"
        layouts = ["records_jsonl"]
        source = "photos"

    source: the data's folder, absolute or from the file's own; left out, it is looked for under the root as any other
    set's. The name is the file's. title, citation, licence, metric and test_size may be left out, for classification
    templates as well.
    Raises FileNotFoundError for a file or a source that is not there, and what `read_card` raises.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no card {file}")
    try:
        values: dict[str, Any] = tomllib.loads(file.read_bytes().decode("utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no TOML file: {error}") from error
    if source := values.get("source", ""):
        folder = (file.parent / Path(source).expanduser()).resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"card {file}: source {source!r}: there is no folder {folder}")
        values["source"] = str(folder)
    return _card(file.stem, _defaults(file.stem, values.get("kind", "")) | values, own=True)


def _defaults(name: str, kind: str) -> dict[str, Any]:
    """What a person's own data set may leave unsaid."""
    metric = {"retrieval": "recall"}.get(kind, "top1")
    common = {"title": name, "citation": "", "source": "", "licence": "", "metric": metric, "test_size": 0}
    return common | ({"templates": OWN_TEMPLATES} if kind == "classification" else {})


def _card(name: str, values: dict[str, Any], *, own: bool = False) -> Card:
    known = {field.name for field in fields(Card)} - {"name", "own", "part"}
    if unknown := sorted(set(values) - known):
        raise ValueError(f"card {name}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    if not isinstance(layouts := values.get("layouts", []), list | tuple):
        raise ValueError(f"card {name}: layouts must be a list of names (got {layouts!r})")
    try:
        card = Card(name, own=own, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    except TypeError as error:
        raise ValueError(f"card {name}: {error}") from error
    if card.kind not in KINDS:
        raise ValueError(f"card {name}: kind {card.kind!r}, there are {', '.join(KINDS)}")
    for layout in card.layouts:
        LAYOUTS[layout]  # an unknown one raises
    if not isinstance(card.classnames, str):
        check_names(f"card {name}", card.classnames)
    if isinstance(card.templates, tuple) and (without := [t for t in card.templates if "{}" not in t]):
        raise ValueError(f"card {name}: templates without {{}}, where the class's name goes: {without}")
    return card


def open_dataset(
    card: Card | str, root: str | Path, *, prompts: Prompts | None = None, download: bool = True, split: str = ""
) -> Classification | Retrieval:
    """The test set of a card, found under `root`: in it, or in a folder of the card's name (or one of card.aliases).

    root: a folder; or "hub:OWNER", whose wds_* repositories on the Hugging Face hub (CLIP_benchmark's are owned by
    clip-benchmark) are downloaded to its cache, or, without download, only looked for there. prompts: labels and
    templates in place of the card's; split: "train" or "val" for another split than the card's own.
    A copy with fewer images than the card's test_size is used, and says so (`partial`, `n`, `expected`).
    Raises UnknownName; FileNotFoundError listing what was looked for and where; ValueError for damaged files, labels
    without a class, class folders without pictures and names that occur twice, and for another split.
    """
    card = load_card(card) if isinstance(card, str) else card
    card = _part_of(card, split) if split else card
    looked = []
    for folder in _places(card, root, download):
        for layout in card.layouts:
            found = LAYOUTS[layout](folder, card)
            if isinstance(found, Found) and card.part and found.split not in spellings(card.part):
                found = f"a split {card.part} ({found.where} is there, and is not one)"
            if isinstance(found, Found):
                if card.kind == "retrieval":
                    return Retrieval(card, found)
                inliers = partial(open_dataset, card.inliers, root, download=download) if card.inliers else None
                return Classification(card, found, prompts, inliers)
            looked.append(f"{folder}: {found}")
    what = f"the split {card.part} of {card.name}" if card.part else f"the data set {card.name}"
    raise FileNotFoundError(f"{what} is not under {root}. Looked for\n  " + "\n  ".join(looked))


def _part_of(card: Card, split: str) -> Card:
    """Return the card of another split. Raises ValueError for a name that is not in PARTS."""
    if split not in PARTS:
        raise ValueError(f"the split must be {' or '.join(PARTS)} (got {split!r})")
    return replace(card, split=split, part=split, test_size=0)


def _places(card: Card, root: str | Path, download: bool) -> Iterator[Path]:
    if card.own and card.source:
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
    import huggingface_hub

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
    if not path.is_dir():
        raise FileNotFoundError(f"there is no folder {path}")
    name = path.name or path.resolve().name  # "." has none
    folder = {"kind": "classification", "layouts": OWN_LAYOUTS, "source": str(path.resolve())}
    return _card(name, _defaults(name, "classification") | folder, own=True)


def _cards() -> Any:
    return resources.files("ssmclip.data.testsets") / "cards"
