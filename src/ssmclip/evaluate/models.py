"""The models of an evaluation, opened when they are needed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssmclip.evaluate.protocols import OWN, PROTOCOLS, Size
from ssmclip.models.names import Model, load


class Models:
    """Models under test by their labels, each opened when a task first asks for it.

    given: label -> a name or folder that `ssmclip.load` takes, or what it returned; the other arguments: see `Study`.
    The model asked for last is kept, and all of them once `keep` is set.
    """

    def __init__(
        self, given: Mapping[str, Any], protocol: str = OWN, device: str = "cpu", image_size: Size | None = None
    ):
        self.given, self.protocol, self.device, self.image_size = dict(given), protocol, device, image_size
        self.keep = False
        self._opened: dict[str, Model] = {}
        self._clips: dict[tuple[str, str], Model] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def open(self, label: str) -> Model:
        """Return a model with its own preprocessing. Raises what `ssmclip.load` raises."""
        if label not in self._opened:
            if not self.keep:
                self._opened.clear()
                self._clips.clear()
            given = self.given[label]
            if isinstance(given, (str, Path)):
                given = load(given, device=self.device, image_size=self.image_size)
            self._opened[label] = given if isinstance(given, Model) else Model(*given)
        return self._opened[label]

    def clip(self, label: str, kind: str) -> Model:
        """Return a model as the protocol has it look at test sets of a kind."""
        model = self.open(label)
        if (label, kind) not in self._clips:
            prepare = PROTOCOLS[self.protocol].preprocess
            seen = prepare(model.network, model.preprocess, kind, self.image_size)
            self._clips[label, kind] = replace(model, preprocess=seen, label=label)
        return self._clips[label, kind]

    def only(self, label: str) -> Models:
        """Return this model alone, sharing what is open."""
        one = Models({label: self.given[label]}, self.protocol, self.device, self.image_size)
        one.keep, one._opened, one._clips = self.keep, self._opened, self._clips
        return one
