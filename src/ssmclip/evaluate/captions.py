"""How much of a caption fits into a text tower's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from statistics import mean

import torch
from torch import Tensor

from ssmclip.rows import Result

ROOM = 4096  # tokens: more than any word or caption here has
BATCH = 512


def token_counts(tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> list[int]:
    """Return the number of tokens of each text, untruncated, including start and end tokens."""
    pad = tokenizer([""], context_length=ROOM)[0, -1]
    counts = []
    for start in range(0, len(texts), BATCH):
        tokens = tokenizer(list(texts[start : start + BATCH]), context_length=ROOM)
        places = torch.arange(1, ROOM + 1)
        counts += ((tokens != pad) * places).amax(dim=1).tolist()  # the last that isn't filling
    return counts


def words_seen(tokenizer: Callable[..., Tensor], texts: Sequence[str], limit: int | None) -> list[int]:
    """Return how many space-separated words of each text fit completely into `limit` tokens (None: all).

    Byte pairs are merged within words, so a text's tokens are its words' tokens and those that mark start and end.
    """
    split = [text.split() for text in texts]
    if limit is None:
        return [len(words) for words in split]
    vocabulary = list(dict.fromkeys(word for words in split for word in words))
    marks, one = token_counts(tokenizer, ["", "a"])
    # Behind another word, for a word's first piece is another at the start of a text.
    cost = dict(zip(vocabulary, token_counts(tokenizer, [f"a {word}" for word in vocabulary]), strict=True))
    seen = []
    for words in split:
        totals = accumulate((cost[word] - one for word in words), initial=marks)
        seen.append(sum(total <= limit for total in totals) - 1 if words else 0)
    return seen


def spelled_out(tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> int:
    """Return how many texts are in a script that the tokenizer has no words of: those it has unknown tokens for, and
    those it needs more tokens for than they have letters, which are bytes of letters.

    Only texts with letters beyond ASCII can be among them.
    """
    foreign = [text for text in texts if any(letter.isalpha() and not letter.isascii() for letter in text)]
    if not foreign:
        return 0
    marks = token_counts(tokenizer, [""])[0]
    letters = [sum(map(str.isalpha, text)) for text in foreign]
    spelled = [tokens - marks > n for tokens, n in zip(token_counts(tokenizer, foreign), letters, strict=True)]
    unknown = getattr(getattr(tokenizer, "tokenizer", None), "unk_token_id", None)
    if unknown is not None:
        has = [(tokenizer([text], context_length=ROOM) == unknown).any().item() for text in foreign]
        spelled = [a or b for a, b in zip(spelled, has, strict=True)]
    return sum(spelled)


def cut_at(tokenizer: Callable[..., Tensor], limit: int) -> Callable[[list[str]], Tensor]:
    """Return the tokenizer with texts truncated to `limit` tokens and padded to its own width, as towers may need."""
    width = getattr(tokenizer, "context_length", None) or limit
    filling = tokenizer([""], context_length=ROOM)[0, -1].item()

    def cut(texts: list[str]) -> Tensor:
        return torch.nn.functional.pad(tokenizer(texts, context_length=limit), (0, width - limit), value=filling)

    return cut


def longer_than(tokenizer: Callable[..., Tensor], texts: Sequence[str], limit: int) -> bool:
    """Return whether the tower sees tokens beyond `limit`: its own limit is higher, and some text is longer."""
    own = getattr(tokenizer, "context_length", limit)
    if own is not None and own <= limit:
        return False
    longest = sorted(texts, key=len)[-64:]
    return max(token_counts(tokenizer, longest)) > limit


def caption_rows(model: str, task: str, tokenizer: Callable[..., Tensor], texts: Sequence[str]) -> list[Result]:
    """Return rows of one text tower on captions: words, words it sees, share of captions it sees completely."""
    limit = getattr(tokenizer, "context_length", None)
    words = [len(text.split()) for text in texts]
    seen = words_seen(tokenizer, texts, limit)
    tokens = token_counts(tokenizer, texts)
    values = {
        "words": mean(words),
        "tokens": mean(tokens),
        "words_seen": mean(seen),
        "whole_captions": mean(s == w for s, w in zip(seen, words, strict=True)),
    }
    extra = {"context_length": limit}
    return [Result(model, task, metric, float(value), n=len(texts), extra=extra) for metric, value in values.items()]
