"""A distortion from outside the package, in one file, goes wherever the package's own go; so does ImageNet-C's fog.

The commands run on it by FILE.py:NAME; expected pictures are computed here, without the package.
"""

import argparse
import sys

import numpy as np
import pytest
from PIL import Image

import ssmclip
from ssmclip.cli import distort as distort_command
from ssmclip.cli import evaluate as evaluate_command
from ssmclip.data.distortions import DISTORTIONS, UNDISTORTED, Distortion, distort, distortion
from ssmclip.data.distortions.registry import find, kept, parse_level
from ssmclip.rows import read_rows

FILE = """
import numpy as np

from ssmclip.data.distortions import distortion


@distortion("weather/dusk", levels={"half": 0.5, "most": 0.75, "all": 1}, counted=["half", "most"],
            meaning="the share of light removed", allowed=(0, 1))
def dusk(images, level, seeds):
    return (images * (1 - level)).astype(np.uint8)


@distortion("dust", levels={"1": 1, "2": 2}, meaning="grains in hundreds")
def dust(images, level, seeds):
    out = images.copy()
    for picture, seed in zip(out, seeds):
        rng = np.random.RandomState(seed)
        picture[rng.randint(picture.shape[0], size=int(100 * level)), 0] = 0
    return out
"""


@pytest.fixture
def file(tmp_path, monkeypatch):
    """The file, and a registry that forgets what it adds."""
    monkeypatch.setattr(DISTORTIONS, "_items", dict(DISTORTIONS._items))
    path = tmp_path / "mine.py"
    path.write_text(FILE)
    yield path
    sys.modules.pop(f"distortions of {path}", None)


def run(command, *words) -> int:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def pictures(count: int, side: int = 48) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def test_the_array_function_takes_it(file):
    assert find(f"{file}:weather/dusk") == find("weather/dusk") == "weather/dusk"
    assert find(f"{file}:dust") == "dust"  # the file is imported once
    batch = pictures(2)
    dark = np.floor(batch * 0.25)
    for level in ("most", 0.75, "0.75"):
        np.testing.assert_array_equal(distort(batch, "weather/dusk", level), dark)
    np.testing.assert_array_equal(distort(batch, "weather/dusk", 0.2), np.floor(batch * 0.8))
    np.testing.assert_array_equal(distort(batch, "weather/dusk", UNDISTORTED), batch)
    assert DISTORTIONS["weather/dusk"].labels == ("undistorted", "half", "most", "all")
    assert kept("weather/dusk") == [1, 2]
    assert kept("dust") == [1, 2]


def test_the_command_distorts_a_folder_with_it(file, tmp_path, corruptions):
    image = pictures(1)[0]
    (tmp_path / "in").mkdir()
    Image.fromarray(image).save(tmp_path / "in" / "a.png")
    names = f"{file}:weather/dusk,contrast,imagenet-c/fog"
    arguments = [tmp_path / "in", "--out", tmp_path / "out", "--distortions", names, "--size", 0]
    assert run(distort_command, *arguments) == 0
    written = {path.parent.relative_to(tmp_path / "out").as_posix() for path in tmp_path.glob("out/**/a.png")}
    assert written == {
        *(f"weather/dusk/{label}" for label in ("half", "most", "all")),
        *(f"imagenet-c/fog/{severity}" for severity in range(1, 6)),
        *(f"contrast/{label}" for label in "c100 c50 c30 c15 c10 c05 c03 c01".split()),
    }
    half = np.array(Image.open(tmp_path / "out/weather/dusk/half/a.png"))
    np.testing.assert_array_equal(half, image // 2)
    fog = [np.array(Image.open(tmp_path / f"out/imagenet-c/fog/{severity}/a.png")) for severity in (2, 5)]
    np.testing.assert_array_equal(fog[1] - fog[0], np.full_like(image, 3))  # the stand-in adds the severity


def test_the_command_evaluates_models_on_it(file, tmp_path, tiny_clip, monkeypatch, corruptions):
    monkeypatch.setattr("ssmclip.evaluate.models.find", lambda *a, **k: tiny_clip)
    out = tmp_path / "rows.jsonl"
    names = f"{file}:weather/dusk,imagenet-c/fog,rotation"
    words = ["--model", "a=x,b=y", "--tasks", "distorted:digits", "--distortions", names, "--cache", "none"]
    assert run(evaluate_command, *words, "--max-images", 12, "--out", out) == 0
    _, rows = read_rows(out)
    curves = {}
    for row in rows:
        if "counted" in row.extra and row.model == "a":
            curves.setdefault(row.task, []).append((row.condition, row.extra["counted"]))
    assert curves == {
        "distorted/digits/weather/dusk": [
            ("level=undistorted", False),
            ("level=half", True),
            ("level=most", True),
            ("level=all", False),
        ],
        "distorted/digits/imagenet-c/fog": [
            ("level=undistorted", False),
            *((f"level={severity}", True) for severity in range(1, 6)),
        ],
        "distorted/digits/rotation": [("level=0", False), *((f"level={turn}", True) for turn in (90, 180, 270))],
    }
    value = {(row.model, row.task, row.condition, row.metric): row.value for row in rows}
    for task, curve in curves.items():
        counted = [value["a", task, condition, "top1"] for condition, counts in curve if counts]
        assert value["a", task, "mean over levels", "top1"] == pytest.approx(np.mean(counted), rel=1e-12)


def test_embeddings_of_a_distortion_are_not_those_of_its_earlier_code(file, tmp_path, tiny_clip, monkeypatch):
    monkeypatch.setattr("ssmclip.evaluate.models.find", lambda *a, **k: tiny_clip)
    for place, picture in enumerate(pictures(6)):
        path = tmp_path / "own" / ("cat", "dog")[place % 2] / f"{place}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    words = ["--model", "a=x", "--tasks", f"distorted:folder:{tmp_path / 'own'}", "--out", tmp_path / "rows.jsonl"]
    words += ["--distortions", f"{file}:weather/dusk", "--cache", tmp_path / "cache"]

    def kept() -> int:
        assert run(evaluate_command, *words) == 0
        return len(list((tmp_path / "cache" / "images").iterdir()))

    assert kept() == kept() == 4
    del sys.modules[f"distortions of {file}"]
    for name in ("weather/dusk", "dust"):
        del DISTORTIONS._items[name]
    file.write_text(FILE.replace("images * (1 - level)", "255 - images * (1 - level)"))
    assert kept() == 4 + 3  # the undistorted level has the same pictures


def test_what_cannot_be_found(file, tmp_path, monkeypatch):
    with pytest.raises(ssmclip.UnknownName, match="did you mean 'dust'"):
        find(f"{file}:dusty")
    with pytest.raises(FileNotFoundError, match=r"no.py not found: a custom distortion must be given as FILE.py:NAME"):
        find(f"{tmp_path}/no.py:dust")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        find("no_such_module:dust")
    with pytest.raises(ValueError, match="distortion 'contrast' is already registered"):
        distortion("contrast", levels={"1": 1}, meaning="a second meaning")(np.copy)
    broken = tmp_path / "broken.py"
    broken.write_text("1 / 0")
    for _ in range(2):  # and not half imported the second time
        with pytest.raises(ZeroDivisionError):
            find(f"{broken}:dust")
    (tmp_path / "some_module.py").write_text(FILE.replace("dust", "sand"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(DISTORTIONS._items, "weather/dusk")
    assert find("some_module:sand") == "sand"
    monkeypatch.delitem(sys.modules, "some_module")


@pytest.mark.parametrize("name", ["grey", "float", "fewer"])
def test_what_a_function_returns_is_checked(name, file):
    wrong = {"grey": lambda x: x[..., 0], "float": lambda x: x / 255, "fewer": lambda x: x[1:]}[name]
    distortion(name, levels={"1": 1}, meaning="nothing")(lambda images, level, seeds: wrong(images))
    with pytest.raises(ValueError, match=rf"{name} must return uint8 pictures \(2, height, width, 3\) \(got "):
        distort(pictures(2), name)


@pytest.mark.parametrize("name", list(DISTORTIONS))
def test_every_entry_of_the_list_is_whole(name):
    entry = DISTORTIONS[name]
    assert isinstance(entry, Distortion)
    assert entry.name == name
    assert len(set(entry.labels)) == len(entry.labels) > 1
    assert {entry.labels[place] for place in kept(name)} == set(entry.counted) < set(entry.labels)
    assert 0 not in kept(name)  # the first does not distort
    for label in entry.labels:
        assert parse_level(name, label) == (None if label == UNDISTORTED else entry.levels[label])
