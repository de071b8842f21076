"""A training run's settings from a Python file."""

from __future__ import annotations

import importlib.util
import inspect
import traceback
from pathlib import Path

from ssmclip.config.settings import TrainConfig


def load_recipe(path: str | Path) -> TrainConfig:
    """Call the recipe in a Python file: the one public function defined there.

    path: as it stands, else beside this file, where recipes/ is too: recipes/tiny.py is found from any folder.
    Raises FileNotFoundError, and ValueError for a file that is no Python, can't be imported or has no such function.
    """
    path = Path(path)
    installed = Path(__file__).parents[1] / path
    path = installed if installed.is_file() and not path.is_file() else path
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        raise FileNotFoundError(f"no recipe {path}; recipes in {path.parent}: {', '.join(beside) or 'none'}")
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
