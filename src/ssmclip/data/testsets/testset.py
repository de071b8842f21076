"""What evaluation takes: pictures with their names, and classes or captions. `TestSet` is its type."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from ssmclip.data.testsets.card import SORTED, Card, Found, Question
from ssmclip.data.testsets.prompts import Names, Prompts, chosen, folders_on, names_on, plain, templates_on

KINDS = ("classification", "retrieval", "multilabel", "matching")


class TestSet(Protocol):
    """A data set to evaluate on. Anything with these attributes is one; `PictureSet` has their defaults.

    name: of its rows' task; kind: one of KINDS; where: the files, for a person; keys: a name for each picture; labels:
    each picture's class (None: it has none); captions: each picture's (None: it has none); classnames: a name for each
    class, or several that mean the same; templates: prompts with {} for the name; prompts: where names and templates
    come from; groups: a name for each picture, where the set has groups; files: what the pictures are read from, for
    telling whether they have changed; said: what a reader must know of this copy ("": nothing); split: which part of
    the data set this is, "" where that is not known; expected: images in the whole test set; answers: all classes that
    are right for each picture (None: its label alone); questions: what pictures and texts are to be matched (None:
    nothing is).
    """

    __test__ = False  # no tests, though pytest goes by its name

    card: Card
    name: str
    kind: str
    where: str
    keys: Sequence[str]
    labels: Sequence[int] | None
    captions: Sequence[list[str]] | None
    classnames: Names
    templates: tuple[str, ...]
    prompts: str
    groups: Sequence[str] | None
    files: tuple[Path, ...]
    said: str
    split: str
    expected: int
    answers: Sequence[tuple[int, ...]] | None
    questions: Sequence[Question] | None

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """Return (picture, label), or the picture of a set without labels. Raises BadImage."""

    def picture(self, index: int) -> Image.Image:
        """Return a picture. Raises BadImage."""


class PictureSet:
    """The defaults of a `TestSet`. A data set of one's own sets `card` and `keys` and defines `picture`.

    n: images there are; partial: whether there are fewer than in the whole test set.
    """

    card: Card
    keys: Sequence[str]
    where: str = ""
    labels: Sequence[int] | None = None
    captions: Sequence[list[str]] | None = None
    classnames: Names = ()
    templates: tuple[str, ...] = ()
    prompts: str = ""
    groups: Sequence[str] | None = None
    files: tuple[Path, ...] = ()
    said: str = ""
    split: str = ""
    answers: Sequence[tuple[int, ...]] | None = None
    questions: Sequence[Question] | None = None

    @property
    def name(self) -> str:
        return self.card.name

    @property
    def kind(self) -> str:
        return self.card.kind

    @property
    def n(self) -> int:
        return len(self.keys)

    @property
    def expected(self) -> int:
        return self.card.test_size or self.n

    @property
    def partial(self) -> bool:
        return self.n < self.expected

    def __len__(self) -> int:
        return self.n

    def picture(self, index: int) -> Image.Image:
        """Return a picture. Raises BadImage."""
        raise NotImplementedError  # each kind of set has its own; a set without pictures cannot be evaluated

    def __getitem__(self, index: int) -> Any:
        """Return (picture, label), or the picture of a set without labels. Raises BadImage."""
        picture = self.picture(index)
        return picture if self.labels is None else (picture, self.labels[index])


class _FoundSet(PictureSet):
    """A test set as a layout found it on a disk. Raises ValueError for another number of pictures than of names."""

    def __init__(self, card: Card, found: Found):
        self.card, self.where, self.keys, self.files = card, found.where, found.keys, found.files
        self.groups, self.said, self.split = found.groups, found.said, found.split
        self._pictures = found.pictures
        if len(found.pictures) != self.n:
            raise ValueError(f"{self.where}: {len(found.pictures)} pictures with {self.n} names")

    def picture(self, index: int) -> Image.Image:
        return self._pictures[index]


class _OfClasses(_FoundSet):
    """A test set with classes: ds.classnames, ds.templates. Raises ValueError for names that occur twice, and for
    another set's classes."""

    def __init__(self, card: Card, found: Found):
        super().__init__(card, found)
        self.answers = found.answers
        self.classnames = found.classnames or names_on(card)
        self.templates = found.templates or templates_on(card)
        self.prompts = "the data set's own" if found.templates else "the card's"
        _check_classes(self)

    def ask(self, prompts: Prompts | None) -> None:
        """Take the names and templates of a file in place of the card's, where one is given."""
        card = self.card
        if prompts is not None:
            self.classnames, self.templates = chosen(prompts, card, self.classnames)
            self.prompts = prompts.source
        if card.classes and len(self.classnames) != card.classes:
            fewer = f"{len(self.classnames)} of {card.classes} classes"
            self.said = "; ".join(filter(None, (self.said, fewer)))


class Classification(_OfClasses):
    """`ds[i]` is (PIL picture, label), or raises BadImage; ds.labels, ds.classnames, ds.templates.

    inliers: () -> the data set with pictures of the classes, of a set of outliers.
    Raises ValueError for labels that are no class, class names that occur twice, and another set's classes.
    """

    labels: Sequence[int]

    def __init__(
        self,
        card: Card,
        found: Found,
        prompts: Prompts | None = None,
        inliers: Callable[[], Classification] | None = None,
    ):
        super().__init__(card, found)
        self.labels, self.inliers = found.labels or (), inliers
        _check_labels(self)
        self.ask(prompts)


class MultiLabel(_OfClasses):
    """`ds[i]` is a PIL picture, `ds.answers[i]` the classes of what is on it, which may be none. Raises ValueError for
    answers that are no class, class names that occur twice, and another set's classes."""

    answers: Sequence[tuple[int, ...]]

    def __init__(self, card: Card, found: Found, prompts: Prompts | None = None):
        super().__init__(card, found)
        _check_answers(self)
        self.ask(prompts)


class Matching(_FoundSet):
    """`ds[i]` is a PIL picture, `ds.questions` say which pictures and texts are to be matched. Raises ValueError for no
    questions, and for those that ask about pictures or texts that are not theirs."""

    questions: Sequence[Question]

    def __init__(self, card: Card, found: Found):
        super().__init__(card, found)
        self.questions = found.questions or ()
        _check_questions(self)

    @property
    def expected(self) -> int:
        """Return the number of questions in the whole test set, which its card's `test_size` counts."""
        return self.card.test_size or len(self.questions)

    @property
    def partial(self) -> bool:
        return len(self.questions) < self.expected


class Retrieval(_FoundSet):
    """`ds[i]` is a PIL picture, `ds.captions[i]` the list of its captions. Raises ValueError for another number."""

    captions: Sequence[list[str]]

    def __init__(self, card: Card, found: Found):
        super().__init__(card, found)
        self.captions = found.captions or ()
        if len(self.captions) != self.n:
            raise ValueError(f"{self.where}: {self.n} pictures with captions for {len(self.captions)}")


def check_names(where: str, names: Sequence[str], allowed: set[str] = frozenset()) -> None:
    """Raise ValueError for class names that occur more than once, but for the allowed ones."""
    if twice := [name for name, count in Counter(names).items() if count > 1 and name not in allowed]:
        raise ValueError(f"{where}: class names that occur more than once: {', '.join(twice)}")


def _check_classes(dataset: _OfClasses) -> None:
    card = dataset.card
    known_names = names_on(card)
    allowed = {name for name, count in Counter(known_names).items() if count > 1}  # ImageNet has two missiles
    check_names(dataset.where, dataset.classnames, allowed)
    names, known = ({plain(name) for name in names} for names in (dataset.classnames, known_names))
    # Where folders are told apart by codes, the names of classes are a matter of taste.
    alike = 2 * len(names & known) >= len(known) or bool(folders_on(card)) or card.folders == SORTED
    if known and (len(dataset.classnames) != len(known_names) or not alike):
        raise ValueError(
            f"{dataset.where} has {len(names)} classes ({', '.join(sorted(names)[:5])} ...), {card.name} has "
            f"{len(known)} ({', '.join(sorted(known)[:5])} ...): it is another data set"
        )


def _check_labels(dataset: Classification) -> None:
    """A label is used as an index later on: -1 would be the last class."""
    count = len(dataset.classnames)
    if len(dataset.labels) != dataset.n:
        raise ValueError(f"{dataset.where}: {dataset.n} pictures with {len(dataset.labels)} labels")
    if dataset.answers is not None and len(dataset.answers) != dataset.n:
        raise ValueError(f"{dataset.where}: {dataset.n} pictures with {len(dataset.answers)} lists of right classes")
    if outside := [i for i, label in enumerate(dataset.labels) if not _is_class(label, count)]:
        first = outside[0]
        raise ValueError(
            f"{dataset.where}: {len(outside)} labels are outside the {count} classes; the first is "
            f"{dataset.labels[first]} of {dataset.keys[first]}"
        )


def _check_answers(dataset: MultiLabel) -> None:
    if dataset.answers is None or len(dataset.answers) != dataset.n:
        raise ValueError(
            f"{dataset.where}: {dataset.n} pictures with {len(dataset.answers or ())} lists of the classes on them"
        )
    for key, answers in zip(dataset.keys, dataset.answers, strict=True):
        if outside := [label for label in answers if not _is_class(label, len(dataset.classnames))]:
            raise ValueError(
                f"{dataset.where}: {key} is said to show class {outside[0]}, and there are {len(dataset.classnames)}"
            )


def _check_questions(dataset: Matching) -> None:
    if not dataset.questions:
        raise ValueError(f"{dataset.where} has no questions: nothing says which pictures and texts are to be matched")
    for question in dataset.questions:
        texts, pictures = len(question.texts), len(question.pictures)
        if max(texts, pictures) < 2 or not all(0 <= place < dataset.n for place in question.pictures):
            raise ValueError(
                f"{dataset.where}: question {question.key} must have several pictures or texts, all of the test set "
                f"(got {pictures} pictures and {texts} texts)"
            )
        if not question.right or not all(0 <= i < pictures and 0 <= j < texts for i, j in question.right):
            raise ValueError(f"{dataset.where}: question {question.key} has no right answer among its own")


def _is_class(label: Any, count: int) -> bool:
    return isinstance(label, Integral) and 0 <= label < count
