"""Evaluation sets. What a set is stands on its card (`cards/NAME.toml`), how its files are read in the layouts."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass, fields, replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from ssmclip.data.lines import split_lines
from ssmclip.data.testsets.card import LAYOUTS, Card, Found
from ssmclip.data.testsets.prompts import Prompts
from ssmclip.data.testsets.splits import spellings
from ssmclip.data.testsets.testset import (
    KINDS,
    Classification,
    Matching,
    MultiLabel,
    Retrieval,
    TestSet,
    check_names,
)
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
SHARDS = ("", "_test")  # how names of wds_* folders end: CLIP_benchmark's, and DataComp's
CAPTIONED = {"retrieval": Retrieval, "matching": Matching}  # kinds without classes
TYPES: dict[str, Callable[[Any], bool]] = {  # of a card's fields, as they are annotated
    "str": lambda value: isinstance(value, str),
    "int": lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "tuple[str, ...]": lambda value: isinstance(value, list | tuple) and all(isinstance(item, str) for item in value),
}
DESCRIBED = {"str": "text", "int": "a number of at least 0", "tuple[str, ...]": "a list of texts"}
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

    Raises ValueError naming the line of keys and kinds nobody knows, of values of another type and of double names;
    and keys that are missing.
    """
    return _card(name, tomllib.loads(text), _Written(f"card {name}", text))


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
        text = file.read_bytes().decode("utf-8-sig")
        values: dict[str, Any] = tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is no TOML file: {error}") from error
    written = _Written(f"card {file}", text)
    written.check(values)
    if source := values.get("source", ""):
        folder = (file.parent / Path(source).expanduser()).resolve()
        if not folder.is_dir():
            raise FileNotFoundError(f"{written.at('source')}: source {source!r}: there is no folder {folder}")
        values["source"] = str(folder)
    return _card(file.stem, _defaults(file.stem, values.get("kind", "")) | values, written, own=True)


def _defaults(name: str, kind: str) -> dict[str, Any]:
    """What a person's own data set may leave unsaid."""
    metric = {"retrieval": "recall", "multilabel": "mean_average_precision", "matching": "text_score"}.get(kind, "top1")
    common = {"title": name, "citation": "", "source": "", "licence": "", "metric": metric, "test_size": 0}
    return common | ({"templates": OWN_TEMPLATES} if kind in ("classification", "multilabel") else {})


@dataclass(frozen=True)
class _Written:
    """A card as it is written. where: its file or name; text: its TOML."""

    where: str
    text: str = ""

    def at(self, key: str) -> str:
        """Return the place of a key, for an error: where, and the line that sets it."""
        lines = [number for number, line in enumerate(split_lines(self.text), 1) if re.match(rf"\s*{key}\s*=", line)]
        return f"{self.where}, line {lines[0]}" if lines else self.where

    def check(self, values: dict[str, Any]) -> None:
        """Raise ValueError for keys that no card has and for values of another type."""
        known = {field.name: str(field.type) for field in fields(Card) if field.name not in ("name", "own", "part")}
        if unknown := sorted(set(values) - set(known)):
            raise ValueError(
                f"{self.at(unknown[0])}: unknown keys {', '.join(unknown)}; known: {', '.join(sorted(known))}"
            )
        for key, value in values.items():
            if not any(TYPES[kind](value) for kind in known[key].split(" | ")):
                described = " or ".join(DESCRIBED[kind] for kind in known[key].split(" | "))
                raise ValueError(f"{self.at(key)}: {key} must be {described} (got {value!r})")


def _card(name: str, values: dict[str, Any], written: _Written, *, own: bool = False) -> Card:
    written.check(values)
    if missing := [field.name for field in fields(Card)[1:] if field.default is MISSING and field.name not in values]:
        raise ValueError(f"{written.where}: {' and '.join(missing)} must be given")
    card = Card(name, own=own, **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})
    if card.kind not in KINDS:
        raise ValueError(f"{written.at('kind')}: kind {card.kind!r}, there are {', '.join(KINDS)}")
    for layout in card.layouts:
        if layout not in LAYOUTS:
            error = UnknownName(LAYOUTS.kind, layout, LAYOUTS)
            error.message = f"{written.at('layouts')}: {error.message}"
            raise error
    if not isinstance(card.classnames, str):
        check_names(written.at("classnames"), card.classnames)
    if isinstance(card.templates, tuple) and (without := [t for t in card.templates if "{}" not in t]):
        raise ValueError(f"{written.at('templates')}: templates without {{}}, where the class's name goes: {without}")
    if card.grouped_by and card.grouped_by not in card.metadata:
        raise ValueError(
            f"{written.at('grouped_by')}: grouped_by must be one of metadata (got {card.grouped_by!r}; metadata: "
            f"{', '.join(card.metadata) or 'none'})"
        )
    return card


def open_dataset(
    card: Card | str, root: str | Path, *, prompts: Prompts | None = None, download: bool = True, split: str = ""
) -> Classification | MultiLabel | Retrieval | Matching:
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
                if card.kind in CAPTIONED:
                    return CAPTIONED[card.kind](card, found)
                if card.kind == "multilabel":
                    return MultiLabel(card, found, prompts)
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
    shards = [f"wds_{name.replace('/', '-')}{end}" for end in SHARDS for name in names]
    yield root
    for name in dict.fromkeys([*spelled, *shards]):
        yield root / name
        # Where the Hugging Face hub keeps what was downloaded.
        yield from sorted(root.glob(f"datasets--*--{name.replace('/', '-')}/snapshots/*"))


def _from_hub(card: Card, owner: str, download: bool) -> Path:
    """The folder of a wds_* repository in the hub's cache. Raises FileNotFoundError for what the hub doesn't have."""
    import huggingface_hub

    errors = []
    for name in [f"{name.replace('/', '-')}{end}" for end in SHARDS for name in (card.name, *card.aliases)]:
        repo = f"{owner}/wds_{name}"
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
    return _card(name, _defaults(name, "classification") | folder, _Written(f"card {name}"), own=True)


def _cards() -> Any:
    return resources.files("ssmclip.data.testsets") / "cards"
