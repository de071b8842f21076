"""Import the names of a package when they are first used, so importing the package costs nothing. Needs no torch.

The package lists each name twice: for people and type checkers as an import under `if TYPE_CHECKING`, for Python in the
mapping given to `lazily`. A test compares the two.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazily(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` for a package whose names live in other modules (PEP 562).

    homes: name -> its module; a module of the same name stands for itself.
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(homes[name])
        # Not kept in the package: a test that replaces the name where it lives is believed here too.
        return module if homes[name].endswith(f".{name}") else getattr(module, name)

    def names() -> list[str]:
        return sorted({*vars(importlib.import_module(package)), *homes})

    return get, names
