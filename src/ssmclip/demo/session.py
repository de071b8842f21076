"""What a page shows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ssmclip.data.distortions import DISTORTIONS
from ssmclip.data.distortions.registry import Table
from ssmclip.demo.answers import Gallery, Subject
from ssmclip.demo.inputs import LIMITS, Limits

__all__ = ["Session"]


@dataclass(frozen=True)
class Session:
    """What a page shows.

    subjects: the models; gallery: the index to search, if any; tables: "amplitude" and "gamma" of distortions; labels:
    those that the page opens with; examples: files of pictures to try; limits: of what visitors give.
    """

    subjects: tuple[Subject, ...]
    gallery: Gallery | None = None
    tables: Mapping[str, Table] = field(default_factory=dict)
    labels: Sequence[str] = ()
    examples: Sequence[Path] = ()
    limits: Limits = LIMITS

    @property
    def names(self) -> str:
        return ", ".join(subject.label for subject in self.subjects)

    def tables_of(self, distortion: str) -> dict[str, Table]:
        """Return those of the tables that a distortion takes."""
        return {kind: self.tables[kind] for kind in DISTORTIONS[distortion].tables if kind in self.tables}
