"""Name an encoder of this package by its fields: the registered variant with them, else the family and its fields."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from ssmclip.models.published.layout import guess


class Unseen(NamedTuple):
    """A field that the weights don't determine. hint: the requested value, or None; usual: the guess without a hint."""

    hint: Any
    usual: Any


def named(
    variants: dict[str, dict],
    family: str,
    encoder: type,
    fields: dict[str, Any],
    unseen: Mapping[str, Unseen] | None = None,
) -> dict[str, Any]:
    """Return timm's name and arguments, {"architecture": ..., "model_args": ...}.

    fields: those of `encoder` that the weights tell, with num_classes and in_chans; unseen: the others. A variant with
    these fields, and those hinted, gives its name and keeps only num_classes, and in_chans where it isn't 3; otherwise
    the arguments are the fields that differ from defaults; an unseen one without a hint is guessed, which is logged.
    """
    fields, unseen = dict(fields), unseen or {}
    inputs_and_outputs = {"num_classes": fields.pop("num_classes")}
    if (in_chans := fields.pop("in_chans")) != 3:
        inputs_and_outputs["in_chans"] = in_chans
    parameters = inspect.signature(encoder).parameters
    defaults = {name: parameters[name].default for name in parameters if name in fields or name in unseen}
    known = fields | {name: field.hint for name, field in unseen.items() if field.hint is not None}
    for name, own in variants.items():
        settings = {**defaults, **own}
        if settings == {**settings, **known} and settings.keys() == known.keys() | unseen.keys():
            return {"architecture": name, "model_args": inputs_and_outputs}
    known |= {name: guess(field.hint, name, field.usual) for name, field in unseen.items()}
    changed = {name: value for name, value in known.items() if value != defaults.get(name)}
    return {"architecture": family, "model_args": changed | inputs_and_outputs}
