"""Generated pairs that need no files: scikit-learn's handwritten digits, and scenes of coloured, textured shapes.

An `Item` draws itself at any size and knows its captions and class. The same index and seed give the same picture,
byte for byte.

Some colour-shape pairs (`HELD_OUT`) never occur in training, though each of their colours and shapes does. Every colour
and every shape is in exactly two held-out pairs: who sees only colours, or only shapes, gets half of them right.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from ssmclip.registry import Registry

NATIVE_SIZE = 48
TRAIN_SCENES = 6000
TEST_SCENES = 640
CAPTIONS_PER_ITEM = 6
SPLITS = ("train", "test")

PAIR_SOURCES: Registry[Callable[[], list[Item]]] = Registry("synthetic source")


@dataclass(frozen=True)
class Item:
    """A picture that can be drawn at any size (pixels, square), its captions, and its class."""

    key: str
    captions: tuple[str, ...]
    label: int
    draw: Callable[[int], Image.Image]


# ---- digits ----------------------------------------------------------------------------------------------------------

DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_WORDINGS = (
    "a handwritten {word}",
    "the digit {word}",
    "the number {word}, written by hand",
    "a scan of a {word}",
    "a {word} in black ink on white paper",
    "the digit {number}",
    "a handwritten {number}",
)
TEST_EVERY = 5


def digits(split: str = "train") -> list[Item]:
    """Return scikit-learn's 1,797 digits, 8 x 8 pixels scaled up; every fifth is for testing. Classes: DIGIT_NAMES."""
    _check(split)
    _, labels = _digits_table()
    chosen = [i for i in range(len(labels)) if (i % TEST_EVERY == 0) == (split == "test")]
    return [
        Item(
            key=f"digits/{split}/{index:05d}",
            captions=tuple(w.format(word=DIGIT_NAMES[labels[index]], number=labels[index]) for w in DIGIT_WORDINGS),
            label=int(labels[index]),
            draw=partial(_draw_digit, index),
        )
        for index in chosen
    ]


@lru_cache(maxsize=1)
def _digits_table() -> tuple[np.ndarray, np.ndarray]:
    """Return scikit-learn's digits, `load_digits()`: images (n, 8, 8) and labels (n,).

    Its file is read here: importing scikit-learn takes longer than all the rest of `ssmclip datasets`.
    """
    (package,) = find_spec("sklearn").submodule_search_locations
    table = np.loadtxt(Path(package) / "datasets" / "data" / "digits.csv.gz", delimiter=",")
    ink = np.rint(table[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return 255 - ink, table[:, -1].astype(np.int64)


def _draw_digit(index: int, size: int) -> Image.Image:
    small = Image.fromarray(_digits_table()[0][index])
    return small.resize((size, size), Image.Resampling.BICUBIC).convert("RGB")


# ---- scenes ----------------------------------------------------------------------------------------------------------

COLOURS = {
    "red": (214, 40, 40),
    "pink": (250, 120, 180),
    "yellow": (245, 222, 40),
    "green": (40, 160, 60),
    "blue": (40, 80, 220),
    "purple": (140, 50, 170),
    "white": (248, 248, 248),
    "black": (18, 18, 18),
}
BACKGROUNDS = {
    "grey": (128, 128, 128),
    "beige": (205, 190, 160),
    "lavender": (165, 155, 200),
    "teal": (90, 150, 150),
    "brown": (120, 90, 70),
    "khaki": (130, 130, 80),
}
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
TEXTURES = ("plain", "striped", "dotted", "checkered")
RADII = {"small": (0.24, 0.29), "": (0.31, 0.36), "large": (0.38, 0.44)}  # of the picture's side
PLACES = {
    "in the middle": (0.5, 0.5),
    "on the left": (0.2, 0.5),
    "on the right": (0.8, 0.5),
    "at the top": (0.5, 0.2),
    "at the bottom": (0.5, 0.8),
    "in the corner": (0.2, 0.2),
}

# Pairs are (colour, shape); with 8 of each, each colour and each shape is in two held-out pairs.
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
HELD_OUT = tuple(
    (colour, SHAPES[(number + shift) % len(SHAPES)]) for number, colour in enumerate(COLOURS) for shift in (0, 3)
)
SEEN = tuple(pair for pair in PAIRS if pair not in HELD_OUT)

# Some leave the colour out: what a batch cannot tell by colour it has to tell by shape, which is learned last.
SCENE_WORDINGS = (
    "a {what}",
    "a drawing of a {what}",
    "there is a {what}",
    "the shape is a {shape} and its colour is {colour}",
    "a {size} {what} {place}",
    "a {texture} {what} on a {background} background",
    "a {shape}",
    "this is a {shape}",
    "a drawing of a {shape}",
)


@dataclass(frozen=True)
class Scene:
    """The contents of a picture. x, y, radius: fractions of the picture's side; fill, ground: RGB."""

    colour: str
    shape: str
    texture: str
    size: str
    place: str
    background: str
    x: float
    y: float
    radius: float
    fill: tuple[int, int, int]
    ground: tuple[int, int, int]


def scenes(split: str = "train", count: int | None = None, seed: int = 0) -> list[Item]:
    """Return captioned scenes: "train" of SEEN pairs, "test" of HELD_OUT ones, equally often. label: place in it."""
    _check(split)
    pairs, default = (SEEN, TRAIN_SCENES) if split == "train" else (HELD_OUT, TEST_SCENES)
    items = []
    for index in range(default if count is None else count):
        key = f"scenes/{split}/{index:05d}"
        draws = random.Random(f"{seed}/{key}")
        scene = make_scene(*pairs[index % len(pairs)], draws)
        items.append(Item(key, describe(scene, draws), index % len(pairs), partial(render, scene)))
    return items


def make_scene(colour: str, shape: str, draws: random.Random) -> Scene:
    """Return a scene, with everything but colour and shape drawn by `draws`."""
    size = draws.choice(list(RADII))
    radius = draws.uniform(*RADII[size])
    place = draws.choice(list(PLACES))
    x, y = PLACES[place]
    if place == "in the corner":
        x, y = draws.choice((x, 1 - x)), draws.choice((y, 1 - y))
    margin = radius + 0.03  # the whole shape stays in the picture
    x, y = (min(max(v + draws.uniform(-0.05, 0.05), margin), 1 - margin) for v in (x, y))
    background = draws.choice(list(BACKGROUNDS))
    return Scene(
        colour=colour,
        shape=shape,
        texture=draws.choice(TEXTURES),
        size=size,
        place=place,
        background=background,
        x=x,
        y=y,
        radius=radius,
        fill=_jitter(COLOURS[colour], 10, draws),
        ground=_jitter(BACKGROUNDS[background], 12, draws),
    )


def describe(scene: Scene, draws: random.Random) -> tuple[str, ...]:
    """Return captions in different wordings; each names the shape, at least half of them the colour."""
    what = f"{scene.colour} {scene.shape}"
    return tuple(
        " ".join(
            wording.format(
                what=what,
                colour=scene.colour,
                shape=scene.shape,
                texture=scene.texture,
                size=scene.size,
                place=scene.place,
                background=scene.background,
            ).split()
        )
        for wording in draws.sample(SCENE_WORDINGS, CAPTIONS_PER_ITEM)
    )


def render(scene: Scene, size: int = NATIVE_SIZE) -> Image.Image:
    """Draw the scene as an RGB picture of size x size pixels.

    Drawn four times as large, in integers, and averaged: edges are smooth, and the bytes are the same on any machine.
    """
    big = 4 * size
    mask = Image.new("L", (big, big))
    _draw_shape(ImageDraw.Draw(mask), scene, big)
    picture = Image.new("RGB", (big, big), scene.ground)
    picture.paste(_textured(scene, big), mask=mask)
    return picture.reduce(4)


def _draw_shape(canvas: ImageDraw.ImageDraw, scene: Scene, side: int) -> None:
    x, y, r = scene.x * side, scene.y * side, scene.radius * side

    def polygon(points: Sequence[tuple[float, float]], fill: int = 255) -> None:
        canvas.polygon([(round(x + r * px), round(y + r * py)) for px, py in points], fill=fill)

    def ellipse(px: float, py: float, pr: float, fill: int = 255) -> None:
        box = (x + r * (px - pr), y + r * (py - pr), x + r * (px + pr), y + r * (py + pr))
        canvas.ellipse([round(v) for v in box], fill=fill)

    if scene.shape in OUTLINES:
        polygon(OUTLINES[scene.shape])
    else:
        ellipse(0.0, 0.0, 1.0)
        if scene.shape == "ring":
            ellipse(0.0, 0.0, 0.58, fill=0)


def _textured(scene: Scene, side: int) -> Image.Image:
    """Return the shape's colour with its pattern, in a shade that keeps the colour recognisable."""
    shade = tuple(v * 6 // 10 if sum(scene.fill) > 150 else v + 75 for v in scene.fill)
    paint = Image.new("RGB", (side, side), scene.fill)
    if scene.texture == "plain":
        return paint
    canvas = ImageDraw.Draw(paint)
    step = max(round(scene.radius * side * 0.5), 4)
    for row, top in enumerate(range(0, side, step)):
        if scene.texture == "striped":
            canvas.rectangle((0, top, side, top + step // 2 - 1), fill=shade)
            continue
        for column, left in enumerate(range(0, side, step)):
            if scene.texture == "checkered" and (row + column) % 2:
                canvas.rectangle((left, top, left + step - 1, top + step - 1), fill=shade)
            elif scene.texture == "dotted":
                canvas.ellipse((left, top, left + step // 2, top + step // 2), fill=shade)
    return paint


def _star() -> list[tuple[float, float]]:
    radii = (1.0, 0.42)
    return [(radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)]


def _heart() -> list[tuple[float, float]]:
    turns = [2 * math.pi * i / 40 for i in range(40)]
    return [
        (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 17)
        for t in turns
    ]


OUTLINES = {
    "square": [(-0.85, -0.85), (0.85, -0.85), (0.85, 0.85), (-0.85, 0.85)],
    "triangle": [(0.0, -0.95), (0.95, 0.8), (-0.95, 0.8)],
    "diamond": [(0.0, -1.0), (0.75, 0.0), (0.0, 1.0), (-0.75, 0.0)],
    "cross": [
        (sx * px, sy * py)
        for sx, sy, corner in ((1, 1, 0), (-1, 1, 1), (-1, -1, 0), (1, -1, 1))
        for px, py in (((0.95, 0.32), (0.32, 0.32), (0.32, 0.95)), ((0.32, 0.95), (0.32, 0.32), (0.95, 0.32)))[corner]
    ],
    "star": _star(),
    "heart": _heart(),
}


def _jitter(colour: tuple[int, int, int], most: int, draws: random.Random) -> tuple[int, int, int]:
    red, green, blue = (min(max(v + draws.randint(-most, most), 0), 255) for v in colour)
    return red, green, blue


# ---- what training can ask for
# ----------------------------------------------------------------------------------------


@PAIR_SOURCES.register("digits")
def _digit_pairs() -> list[Item]:
    return digits("train")


@PAIR_SOURCES.register("scenes")
def _scene_pairs() -> list[Item]:
    return scenes("train")


@PAIR_SOURCES.register("quickstart")
def _quickstart_pairs() -> list[Item]:
    return 2 * digits("train") + scenes("train")  # the digits twice: they are few beside the scenes


def _check(split: str) -> None:
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS} (got {split!r})")
