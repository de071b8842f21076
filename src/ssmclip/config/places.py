"""The folders searched for recipes and training data, so that a recipe runs from any folder. Needs no torch.

A path that is absolute, or that exists relative to the current folder, is used as given. Any other is looked for in
the folder that the variable SSMCLIP_DATA names, and then, where the package is imported from a checkout of its
repository, in the checkout's data/ and in shared/data next to the checkout.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

VARIABLE = "SSMCLIP_DATA"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")  # synthetic:NAME, pipe:COMMAND, hub:OWNER, s3://…; no drive letter
_PACKAGE = Path(__file__).resolve().parents[1]


def checkout() -> Path | None:
    """Return the root of the checkout that the package is imported from; None for an installed package."""
    root = _PACKAGE.parents[1]
    return root if (root / "pyproject.toml").is_file() and (root / "src" / "ssmclip") == _PACKAGE else None


def recipe_folders() -> list[Path]:
    """Return the folders that a recipe's path may be relative to: the current one, the package, the checkout."""
    return [folder for folder in (Path(), _PACKAGE, checkout()) if folder is not None]


def data_folders(environment: Mapping[str, str]) -> list[Path]:
    """Return the folders searched for data, in order; the first is the current one."""
    named, root = environment.get(VARIABLE), checkout()
    return [
        Path(),
        *([Path(named)] if named else []),
        *([root / "data", root.parent / "shared" / "data"] if root else []),
    ]


def below(path: str, folders: Sequence[Path]) -> list[str]:
    """Return a path joined to each folder; only itself if absolute or not a path, such as synthetic:NAME or a URL.

    >>> below("captions/train", [Path(), Path("/data")])
    ['captions/train', '/data/captions/train']
    >>> below("hub:clip-benchmark", [Path(), Path("/data")])
    ['hub:clip-benchmark']
    """
    if Path(path).is_absolute() or _SCHEME.match(path):
        return [path]
    return [path if folder == Path() else str(folder / path) for folder in folders]


def find_data(source: str, folders: Sequence[Path]) -> str:
    """Return a source of training pairs below the first folder that contains it; unchanged if none does.

    For a pattern with braces, such as DIR/{0000..0012}.tar, only the folder before the first brace must exist.
    """
    return next((place for place in below(source, folders) if _exists(place)), source)


def not_found(source: str, folders: Sequence[Path]) -> str:
    """Return the end of an error about a missing source: the places searched and what to do; "" for a single place."""
    places = [Path(place).absolute() for place in below(source, folders)]
    if len(places) == 1:
        return ""
    return f". Looked for {', '.join(map(str, places))}. Give another path, or set {VARIABLE} to the folder it is in"


def _exists(source: str) -> bool:
    if Path(source).exists():
        return True
    if "{" in source:
        return Path(os.path.dirname(source.partition("{")[0])).exists()
    return any(char in source for char in "*?[") and bool(glob.glob(source, recursive=True))
