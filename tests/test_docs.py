"""The README says what is so: its tree, its results, its commands. (Its Python lines run as a doctest.)"""

import argparse
import re
import shlex
import subprocess

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

from ssmclip.__main__ import build_parser
from ssmclip.analyze.curvature.spectrum import check_search
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.report.tables import BEGIN, END, update_readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = set(build_parser()._subparsers._group_actions[0].choices)


def test_the_tree_names_what_is_there_and_nothing_else():
    tree = re.search(r"```\nssmclip/\n(.*?)```", README, re.DOTALL).group(1)
    top = {name.rstrip("/") for line in tree.splitlines() if line[0] in "├└" for name in named(line[4:])}
    package = {name.rstrip("/") for line in tree.splitlines() if line[4] in "├└" for name in named(line[8:])}
    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    assert {path.split("/")[0] for path in tracked} - {".gitignore", "src"} == top - {"src/ssmclip"}
    assert {path.split("/")[2] for path in tracked if path.startswith("src/ssmclip/")} == package


def named(entry: str) -> list[str]:
    """The names of a line of the tree, without what is said of them."""
    return entry.split("  ")[0].split()


def test_the_results_are_what_the_rows_give(tmp_path):
    copy = tmp_path / "README.md"
    copy.write_text(README, encoding="utf-8")
    update_readme(copy, readme_rows())
    between = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    assert between.search(README).group() == between.search(copy.read_text(encoding="utf-8")).group()


def readme_rows() -> list[Path]:
    """The files the README's results come from: what `make results` passes."""
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    return [ROOT / name for name in re.search(r"^README_ROWS := (.*)$", make, re.MULTILINE).group(1).split()]


def test_every_command_in_the_readme_exists():
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"^make (\w+)", README, re.MULTILINE)) <= targets
    assert set(re.findall(r"(?:bin/|`)ssmclip ([a-z]+)", README)) <= COMMANDS


def test_the_commands_of_the_readme_are_understood():
    lines = re.findall(r"^\.venv/bin/ssmclip (.*)$", README, re.MULTILINE)
    assert len(lines) > 5
    for line in lines:
        args = build_parser().parse_args(shlex.split(line))
        if args.command == "train":
            apply_overrides(load_recipe(ROOT / args.recipe), args.set)


def test_the_tree_names_every_command():
    entry = re.search(r"__main__\.py +(.*?)├── registry", README, re.DOTALL).group(1)
    assert set(re.findall(r"[a-z]+", entry)) == COMMANDS


@pytest.mark.parametrize("command", ["", *sorted(COMMANDS)])
def test_every_command_has_a_help_text(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args([*command.split(), "--help"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: ssmclip {command}".rstrip())


def parsers(parser: argparse.ArgumentParser, says: str = ""):
    """(parser, its line in the list of commands) of the command line and of every command, however deep."""
    yield parser, says
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for line in action._choices_actions:
                yield from parsers(action.choices[line.dest], line.help)


def test_every_command_says_of_itself_what_the_list_says_of_it():
    told = [(parser.description, says) for parser, says in parsers(build_parser()) if says]
    assert len(told) > len(COMMANDS)
    assert [description for description, _ in told] == [says for _, says in told]


def test_every_option_says_its_default():
    for parser, _ in parsers(build_parser()):
        for action in parser._actions:
            if action.option_strings and action.default not in (None, False, "", [], argparse.SUPPRESS):
                assert "default: " in (action.help or ""), f"{parser.prog} {action.option_strings[0]}"


def test_the_help_of_hessian_names_every_end():
    (hessian,) = (parser for parser, _ in parsers(build_parser()) if parser.prog == "ssmclip analyze hessian")
    (which,) = (action for action in hessian._actions if action.dest == "which")
    for name in ("both", "largest", "smallest", "magnitude"):
        check_search(1e-3, name)
        assert name in which.help


def test_an_installed_package_has_its_recipes_types_and_data(monkeypatch, tmp_path):
    packed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = packed["package-data"]["ssmclip"]
    assert "py.typed" in patterns
    assert all(list((ROOT / "src/ssmclip").glob(pattern)) for pattern in patterns)
    assert build_parser().parse_args(["quickstart"]).recipe == Path("recipes/quickstart.py")
    monkeypatch.chdir(tmp_path)
    for name in ("quickstart", "tiny"):
        assert load_recipe(f"recipes/{name}.py") == load_recipe(ROOT / "recipes" / f"{name}.py")
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes/tiny.py").write_text(
        "from ssmclip.config import *\ndef own(): return TrainConfig(steps=777)\n"
    )
    assert load_recipe("recipes/tiny.py").steps == 777  # one's own comes first


def test_constraints_name_every_direct_dependency():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = project["dependencies"] + [dep for extra in project["optional-dependencies"].values() for dep in extra]
    pinned = re.findall(r"^([\w-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    normal = {name.lower().replace("_", "-") for name in pinned}
    assert {re.match(r"[\w-]+", dep).group().lower().replace("_", "-") for dep in wanted} - normal <= {"tomli"}
