"""Load a training run's settings from a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from pathlib import Path

from ssmclip.config.places import below, recipe_folders
from ssmclip.config.settings import TrainConfig


def load_recipe(path: str | Path) -> TrainConfig:
    """Call the recipe in a Python file, the one public function defined there, and return its settings.

    path: relative to the current folder, else to the package's own recipes: recipes/tiny.py is found from anywhere.
    Raises FileNotFoundError listing the folders searched and their recipes; ValueError for a file that is not Python,
    cannot be imported or has no such function.
    """
    path = _find(Path(path))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None:
        raise ValueError(f"a recipe must be a Python file, NAME.py (got {path})")
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
        raise ValueError(f"{path} must define exactly one public function that returns a TrainConfig (got {names})")
    config = made_here[0]()
    if not isinstance(config, TrainConfig):
        raise ValueError(f"{path}: {made_here[0].__name__}() must return a TrainConfig (got {type(config).__name__})")
    return config


def _find(path: Path) -> Path:
    places = [Path(place) for place in below(str(path), recipe_folders())]
    for place in places:
        if place.is_file():
            return place
    listed = "; ".join(f"recipes in {place.parent}: {_recipes_in(place.parent)}" for place in places)
    raise FileNotFoundError(f"recipe {path} not found; {listed}")


def _recipes_in(folder: Path) -> str:
    if not folder.is_dir():
        return "there is no such folder"
    return ", ".join(sorted(path.name for path in folder.glob("*.py"))) or "none"
