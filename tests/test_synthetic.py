"""Synthetic pairs: the same bytes everywhere, fair splits, captions that say what is drawn."""

import hashlib
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from sklearn.datasets import load_digits

from ssmclip.data import synthetic
from ssmclip.data.synthetic import COLOURS, HELD_OUT, PAIRS, SEEN, SHAPES, TEXTURES, digits, scenes
from ssmclip.registry import UnknownName

HASHES = """
from hashlib import sha256
from ssmclip.data.synthetic import scenes
print(" ".join(sha256(item.draw(32).tobytes()).hexdigest()[:12] for item in scenes("train", count=200)[::40]))
"""


def test_scenes_are_the_same_bytes_in_every_process():
    # Written down once; they change only if the drawing is changed on purpose.
    golden = "7fc55588b687 40b47cadcba0 bb9e23f1378a 19a3edc5d45e 62691999db22"
    here = " ".join(
        hashlib.sha256(item.draw(32).tobytes()).hexdigest()[:12] for item in scenes("train", count=200)[::40]
    )
    env = {"PYTHONHASHSEED": "123"}
    there = subprocess.run([sys.executable, "-c", HASHES], capture_output=True, text=True, check=True, env=env)
    assert here == there.stdout.strip() == golden


def test_seed_changes_the_scenes_and_nothing_else_does():
    first, again, other = scenes("train", 20), scenes("train", 20), scenes("train", 20, seed=1)
    assert [item.captions for item in first] == [item.captions for item in again]
    assert sum(a.draw(32).tobytes() == b.draw(32).tobytes() for a, b in zip(first, other, strict=True)) == 0
    assert [item.label for item in first] == [item.label for item in other]


def test_held_out_pairs_are_fair():
    assert len(HELD_OUT) == 16
    assert len(SEEN) == 48
    assert set(SEEN) | set(HELD_OUT) == set(PAIRS)
    assert not set(SEEN) & set(HELD_OUT)
    assert set(Counter(colour for colour, _ in HELD_OUT).values()) == {2}
    assert set(Counter(shape for _, shape in HELD_OUT).values()) == {2}
    assert {colour for colour, _ in SEEN} == set(COLOURS)
    assert {shape for _, shape in SEEN} == set(SHAPES)


@pytest.mark.parametrize("split", ["train", "test"])
def test_captions_name_the_shape_mostly_the_colour_and_no_other_of_their_kind(split):
    pairs = SEEN if split == "train" else HELD_OUT
    for item in scenes(split):
        for caption in item.captions:
            words = caption.replace(",", "").split()
            assert {w for w in words if w in COLOURS} <= {pairs[item.label][0]}
            assert {w for w in words if w in SHAPES} == {pairs[item.label][1]}
        assert sum(pairs[item.label][0] in caption.split() for caption in item.captions) >= 3


def test_every_pair_is_equally_frequent():
    assert set(Counter(item.label for item in scenes("train")).values()) == {125}
    assert set(Counter(item.label for item in scenes("test")).values()) == {40}


@pytest.mark.parametrize("texture", TEXTURES)
def test_the_drawn_colours_are_the_named_ones(texture):
    # Independent of the drawing: the pixels that differ from the background are nearest to the colour of that name.
    checked = 0
    for item in scenes("train", 480):
        scene = item.draw.args[0]
        if scene.texture != texture:
            continue
        pixels = np.asarray(item.draw(48)).reshape(-1, 3).astype(int)
        inside = pixels[np.abs(pixels - scene.fill).sum(1) < 12]
        assert len(inside) > 12
        distances = {name: np.abs(np.mean(inside, 0) - rgb).sum() for name, rgb in COLOURS.items()}
        assert min(distances, key=distances.get) == scene.colour
        checked += 1
    assert checked > 50


def test_the_whole_shape_is_in_the_picture():
    for item in scenes("train", 240):
        scene = item.draw.args[0]
        pixels = np.asarray(item.draw(48)).astype(int)
        edge = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
        assert (edge == scene.ground).all()


def test_digits_are_scikit_learns():
    table = load_digits()
    train, test = digits("train"), digits("test")
    assert (len(train), len(test)) == (1437, 360)
    assert not {item.key for item in train} & {item.key for item in test}
    assert [item.label for item in test] == table.target[::5].tolist()
    # Scaled up and averaged back, they are the original up to interpolation.
    for number in (0, 7, 100):
        small = 255 - np.asarray(test[number].draw(64).convert("L").reduce(8)).astype(float)
        original = table.images[5 * number] * 255 / 16
        assert np.corrcoef(small.ravel(), original.ravel())[0, 1] > 0.97
        assert synthetic.DIGIT_NAMES[test[number].label] in test[number].captions[0]


def test_unknown_names_are_errors_that_list_the_known():
    with pytest.raises(UnknownName, match="digits, quickstart, scenes"):
        synthetic.PAIR_SOURCES["scene"]
    with pytest.raises(ValueError, match="'train', 'test'"):
        scenes("validation")
