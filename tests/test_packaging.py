"""What is built for installation: a wheel and a source distribution, each of which has the recipes, as files."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="77")

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.py"))
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
USE = """
import sys
from pathlib import Path
import ssmclip
from ssmclip.config import load_recipe
from ssmclip.config.places import checkout
assert Path(ssmclip.__file__).is_relative_to(sys.argv[1]), ssmclip.__file__
assert checkout() is None
print(load_recipe("recipes/tiny.py").steps, load_recipe("recipes/flickr8k.py").data.source)
"""


def python(*arguments, folder, path=""):
    environment = os.environ | {"PYTHONPATH": str(path)}
    command = [sys.executable, "-W", "ignore", *map(str, arguments)]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(what, folder, out):
    """Run the build back end as pip would, without a network. Return what it wrote."""
    return out / python("-c", BUILD, what, out, folder=folder).splitlines()[-1]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """(wheel, wheel made of the source distribution, that distribution)."""
    folder = tmp_path_factory.mktemp("built")
    clone, out, again = folder / "clone", folder / "out", folder / "again"
    skipped = shutil.ignore_patterns("__pycache__", "*.egg-info", "build")
    for name in ("src", "recipes"):
        shutil.copytree(ROOT / name, clone / name, ignore=skipped)
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, clone)
    out.mkdir(), again.mkdir()
    wheel, source = (build(what, clone, out) for what in ("build_wheel", "build_sdist"))
    with tarfile.open(source) as tar:
        tar.extractall(folder, filter="data")
    return wheel, build("build_wheel", folder / source.name.removesuffix(".tar.gz"), again), source


def test_nothing_in_the_package_is_a_link():
    """On Windows a link in a checkout is a text file."""
    assert [path for path in (ROOT / "src").rglob("*") if path.is_symlink()] == []


@pytest.mark.parametrize("which", [0, 1], ids=["wheel", "wheel of the source distribution"])
def test_a_wheel_has_every_recipe_and_nothing_beside_the_package(built, which):
    with zipfile.ZipFile(built[which]) as wheel:
        names = wheel.namelist()
        for recipe in RECIPES:
            assert wheel.read(f"ssmclip/recipes/{recipe.name}") == recipe.read_bytes()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"ssmclip"}
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src" / "ssmclip").rglob("*.py")}
    assert {n for n in names if n.endswith(".py")} == sources | {f"ssmclip/recipes/{path.name}" for path in RECIPES}


def test_an_installed_package_reads_its_recipes_from_any_folder(built, tmp_path):
    site, elsewhere = tmp_path / "site", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(built[0]) as wheel:
        wheel.extractall(site)
    assert python("-c", USE, site, folder=elsewhere, path=site).split() == ["60", "captions/train"]


def test_an_editable_install_adds_src_and_copies_nothing(built, tmp_path):
    clone = built[0].parents[1] / "clone"
    editable = build("build_editable", clone, tmp_path)
    with zipfile.ZipFile(editable) as wheel:
        files = [name for name in wheel.namelist() if ".dist-info/" not in name]
        assert [name.rpartition(".")[2] for name in files] == ["pth"]
        assert wheel.read(files[0]).decode().strip() == str(clone / "src")
    found = "from ssmclip.config import load_recipe; print(load_recipe('recipes/tiny.py').steps)"
    assert python("-c", found, folder=tmp_path, path=clone / "src").strip() == "60"
