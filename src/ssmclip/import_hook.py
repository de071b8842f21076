"""Run a function once another package has been imported. Needs no torch, and imports nothing itself.

`after_import("timm", add_ours)` calls `add_ours(timm)` at once if timm has been imported already, otherwise at the end
of its import. For that, a finder at the head of `sys.meta_path` waits for the package. It lets the other finders find
it, and wraps the loader in one that restores the original, runs it and then makes the call. So

- an imported module looks as if there were no hook; `importlib.util.find_spec` returns the usual spec, whose loader
  is of another type but answers as the original does;
- whoever imports the package, or a module in it, waits for the call, also in another thread: it is made under the
  package's import lock;
- a package that is missing or broken raises the error it always raises; an error of the call is an error of the import.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

Action = Callable[[ModuleType], None]


def after_import(name: str, action: Action) -> None:
    """Call `action(module)` each time the package `name` is loaded, and now if that has happened.

    A second action for the same package replaces the first.
    """
    _FINDER.actions[name] = action
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if sys.modules.get(name) is not None:
        action(importlib.import_module(name))  # waits, should another thread be importing it right now


class _Finder:
    """A finder for `sys.meta_path` that wraps the loader of the awaited package."""

    def __init__(self) -> None:
        self.actions: dict[str, Action] = {}

    def find_spec(
        self, name: str, path: Iterable[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.actions:
            return None
        spec = self._found_by_others(name, path, target)
        # A namespace package (any folder of that name) has no origin, and is not the package that is waited for.
        if spec is not None and spec.origin is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self.actions[name])
        return spec

    def _found_by_others(self, *asked: Any) -> ModuleSpec | None:
        after = sys.meta_path.index(self) + 1 if self in sys.meta_path else 0
        for finder in sys.meta_path[after:]:
            if hasattr(finder, "find_spec") and (spec := finder.find_spec(*asked)) is not None:
                return spec
        return None


class _Loader:
    """A loader followed by an action. All other attributes are those of the original loader."""

    def __init__(self, loader: Any, action: Action):
        self.loader, self.action = loader, action

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        self.action(module)

    def __getattr__(self, name: str) -> Any:
        if name == "loader":  # while it is being copied
            raise AttributeError(name)
        return getattr(self.loader, name)


_FINDER = _Finder()
