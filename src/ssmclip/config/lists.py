"""Lists on the command line: items with commas between, of which some are paths that may hold commas themselves."""

from __future__ import annotations

import re
from collections.abc import Callable

_COMMA = re.compile(r"(?<!\\),")


def split_list(text: str, is_item: Callable[[str], bool] = lambda item: False) -> list[str]:
    r"""Return the items of a list with commas between; empty ones are left out.

    What is an item with its commas (`is_item`: a path that exists) is one, and the longest such is taken. Any other
    comma that is part of an item is written with a backslash before it.

    >>> split_list("digits,folder:a,b,", lambda item: item == "folder:a,b"), split_list(r"one\,two,three")
    (['digits', 'folder:a,b'], ['one,two', 'three'])
    """
    parts = [part.replace("\\,", ",") for part in _COMMA.split(text)]
    items = []
    while parts:
        longest = next((n for n in range(len(parts), 1, -1) if is_item(",".join(parts[:n]))), 1)
        items.append(",".join(parts[:longest]))
        del parts[:longest]
    return [item for item in items if item]


def split_label(text: str, is_item: Callable[[str], bool]) -> tuple[str, str]:
    r"""Return (label, item) of LABEL=ITEM, ("", item) where there is no label.

    What is an item with its equal signs (`is_item`) has no label; of several equal signs the first is meant behind
    which an item stands, else the last. One that is part of either is otherwise written with a backslash before it.

    >>> split_label("mine=lr=0.1", lambda item: item == "lr=0.1"), split_label("lr=0.1", lambda item: item == "lr=0.1")
    (('mine', 'lr=0.1'), ('', 'lr=0.1'))
    """
    if is_item(text):
        return "", text
    places = [match.start() for match in re.finditer(r"(?<!\\)=", text)]
    place = next((place for place in places if is_item(_plain(text[place + 1 :]))), places[-1] if places else None)
    return ("", _plain(text)) if place is None else (_plain(text[:place]), _plain(text[place + 1 :]))


def _plain(text: str) -> str:
    return text.replace("\\=", "=")
