"""A recipe runs from any folder: its data are found in named places in a fixed order, or every place is told."""

import shutil
from pathlib import Path

import pytest

from ssmclip.__main__ import main
from ssmclip.cli.train import build_validation
from ssmclip.config import TrainConfig, apply_overrides, load_recipe
from ssmclip.config import places as module
from ssmclip.config.places import VARIABLE, checkout, data_folders, find_data
from ssmclip.rows import read_rows

ROOT = Path(__file__).parents[1]


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The current folder, that of the variable, and a checkout's two, all empty; each by its name."""
    root = tmp_path / "work" / "checkout"
    folders = {
        "here": tmp_path / "here",
        "variable": tmp_path / "variable",
        "data": root / "data",
        "shared": root.parent / "shared" / "data",
    }
    for folder in folders.values():
        folder.mkdir(parents=True)
    monkeypatch.chdir(folders["here"])
    monkeypatch.setenv(VARIABLE, str(folders["variable"]))
    monkeypatch.setattr(module, "checkout", lambda: root)
    return folders


def test_the_first_place_that_has_it_wins(places):
    order = data_folders({VARIABLE: str(places["variable"])})
    assert [folder.resolve() for folder in order] == [folder.resolve() for folder in places.values()]
    for name in reversed(places):  # the last place first
        (places[name] / "sets" / "train").mkdir(parents=True)
        found = find_data("sets/train", order)
        assert Path(found).resolve() == (places[name] / "sets" / "train").resolve()
        pattern = find_data("sets/train/{0..3}.tar", order)
        assert Path(pattern).resolve() == (places[name] / "sets" / "train" / "{0..3}.tar").resolve()
    assert find_data("sets/train", order) == "sets/train"  # as it is written, in the current folder
    assert len(data_folders({})) == 3


@pytest.mark.parametrize(
    "source", ["synthetic:digits", "pipe:cat x.tar", "https://host/x.tar", "s3://bucket/{0..3}.tar", "/abs/x.tar"]
)
def test_what_is_no_relative_path_is_left_alone(places, source):
    (places["variable"] / "abs").mkdir()
    assert find_data(source, list(places.values())) == source
    assert module.not_found(source, list(places.values())) == ""


def test_a_file_whose_name_has_brackets_is_found(places):
    (places["data"] / "x[1].csv").write_text("")
    assert find_data("x[1].csv", data_folders({})) == str(places["data"] / "x[1].csv")
    Path("x1.csv").write_text("")  # in the current folder, where the name is a pattern that fits
    assert find_data("x[1].csv", data_folders({})) == "x[1].csv"


QUIET = ["steps=1", "warmup_steps=0", "batch_size=4", "device=cpu", "tensorboard=false", "progress=false"]
TINY = 'changes={"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_vmamba"}, "text_cfg": {"layers": 0}}'


def test_training_tells_every_place_it_looked_in(places, capsys):
    tiny = str(ROOT / "recipes" / "tiny.py")
    assert main(["train", tiny, "--set", *QUIET, "source=sets/{0..3}.tar"]) == 1
    error = capsys.readouterr().err
    assert "ssmclip train: 4 of 4 shards are missing: sets/0.tar" in error
    for folder in places.values():
        assert str(folder / "sets" / "{0..3}.tar") in error
    assert f"set {VARIABLE} to the folder it is in" in error


def test_flickr8k_is_trained_from_another_folder(places, shared, caplog):
    """The recipe as it is, its data in each place by turns; the same numbers as with the folder named."""
    for part in ("train/00000.tar", "retrieval"):
        source, target = shared / "data" / "captions" / part, places["variable"] / "captions" / part
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    command = ["train", str(ROOT / "recipes" / "flickr8k.py"), "--set", *QUIET, TINY, "logging.every=1"]
    command += ["validation.every=0", "ema.decay=none"]
    assert main([*command, "--out", "found"]) == 0
    assert f"reading {places['variable'] / 'captions' / 'train'}" in caplog.text
    named = f"source={places['variable'] / 'captions' / 'train'}"
    assert main([*command, named, "--out", "named"]) == 0
    losses = [[r.value for r in read_rows(f"{out}/rows.jsonl")[1] if r.metric == "loss"] for out in ("found", "named")]
    assert losses[0] == losses[1] != []
    validate = build_validation(load_recipe(ROOT / "recipes" / "flickr8k.py"))  # opened, so it was found
    assert callable(validate)


def test_validation_data_are_looked_for_in_every_place(places):
    config = apply_overrides(TrainConfig(), ["validation.every=1", 'tasks=["cifar10"]'])
    with pytest.raises(FileNotFoundError) as error:
        build_validation(config)
    told = str(error.value)
    for folder in ("variable", "data", "shared"):
        assert f"the data set cifar10 is not under {places[folder]}" in told
    assert f"Set validation.root=DIR, or set {VARIABLE}" in told
    with pytest.raises(FileNotFoundError) as error:
        build_validation(apply_overrides(config, [f"root={places['here']}"]))
    assert str(error.value).count("is not under") == 1


def test_a_recipe_that_is_nowhere_tells_every_place(places, monkeypatch):
    monkeypatch.setattr(module, "checkout", lambda: ROOT)
    with pytest.raises(FileNotFoundError) as error:
        load_recipe("recipes/none.py")
    told = str(error.value)
    assert told.startswith("recipe recipes/none.py not found; recipes in recipes: there is no such folder; ")
    assert f"recipes in {ROOT / 'src' / 'ssmclip' / 'recipes'}: there is no such folder" in told
    listed = ", ".join(sorted(path.name for path in (ROOT / "recipes").glob("*.py")))
    assert f"recipes in {ROOT / 'recipes'}: {listed}" in told


def test_this_is_a_checkout():
    assert checkout() == ROOT
