"""What the package imports is what pyproject.toml declares, by Python's parser and the installed metadata."""

import ast
import re
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "src" / "ssmclip").rglob("*.py"))
TREES = {path.relative_to(ROOT / "src").as_posix(): ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
USER_EXTRAS = sorted(set(PROJECT["optional-dependencies"]) - {"dev", "docs", "bench"})
# Imported under another name, and not installed on every machine that runs the tests.
MODULES = {"imagecorruptions-imaug": "imagecorruptions", "nvidia-ml-py": "pynvml", "tomli": "tomli"}
# PyTorch requires the one version that fits it, on the systems that have it: a declaration here could only contradict.
LEFT_TO = {"triton": "torch"}


def declared(*extras: str) -> set[str]:
    """Return the names of the distributions that are required, with some extras."""
    listed = [*PROJECT["dependencies"], *(line for extra in extras for line in PROJECT["optional-dependencies"][extra])]
    return {canonicalize_name(Requirement(line).name) for line in listed}


def distributions() -> dict[str, set[str]]:
    """Return the distributions that provide each top-level module."""
    provided = {name: set(map(canonicalize_name, given)) for name, given in metadata.packages_distributions().items()}
    for distribution, module in MODULES.items():
        provided.setdefault(module, set()).add(distribution)
    return provided


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the top-level modules of others that a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            modules = [node.module]
        else:
            continue
        yield from {name.partition(".")[0] for name in modules} - {*sys.stdlib_module_names, "ssmclip"}


def texts(tree: ast.AST) -> Iterator[str]:
    """Yield the names that texts begin with, such as that of a module to look for."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            yield re.match(r"\w*", node.value)[0]


IMPORTED = sorted({(module, file) for file, tree in TREES.items() for module in imports(tree)})


def test_every_import_is_declared():
    provided = distributions()
    known = declared(*USER_EXTRAS)
    missing = {}
    for module, file in IMPORTED:
        if module in LEFT_TO:
            continue
        if not provided.get(module, set()) & known:
            missing.setdefault(f"{module} of {sorted(provided.get(module, []))}", []).append(file)
    assert missing == {}, "declare these in pyproject.toml"


def test_what_every_command_needs_is_no_extra():
    """A module of an extra is imported inside a function, so that the rest works without it."""
    provided, always = distributions(), declared()
    eager = {}
    for file, tree in TREES.items():
        for node in tree.body:
            for module in imports(node) if isinstance(node, ast.Import | ast.ImportFrom) else ():
                if module not in LEFT_TO and not provided.get(module, set()) & always:
                    eager.setdefault(module, []).append(file)
    for module, files in eager.items():
        assert all(file.startswith("ssmclip/demo/") for file in files), f"{module} is imported by {files}"


def test_every_declaration_is_used():
    """That is: imported, or named for a library that imports it, as fsspec does s3fs and torch.onnx does onnx."""
    used = {module for module, _ in IMPORTED} | {name for tree in TREES.values() for name in texts(tree)}
    provided = distributions()
    by_modules = {distribution for module in used for distribution in provided.get(module, ())}
    assert declared(*USER_EXTRAS) - by_modules == set(), "remove these from pyproject.toml"


@pytest.mark.parametrize(("module", "requirer"), LEFT_TO.items())
def test_what_is_left_to_another_package_is_required_by_it(module, requirer):
    required = [Requirement(line).name for line in metadata.requires(requirer) or []]
    if "+cpu" in metadata.version(requirer):
        pytest.skip(f"this {requirer} is built for machines without it")
    assert module in required
