"""Which part of a data set its files are of, by the names people give to splits."""

from __future__ import annotations

import re
from collections.abc import Collection

FAMILIES = (("test", "testing"), ("val", "validation", "valid", "dev"), ("train", "training"))
ALL = frozenset(name for family in FAMILIES for name in family)


def spellings(split: str) -> tuple[str, ...]:
    """Return the names a split goes by, its own first.

    >>> spellings("val")
    ('val', 'validation', 'valid', 'dev')
    """
    family = next((names for names in FAMILIES if split in names or split.startswith(f"{names[0]}_")), ())
    return tuple(dict.fromkeys((split, *family)))


def choose_split(split: str, present: Collection[str]) -> tuple[str, str]:
    """Return (the split to read of those that are present, "" for none; what a reader must know about it).

    A set that is tested on its test split is read from a validation split where no test split was published, and that
    is said. Never the other way: the test split beside a validation set often has no labels, and is another set.

    >>> choose_split("val", ["test", "validation"]), choose_split("val", ["test"])
    (('validation', ''), ('', ''))
    >>> choose_split("test", ["train", "validation"])
    ('validation', 'the split validation, there is no test')
    """
    if found := next((name for name in spellings(split) if name in present), ""):
        return found, ""
    if split in FAMILIES[0]:
        found = next((name for name in FAMILIES[1] if name in present), "")
    return found, f"the split {found}, there is no {split}" if found else ""


def split_in(name: str, split: str) -> str:
    """Return the split that the name of a file or folder gives, "" for none. split: one to know besides the usual.

    >>> split_in("validation-00000-of-00014", "val"), split_in("TEST_1k", ""), split_in("imagenet-val.1", "")
    ('validation', 'test', 'val')
    >>> split_in("latest", ""), split_in("val_images-0", "val_images")
    ('', 'val_images')
    """
    name = name.lower()
    words = re.findall("[a-z]+", name)
    if split and re.match(rf"{re.escape(split.lower())}(?![a-z])", name):
        return split.lower()
    return next((word for word in words if word in ALL), "")
