"""The condition a row was measured under: a mapping of typed keys, with one printer and one parser.

    {"step": 200, "tower": "image"}    is printed    step=200, tower=image

Keys are registered with their type in KEYS; a program that varies something else registers its own key:

>>> KEYS.register("fog")(float)
<class 'float'>
>>> text(checked({"step": 200, "fog": 0.5}), against="other")
'step=200, fog=0.5, minus other'
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from ssmclip.registry import Registry, UnknownName

Value = int | float | str
Where = Mapping[str, Value]

STEP = "step"  # finished training steps
SEED = "seed"  # of a random draw that was made several times
LEVEL = "level"  # a distortion's level, as its label
BATCH = "batch"  # which batch, or how large, as the task says
TOWER = "tower"  # whose parameters a Hessian is of: image, text, whole
PROTOCOL = "protocol"  # how eigenvalues were found, where that is not Lanczos
IMAGE = "image"  # pixels of an image's side, or "HEIGHTxWIDTH"
TOKENS = "tokens"  # length of a text
ATTENTION = "attention"  # how attention was computed, where that is not the default
AVERAGE = "average"  # what the value is an average over, in words
SOURCE = "source"  # where data came from, such as one of several sources of training pairs
METHOD = "method"  # of explanation
PICTURE = "picture"  # its name
PRECISION = "precision"  # of a network's arithmetic, where that is not float32
QUERY = "query"  # the text or class that was looked for
CATEGORY = "category"  # of a test set's questions
CASE = "case"  # anything else, in words

KEYS: Registry[type | tuple[type, ...]] = Registry("key of where")
for name in (STEP, SEED, BATCH, TOKENS):
    KEYS.register(name)(int)
for name in (LEVEL, TOWER, PROTOCOL, ATTENTION, AVERAGE, SOURCE, METHOD, PICTURE, PRECISION, QUERY, CATEGORY, CASE):
    KEYS.register(name)(str)
for name in ("x", "y"):  # a place on a loss surface
    KEYS.register(name)(float)
KEYS.register(IMAGE)((int, str))
# What benchmarks vary.
for name in ("layers", "megabytes", "pixels", "side", "size", "threads", "vector_bytes", "width", "workers"):
    KEYS.register(name)(int)
for name in ("dim", "heads", "length", "state"):
    KEYS.register(name)((int, str))
for name in "command encoder kind memory operator pages pass prompts text_tower type".split():
    KEYS.register(name)(str)

BARE = (AVERAGE, CASE)  # printed without their key
_AVERAGES = re.compile(r"\d+ (parametric )?data sets.*|(mean|median) over .*")
_AGAINST = re.compile(r"(?:^|, )minus (.*)$", re.DOTALL)
_TOKENS = re.compile(r"(?:(.*) )?(\d+) tokens")
_BETWEEN = re.compile(r",\s*|\s+(?=\w+=)")


def checked(where: Where) -> dict[str, Value]:
    """Return a copy. Raises UnknownName for a key that is not registered, TypeError for a value of another type."""
    for key, value in where.items():
        if key not in KEYS:
            raise UnknownName(KEYS.kind, key, KEYS)
        if not isinstance(value, KEYS[key]) or isinstance(value, bool):
            raise TypeError(f"where[{key!r}] must be {_described(KEYS[key])} (got {value!r})")
    return dict(where)


def text(where: Where, against: str = "") -> str:
    """Return a mapping, and the model that is subtracted, as readable text.

    >>> text({"tokens": 77}), text({"image": "224x448", "attention": "plain"}), text({}, "B")
    ('77 tokens', 'image=224x448, attention=plain', 'minus B')
    """
    parts = [_printed(key, value) for key, value in where.items()]
    return ", ".join([*parts, *([f"minus {against}"] if against else [])])


def parse(condition: str) -> tuple[dict[str, Value], str]:
    """Parse what `text` returns, and the conditions in rows files of earlier versions: (where, against).

    >>> parse("step=4,batch=0,tower=image"), parse("step=200 77 tokens")
    (({'step': 4, 'batch': 0, 'tower': 'image'}, ''), ({'step': 200, 'tokens': 77}, ''))
    >>> parse("mean over levels, minus B")
    ({'average': 'mean over levels'}, 'B')
    """
    against = ""
    if found := _AGAINST.search(condition):
        condition, against = condition[: found.start()], found[1]
    if not condition:
        return {}, against
    if _AVERAGES.fullmatch(condition):
        return {AVERAGE: condition}, against
    where: dict[str, Value] = {}
    rest = condition
    if found := re.fullmatch(r"(\w+) (\w+=.*)", rest):  # an operator and its shape
        where["operator"], rest = found[1], found[2]
    tokens = _TOKENS.fullmatch(rest)
    if tokens:
        rest = (tokens[1] or "").rstrip(",")
    for part in _BETWEEN.split(rest) if rest else []:
        key, equals, value = part.partition("=")
        key = TOKENS if key == "text" else key  # what it was called
        read = _read(key, value) if equals and key in KEYS else None
        if read is None:
            return {CASE: condition}, against
        where[key] = read
    return where | ({TOKENS: int(tokens[2])} if tokens else {}), against


def _printed(key: str, value: Value) -> str:
    if key in BARE:
        return str(value)
    return f"{value} tokens" if key == TOKENS else f"{key}={value}"


def _read(key: str, value: str) -> Value | None:
    kind = KEYS[key]
    for one in kind if isinstance(kind, tuple) else (kind,):
        try:
            return one(value)
        except ValueError:
            continue
    return None


def _described(kind: type | tuple[type, ...]) -> str:
    names: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}
    return " or ".join(names.get(one, one.__name__) for one in (kind if isinstance(kind, tuple) else (kind,)))
