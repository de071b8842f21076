"""Pictures and texts to be matched: compositionality (Winoground, SugarCrepe, ARO ...) and association (WinoGAViL).

q questions · n pictures · m texts · d embedding dimensions · s sets of pictures
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import comb, prod
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ssmclip.data.testsets.card import Question
from ssmclip.evaluate.captions import spelled_out
from ssmclip.evaluate.embeddings.embed import ImageEmbeddings, Settings, embed_images, embed_texts, subset
from ssmclip.evaluate.judge import JUDGES, Judge, Right, coverage
from ssmclip.evaluate.outliers import Part
from ssmclip.evaluate.statistics import paired
from ssmclip.evaluate.statistics.metrics import bootstrap_interval
from ssmclip.models.names import Model
from ssmclip.rows import Result
from ssmclip.rows.condition import CATEGORY

TEXT, IMAGE, GROUP, JACCARD = "text_score", "image_score", "group_score", "jaccard"
BLIND, BALANCED = "text_only", "mean_per_category"
BLOCK = 4096  # questions whose similarities are made at a time

Pattern = tuple[tuple[bool, ...], ...]  # which pictures (outer) and texts (inner) belong together


@dataclass(frozen=True)
class Answers:
    """Questions with equally many pictures and texts, and the model's similarities.

    blind: similarities of the mean of all pictures; right: which pictures and texts belong together.
    """

    questions: Sequence[Question]
    scores: Float[Tensor, "q n m"]
    blind: Float[Tensor, "q 1 m"]
    right: Bool[Tensor, "q n m"]


def _above(scores: Float[Tensor, "q n m"], right: Bool[Tensor, "q n m"]) -> Bool[Tensor, " q"]:
    """Return whether in every row with right entries, all of them are above all others; equals are not."""
    least = scores.masked_fill(~right, torch.inf).amin(dim=2)
    most = scores.masked_fill(right, -torch.inf).amax(dim=2)
    return ((least > most) | ~right.any(dim=2)).all(dim=1)


def _text(answers: Answers) -> Tensor:
    return _above(answers.scores, answers.right)


def _image(answers: Answers) -> Tensor:
    return _above(answers.scores.mT, answers.right.mT)


def _group(answers: Answers) -> Tensor:
    return _text(answers) & _image(answers)


def _blind(answers: Answers) -> Tensor:
    return _above(answers.blind, answers.right)


def _jaccard(answers: Answers) -> Tensor:
    """Return the Jaccard index of the right pictures and as many that score highest; of equals the last are chosen."""
    right, scores = answers.right[:, :, 0], answers.scores[:, :, 0]
    count = right.sum(dim=1)
    rank = scores.argsort(dim=1, stable=True).argsort(dim=1)  # 0: scores lowest
    both = (right & (rank >= right.shape[1] - count[:, None])).sum(dim=1)
    return both / (2 * count - both)


def _guessed_rows(right: Pattern) -> float:
    """Return how likely guesses are to put the right entries of every row above all others."""
    return prod(1 / comb(len(row), sum(row)) for row in right if any(row))


def _guessed_columns(right: Pattern) -> float:
    return _guessed_rows(tuple(zip(*right, strict=True)))


def _guessed_both(right: Pattern) -> float | None:
    """Return 1/6 for two pictures with a text each, whose scores must be the two highest of four; None for others."""
    one_each = all(sum(row) == 1 for row in right) and len(right) == len(right[0]) == 2
    return 1 / 6 if one_each else None


def _guessed_jaccard(right: Pattern) -> float:
    m, k = len(right), sum(row[0] for row in right)
    return sum(comb(k, j) * comb(m - k, k - j) / comb(m, k) * j / (2 * k - j) for j in range(k + 1))


@dataclass(frozen=True)
class Score:
    """of: what answers score, (q,), 0 to 1; guessed: what guesses score, from which pictures and texts belong together,
    None where that is not known; fits: whether questions with so many pictures and texts can have this score."""

    of: Callable[[Answers], Tensor]
    guessed: Callable[[Pattern], float | None]
    fits: Callable[[int, int], bool]


SCORES = {
    TEXT: Score(_text, _guessed_rows, lambda pictures, texts: texts > 1),
    IMAGE: Score(_image, _guessed_columns, lambda pictures, texts: pictures > 1),
    GROUP: Score(_group, _guessed_both, lambda pictures, texts: pictures > 1 and texts > 1),
    JACCARD: Score(_jaccard, _guessed_jaccard, lambda pictures, texts: pictures > 1 and texts == 1),
    BLIND: Score(_blind, _guessed_rows, lambda pictures, texts: pictures == 1),
}


@dataclass(frozen=True)
class Scored:
    """What questions score by one metric; chances: what guesses score in each, None where that is not known; sets:
    which of s sets of pictures each is about."""

    questions: Sequence[Question]
    values: Float[Tensor, " q"]
    chances: Sequence[float | None]
    sets: Int[Tensor, " q"]

    @property
    def chance(self) -> float | None:
        """Return what guesses score on average, None where that is not known of every question."""
        known = [chance for chance in self.chances if chance is not None]
        return sum(known) / len(known) if len(known) == len(self.chances) else None

    @property
    def count(self) -> int:
        """Return the number of sets of pictures."""
        return int(self.sets.max()) + 1

    def summed(self, values: Tensor) -> Tensor:
        """Return the sums over each set's questions: (q, ...) -> (s, ...)."""
        return values.new_zeros(self.count, *values.shape[1:]).index_add_(0, self.sets, values)


@JUDGES.register("matching")
class Matching(Judge):
    """Right texts must score higher than wrong ones for their picture, and right pictures for their text.

    Rows, of those that fit the questions, the card's metric first:

    text_score, image_score: for every picture all right texts are above all wrong ones, and the other way round;
    group_score is both, as Winoground defines them. With one picture text_score is the accuracy of SugarCrepe, ARO and
    VL-CheckList. jaccard: of a cue's pictures and as many that the model chooses (WinoGAViL). text_only: text_score
    with the mean of all pictures in place of each, which is what the texts alone give away. mean_per_category: the mean
    over categories of the card's metric, which is also given for each, under the key CATEGORY.

    Equal scores count as wrong, so a model that maps everything to one point has 0. Intervals resample sets of
    pictures, each with all its questions; the guessing level is exact. The first row's `extra` says how often the
    longer text is the right one, and how many texts the tokenizer can only spell out.
    Raises ValueError where no question is left, and for a metric that does not fit the questions.
    """

    kind = "matching"
    headline = TEXT

    @classmethod
    def takes(cls, model: Model, test_set: Any) -> bool:
        return model.tokenizer is not None

    def __init__(self, clip: Model, test_set: Any, settings: Settings):
        super().__init__(clip, test_set, settings)
        self.questions = [test_set.questions[place] for place in subset(len(test_set.questions), settings)]
        self.flat = list(dict.fromkeys(text for question in self.questions for text in question.texts))

    def check(self, metrics: Sequence[str]) -> None:
        asked = [metric for metric in metrics or [self.test_set.card.metric] if metric != BALANCED]
        forms = {(len(question.pictures), len(question.texts)) for question in self.questions}
        fitting = [name for name, score in SCORES.items() if any(score.fits(*form) for form in forms)]
        categories = {question.category for question in self.questions} - {""}
        unfit = [metric for metric in asked if metric not in fitting]
        if unfit := unfit or [BALANCED for metric in metrics if metric == BALANCED and len(categories) < 2]:
            raise ValueError(
                f"{self.test_set.card.name}: the metric {unfit[0]} does not fit its questions: choose of "
                f"{', '.join(fitting)}"
            )

    def see(self, pictures: Any) -> ImageEmbeddings:
        """Return what the model makes of the pictures that the questions are about, all of them. Raises ValueError for
        other pictures, such as distorted ones."""
        if pictures is not self.test_set:
            self.right(pictures)
        settings = replace(self.settings, max_images=None)  # questions were drawn, not pictures
        asked = sorted({place for question in self.questions for place in question.pictures})
        if len(asked) == len(pictures):
            return embed_images(self.clip, pictures, settings)
        seen = embed_images(self.clip, Part(pictures, asked), settings)
        unreadable = {asked[place]: why for place, why in seen.unreadable.items()}
        return replace(seen, index=torch.tensor(asked)[seen.index], unreadable=unreadable)

    def right(self, seen: Any) -> Right:
        raise ValueError(
            f"{self.test_set.card.name}: questions about pictures and texts have no accuracy of single pictures, and "
            "so none at levels of distortion; leave distorted: out"
        )

    def rows(self, seen: ImageEmbeddings, task: str, metrics: Sequence[str] = ()) -> list[Result]:
        self.check(metrics)
        answers = list(self._answers(seen))
        if not answers:
            raise ValueError(f"{self.test_set.card.name}: every question has a picture that could not be read")
        head = self.test_set.card.metric
        scored = {metric: _scored(answers, metric) for metric in SCORES}
        rows = []
        for metric in metrics or dict.fromkeys([head, *SCORES, BALANCED]):
            if metric == BALANCED:
                rows += self._balanced(scored[head], head)
            elif found := scored[metric]:
                rows += [self._row(found, metric), *(self._categories(found, metric) if metric == head else [])]
        about = self._about(seen, sum(len(part.questions) for part in answers))
        first = replace(rows[0], extra=about | rows[0].extra)
        return [replace(row, model=self.clip.label, task=task) for row in [first, *rows[1:]]]

    def _answers(self, seen: ImageEmbeddings) -> Iterator[Answers]:
        """Yield the questions whose pictures could all be read, those of a form together, with similarities."""
        texts = embed_texts(self.clip, self.flat, self.settings)
        row_of = {place: row for row, place in enumerate(seen.index.tolist())}
        text_of = {text: row for row, text in enumerate(self.flat)}
        blind = seen.features.mean(dim=0)
        forms: dict[tuple[int, int], list[Question]] = {}
        for question in self.questions:
            if all(place in row_of for place in question.pictures):
                forms.setdefault((len(question.pictures), len(question.texts)), []).append(question)
        for (n, m), asked in forms.items():
            for start in range(0, len(asked), BLOCK):
                part = asked[start : start + BLOCK]
                rows = torch.tensor([[row_of[place] for place in question.pictures] for question in part])
                columns = torch.tensor([[text_of[text] for text in question.texts] for question in part])
                pictures, own = seen.features[rows], texts[columns]
                right = torch.zeros(len(part), n, m, dtype=torch.bool)
                for row, question in enumerate(part):
                    right[(row, *torch.tensor(question.right).T)] = True
                yield Answers(part, pictures @ own.mT, (own @ blind)[:, None], right)

    def _row(self, scored: Scored, metric: str) -> Result:
        hits, counts = scored.summed(scored.values), scored.summed(torch.ones_like(scored.values))
        extra: dict[str, Any] = {"chance": scored.chance}
        if metric in (TEXT, IMAGE, GROUP):
            extra |= paired.marked(scored.values == 1, [question.key for question in scored.questions])
        low, high = bootstrap_interval(
            lambda weights: (weights @ hits) / (weights @ counts), scored.count, seed=self.settings.seed
        )
        return Result("", "", metric, scored.values.mean().item(), low, high, len(scored.values), extra=extra)

    def _categories(self, scored: Scored, metric: str) -> list[Result]:
        names = _categories(scored)
        places = {name: [i for i, q in enumerate(scored.questions) if q.category == name] for name in names}
        return [
            replace(self._row(_at(scored, places[name]), metric), where={CATEGORY: name})
            for name in (names if len(names) > 1 else ())
        ]

    def _balanced(self, scored: Scored | None, metric: str) -> list[Result]:
        """Return the mean over categories, none for fewer than two."""
        names = _categories(scored) if scored else []
        if len(names) < 2:
            return []
        scored = _at(scored, [place for place, question in enumerate(scored.questions) if question.category])
        category = torch.tensor([names.index(question.category) for question in scored.questions])
        member = torch.nn.functional.one_hot(category, len(names)).double()
        hits, counts = scored.summed(scored.values[:, None] * member), scored.summed(member)

        def mean(weights: Tensor) -> Tensor:
            return ((weights @ hits) / (weights @ counts)).nanmean(dim=-1)

        value = mean(torch.ones(scored.count, dtype=torch.float64)).item()
        low, high = bootstrap_interval(mean, scored.count, seed=self.settings.seed)
        extra = {"of": metric, "categories": len(names)}
        return [Result("", "", BALANCED, value, low, high, len(scored.questions), extra=extra)]

    def _about(self, seen: ImageEmbeddings, used: int) -> dict[str, Any]:
        known = coverage(seen, self.test_set)
        known.pop("partial", None)  # of pictures; questions are what is counted
        expected = self.test_set.card.test_size or len(self.test_set.questions)
        longer = [_longer(question) for question in self.questions if len(question.pictures) == 1]
        foreign = spelled_out(self.clip.tokenizer, self.flat)
        return {
            "title": self.test_set.card.title,
            "kind": self.kind,
            "pictures": len(seen.index),
            "parameters": self.clip.parameters,
            **known,
            **({"partial": {"used": used, "of": expected}} if used != expected else {}),
            **({"longer_text": sum(longer) / len(longer)} if longer else {}),
            **({"spelled_out": foreign} if foreign else {}),
        }


def _scored(answers: Sequence[Answers], metric: str) -> Scored | None:
    """Return what the questions score that a metric fits, None where it fits none."""
    score = SCORES[metric]
    fitting = [part for part in answers if score.fits(*part.right.shape[1:])]
    if not fitting:
        return None
    questions = [question for part in fitting for question in part.questions]
    values = torch.cat([score.of(part).double() for part in fitting])
    guessed = cache(score.guessed)
    chances = [guessed(_pattern(right)) for part in fitting for right in part.right.tolist()]
    return _of(questions, values, chances)


def _pattern(right: list[list[bool]]) -> Pattern:
    return tuple(map(tuple, right))


def _of(questions: Sequence[Question], values: Tensor, chances: Sequence[float | None]) -> Scored:
    known: dict[tuple[int, ...], int] = {}
    sets = [known.setdefault(tuple(sorted(question.pictures)), len(known)) for question in questions]
    return Scored(questions, values, chances, torch.tensor(sets))


def _at(scored: Scored, places: Sequence[int]) -> Scored:
    """Return some of the questions."""
    return _of([scored.questions[i] for i in places], scored.values[list(places)], [scored.chances[i] for i in places])


def _categories(scored: Scored) -> list[str]:
    return sorted({question.category for question in scored.questions} - {""})


def _longer(question: Question) -> float:
    """Return 1 where all right texts have more words than all wrong ones, a half for as many: a shortcut."""
    words, right = [len(text.split()) for text in question.texts], {text for _, text in question.right}
    least = min(words[place] for place in right)
    most = max(count for place, count in enumerate(words) if place not in right)
    return (float(least > most) + float(least >= most)) / 2
