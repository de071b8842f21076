"""Registries of names. An unknown name raises an error that lists the known ones; a duplicate name raises too."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from typing import Generic, TypeVar

T = TypeVar("T")

_LISTED, _ALIKE = 200, 10  # known names that a message lists, all or the nearest


class UnknownName(KeyError):
    """An error for a name that is not registered. The message suggests the nearest name and lists the known ones: all
    of them, or of more than 200 those most like it.

    >>> print(UnknownName("task", "cifar", ["cifar10", "digits"]))
    unknown task 'cifar'; did you mean 'cifar10'? known: cifar10, digits
    """

    def __init__(self, kind: str, name: str, known: Iterable[str]):
        known = sorted(known)
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" did you mean {near[0]!r}?" if near else ""
        if len(known) > _LISTED:
            like = difflib.get_close_matches(name, known, n=_ALIKE, cutoff=0.4)
            shown = f"{', '.join(like)}; {len(known) - len(like)} others"
        else:
            shown = ", ".join(known)
        self.message = f"unknown {kind} {name!r};{hint} known: {shown}"
        super().__init__(self.message)

    def __str__(self) -> str:
        return self.message


def _lines(item: object) -> set[tuple[str, int]]:
    """Return the file and first line of a function, or of each function in a class."""
    functions = [inspect.unwrap(f) for f in (vars(item).values() if isinstance(item, type) else [item]) if callable(f)]
    return {(f.__code__.co_filename, f.__code__.co_firstlineno) for f in functions if hasattr(f, "__code__")}


class Registry(Generic[T]):
    """Names of one kind of thing, in the order they were registered.

    kind: the noun for error messages; homes: modules that register names, imported in order when a name is first looked
    up, so that the list is always complete and nothing is imported early.

    >>> metrics = Registry("metric")
    >>> @metrics.register("top1")
    ... def top1(): return "ok"
    >>> metrics["top1"]()
    'ok'
    >>> metrics["top"]
    Traceback (most recent call last):
    ssmclip.registry.UnknownName: unknown metric 'top'; did you mean 'top1'? known: top1
    """

    def __init__(self, kind: str, homes: Sequence[str] = ()):
        self.kind = kind
        self._items: dict[str, T] = {}
        self._homes = list(homes)

    def register(self, name: str):
        """Return a decorator that registers what it decorates under `name`. Raises ValueError if the name is taken.

        The same lines of the same file replace their earlier registration, so a recipe can be loaded twice.
        """

        def add(item: T) -> T:
            if name in self._items and not (_lines(item) and _lines(item) == _lines(self._items[name])):
                raise ValueError(f"{self.kind} {name!r} is already registered: choose another name")
            self._items[name] = item
            return item

        return add

    @property
    def _all(self) -> dict[str, T]:
        while self._homes:
            importlib.import_module(self._homes.pop(0))
        return self._items

    def __getitem__(self, name: str) -> T:
        if name not in self._all:
            raise UnknownName(self.kind, name, self._items)
        return self._items[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._all)

    def __contains__(self, name: str) -> bool:
        return name in self._all

    def __len__(self) -> int:
        return len(self._all)

    def items(self):
        return self._all.items()
