"""What a study runs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import ClassVar

from ssmclip.evaluate.embeddings.embed import Settings
from ssmclip.evaluate.models import Models
from ssmclip.rows import Result


class StudyTask(ABC):
    """One task of a study, opened and ready.

    name: what it is called; together: whether it takes all models at once, after those that take each by itself;
    one_process: whether the first of several processes does it alone; names_precision: whether its rows' models are
    named by their precision already (see `ssmclip.rows.precision`), which the study otherwise adds to `where`.
    """

    name: str
    together: ClassVar[bool] = False
    one_process: ClassVar[bool] = False
    names_precision: ClassVar[bool] = False

    @abstractmethod
    def measure(self, models: Models, settings: Settings) -> Iterator[list[Result]]:
        """Yield rows as they are made; what was yielded is kept when a later part fails."""
