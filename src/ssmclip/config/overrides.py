"""Settings as text and as JSON: `--set KEY=VALUE`, and the config.json stored with the weights."""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal

from ssmclip.config.bounds import Settings
from ssmclip.config.settings import TrainConfig
from ssmclip.registry import UnknownName


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """Return the config with `KEY=VALUE` changes. KEY is a path ("optimiser.lr") or a unique last name ("lr").

    VALUE is parsed as the field's type: numbers, true/false, none, plain text, JSON for tuples and dictionaries.
    Raises UnknownName listing the known keys; ValueError with the given value and the expected type.
    """
    tree = to_dict(config)
    known = _leaves(type(config))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"a change to a setting must be KEY=VALUE (got {override!r})")
        path = _resolve(key.strip(), known)
        *groups, leaf = path.split(".")
        node = tree
        for group in groups:
            node = node[group]
        node[leaf] = _parse(text.strip(), known[path], path)
    return from_dict(tree)


def to_dict(config: Settings) -> dict[str, Any]:
    """Return settings as plain JSON values."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def from_dict(values: dict[str, Any]) -> TrainConfig:
    """Return a config from plain JSON values, the inverse of `to_dict`. Missing fields take their defaults.

    Raises UnknownName for unknown fields, ValueError for values of another type.
    """
    return _build(TrainConfig, values, "")


def changed(group: Settings, values: dict[str, Any], name: str) -> Any:
    """Return a group of settings with changes as plain JSON values. name: what errors call the group.

    Raises UnknownName for unknown fields, ValueError for values of another type or out of range.
    """
    return _build(type(group), to_dict(group) | values, f"{name}.")


def changed_fields(old: TrainConfig, new: TrainConfig) -> dict[str, tuple[Any, Any]]:
    """Return the full names of the fields that differ, each with its old and new value."""
    before, after = _values(to_dict(old), _leaves(TrainConfig)), _values(to_dict(new), _leaves(TrainConfig))
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}


def _leaves(cls: type, prefix: str = "") -> dict[str, Any]:
    """Return the type of every field that is not a group, by full name."""
    found = {}
    for name, kind in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(kind):
            found |= _leaves(kind, f"{prefix}{name}.")
        else:
            found[prefix + name] = kind
    return found


def _values(tree: dict[str, Any], leaves: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for path in leaves:
        node: Any = tree
        for part in path.split("."):
            node = node[part]
        found[path] = node
    return found


def _resolve(key: str, known: dict[str, Any]) -> str:
    if key in known:
        return key
    ends = [path for path in known if path.endswith("." + key)]
    if len(ends) > 1:
        raise ValueError(f"setting {key!r} is ambiguous: write one of {', '.join(ends)}")
    if not ends:
        raise UnknownName("setting", key, known)
    return ends[0]


def _parse(text: str, kind: Any, path: str) -> Any:
    """Return command-line text as the JSON value of a field of type `kind`; `_convert` checks it later."""
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    if type(None) in options and text.lower() == "none":
        return None
    if str in options or any(typing.get_origin(option) is Literal for option in options):
        return text
    try:
        if float in options and "[" not in text:
            return float(text)  # .001 is no JSON
        return json.loads(text.lower() if bool in options else text)
    except ValueError:
        raise ValueError(f"{path} must be {_describe(kind)} (got {text})") from None


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, dict):
        raise ValueError(f"{prefix.rstrip('.')} must be a group of settings (got {values!r})")
    hints = typing.get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise UnknownName("setting", prefix + key, [prefix + known for known in hints])
    made = {}
    for key, value in values.items():
        kind = hints[key]
        if dataclasses.is_dataclass(kind):
            made[key] = _build(kind, value, f"{prefix}{key}.")
        else:
            made[key] = _convert(value, kind, prefix + key)
    return cls(**made)


def _convert(value: Any, kind: Any, path: str) -> Any:
    """Convert a JSON value to the field's type: lists to tuples, integers to floats. Raises ValueError otherwise."""
    try:
        return _as_type(value, kind)
    except TypeError:
        raise ValueError(f"{path} must be {_describe(kind)} (got {value!r})") from None


def _as_type(value: Any, kind: Any) -> Any:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if _is_union(kind):
        return _first_fit(value, args)
    if origin is Literal:
        if value in args:
            return value
    elif origin is tuple:
        return _as_tuple(value, args)
    elif origin is dict:
        if isinstance(value, dict):
            return {key: each if args[1] is Any else _as_type(each, args[1]) for key, each in value.items()}
    elif kind is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value):
            return float(value)
    elif type(value) is kind:  # exact, since True is an int too
        return value
    raise TypeError


def _first_fit(value: Any, kinds: Sequence[Any]) -> Any:
    if value is None and type(None) in kinds:
        return None
    for kind in kinds:
        try:
            return _as_type(value, kind)
        except TypeError:
            continue
    raise TypeError


def _as_tuple(value: Any, kinds: Sequence[Any]) -> tuple:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    if len(kinds) == 2 and kinds[1] is Ellipsis:
        kinds = (kinds[0],) * len(value)
    if len(kinds) != len(value):
        raise TypeError
    return tuple(_as_type(item, kind) for item, kind in zip(value, kinds, strict=True))


def _is_union(kind: Any) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _describe(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    if _is_union(kind):
        return " or ".join(_describe(option) for option in typing.get_args(kind))
    if kind is type(None):
        return "none"
    if isinstance(kind, type) and typing.get_origin(kind) is None:
        return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, kind.__name__)
    return str(kind).replace("typing.", "") + " as JSON"
