"""A training run's settings from a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from pathlib import Path

from ssmclip.config.places import below, recipe_folders
from ssmclip.config.settings import TrainConfig


def load_recipe(path: str | Path) -> TrainConfig:
    """Call the recipe in a Python file, the one public function defined there, and return its settings.

    path: from the current folder, else among the recipes that come with the package: recipes/tiny.py is found anywhere.
    Raises FileNotFoundError listing where it was looked for and what is there; ValueError for a file that is no Python,
    can't be imported or has no such function.
    """
    path = _find(Path(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"{path} is no Python file: a recipe is one, NAME.py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except (SyntaxError, ImportError) as error:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        raise ValueError(f"{path}, line {lines[-1] if lines else error.lineno}: {error}") from error
    made_here = [
        function
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == path.stem and not name.startswith("_")
    ]
    if len(made_here) != 1:
        names = ", ".join(f.__name__ for f in made_here) or "none"
        raise ValueError(f"{path}: wanted one public function that returns a TrainConfig, found {names}")
    config = made_here[0]()
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: {made_here[0].__name__}() returned {type(config).__name__}, wanted a TrainConfig")
    return config


def _find(path: Path) -> Path:
    places = [Path(place) for place in below(str(path), recipe_folders())]
    for place in places:
        if place.is_file():
            return place
    listed = "; ".join(f"recipes in {place.parent}: {_recipes_in(place.parent)}" for place in places)
    raise FileNotFoundError(f"no recipe {path}; {listed}")


def _recipes_in(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    return ", ".join(sorted(path.name for path in folder.glob("*.py"))) or "none"
