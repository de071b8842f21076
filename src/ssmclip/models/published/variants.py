"""An encoder of this package by its fields: the registered variant that has them, else the family and its fields."""

from __future__ import annotations

import inspect
from typing import Any


def named(variants: dict[str, dict], family: str, encoder: type, fields: dict[str, Any]) -> dict[str, Any]:
    """Return timm's name and arguments, {"architecture": ..., "model_args": ...}.

    fields: those of `encoder`, with num_classes and in_chans. A variant with the same fields gives its name and keeps
    only num_classes, and in_chans where it isn't 3; otherwise the arguments are the fields that differ from defaults.
    """
    fields = dict(fields)
    inputs_and_outputs = {"num_classes": fields.pop("num_classes")}
    if (in_chans := fields.pop("in_chans")) != 3:
        inputs_and_outputs["in_chans"] = in_chans
    parameters = inspect.signature(encoder).parameters
    defaults = {name: parameters[name].default for name in parameters if name in fields}
    for name, own in variants.items():
        if {**defaults, **own} == {**defaults, **fields}:
            return {"architecture": name, "model_args": inputs_and_outputs}
    changed = {name: value for name, value in fields.items() if value != defaults.get(name)}
    return {"architecture": family, "model_args": changed | inputs_and_outputs}
