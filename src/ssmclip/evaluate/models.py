"""The models of an evaluation, opened when they are needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ssmclip.evaluate.protocols import OWN, PROBE, PROTOCOLS, Size
from ssmclip.models.classifier import View, shown
from ssmclip.models.frozen import FeatureEncoder
from ssmclip.models.names import Model, find
from ssmclip.rows.precision import FLOAT32

log = logging.getLogger(__name__)

# A classifier and the (height, width) of its pictures -> more for the `extra` of its rows, such as what it costs.
Facts = Callable[[Model, tuple[int, int]], dict[str, Any]]


class Models:
    """Models under test by their labels, each opened when a task first asks for it.

    given: label -> a name or folder that `ssmclip.find` takes, or what it returned; the other arguments: see `Study`.
    The model asked for last is kept, and all of them once `keep` is set.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        protocol: str = OWN,
        device: str = "cpu",
        image_size: Size | None = None,
        view: View | None = None,
        facts: Facts | None = None,
        precision: str = FLOAT32,
    ):
        self.given, self.protocol, self.device, self.image_size = dict(given), protocol, device, image_size
        self.view, self.facts = replace(view or View(), image_size=image_size), facts
        self.precision = precision
        self.keep = False
        self._opened: dict[str, Model] = {}
        self._clips: dict[tuple[str, str], Model] = {}
        self._encoders: dict[tuple[str, str], Model] = {}

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def open(self, label: str) -> Model:
        """Return a model with its own preprocessing. Raises what `ssmclip.find` raises."""
        if label not in self._opened:
            if not self.keep:
                self._opened.clear()
                self._clips.clear()
                self._encoders.clear()
            given = self.given[label]
            if isinstance(given, (str, Path)):
                given = find(given, device=self.device, image_size=self.image_size, precision=self.precision)
            self._opened[label] = given if isinstance(given, Model) else Model(*given)
        return self._opened[label]

    def clip(self, label: str, kind: str) -> Model:
        """Return a model as the protocol has it look at test sets of a kind: a CLIP, or a classifier, which looks as
        its pretrained_cfg says, with the changes of `view`, if it is opened by name.

        Raises ValueError for a classifier and a protocol of CLIPs, and for a view that it cannot take.
        """
        model = self.open(label)
        if (label, kind) not in self._clips:
            prepare = self._classifier if model.classifies else self._clip
            self._clips[label, kind] = replace(prepare(label, model, kind), label=label)
        return self._clips[label, kind]

    def encoder(self, label: str, features: str) -> Model:
        """Return a frozen encoder of features of a kind (see `as_encoder`), which sees images as the protocol has
        probes see them: a classifier under its own protocol as in `clip`, without test-time pooling.

        Raises UnknownName, and ValueError for a model without such features.
        """
        model = self.open(label)
        if (label, features) not in self._encoders:
            prepare = self._classifier if model.classifies and self.protocol == OWN else self._clip
            seeing = replace(prepare(label, model, PROBE), network=model.network, label=label)
            self._encoders[label, features] = as_encoder(seeing, features)
        return self._encoders[label, features]

    def _clip(self, label: str, model: Model, kind: str) -> Model:
        if self.view != View(self.image_size):
            log.warning("%s is no classifier: crop ratio, test size and test-time pooling do not apply to it", label)
        prepare = PROTOCOLS[self.protocol].preprocess
        return replace(model, preprocess=prepare(model.network, model.preprocess, kind, self.image_size))

    def _classifier(self, label: str, model: Model, kind: str) -> Model:
        if self.protocol != OWN:
            raise ValueError(
                f"the protocol {self.protocol} is for CLIPs, and {label} is a classifier: leave the protocol out, or "
                "evaluate them separately"
            )
        if not isinstance(self.given[label], (str, Path)):
            return model
        network, preprocess = shown(model.network, self.view)
        return replace(model, network=network, preprocess=preprocess)

    def only(self, label: str) -> Models:
        """Return this model alone, sharing what is open."""
        how = self.protocol, self.device, self.image_size, self.view, self.facts, self.precision
        one = Models({label: self.given[label]}, *how)
        one.keep, one._opened, one._clips, one._encoders = self.keep, self._opened, self._clips, self._encoders
        return one


def as_encoder(model: Model, features: str) -> Model:
    """Return a model whose `encode_image` gives features of one of the FEATURES, and which reads no text.

    Raises UnknownName, and ValueError for a model without such features.
    """
    return replace(model, network=FeatureEncoder(model.network, features).eval(), tokenizer=None)
