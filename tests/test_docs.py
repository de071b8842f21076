"""The documents say what is so: tree, results, figure, commands, registries, log. The README's Python is a doctest."""

import argparse
import importlib
import json
import pkgutil
import re
import shlex
import subprocess
import sys
from datetime import date

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib
from pathlib import Path

import pytest

import ssmclip
from ssmclip.__main__ import build_parser
from ssmclip.analyze.curvature.spectrum import check_search
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.registry import Registry
from ssmclip.report.tables import BEGIN, END, update_readme

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").glob("*.md"))}
EVERYWHERE = "\n".join([README, *DOCS.values()])
LOG = (ROOT / "LOG.md").read_text(encoding="utf-8")
CONVENTIONS = (ROOT / "CONVENTIONS.md").read_text(encoding="utf-8")
COMMANDS = set(build_parser()._subparsers._group_actions[0].choices)


def test_the_tree_names_what_is_there_and_nothing_else():
    tree = re.search(r"```\nssmclip/\n(.*?)```", DOCS["structure.md"], re.DOTALL).group(1)
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
    copy = tmp_path / "results.md"
    copy.write_text(DOCS["results.md"], encoding="utf-8")
    update_readme(copy, shown_rows())
    between = re.compile(f"{BEGIN}.*{END}", re.DOTALL)
    assert between.search(DOCS["results.md"]).group() == between.search(copy.read_text(encoding="utf-8")).group()


def shown_rows() -> list[Path]:
    """Return the files that the results come from: what `make results` passes."""
    make = (ROOT / "Makefile").read_text(encoding="utf-8")
    return [ROOT / name for name in re.search(r"^RESULTS_ROWS := (.*)$", make, re.MULTILINE).group(1).split()]


def test_the_readme_shows_what_quickstart_printed():
    printed = {
        f"{row['model']:18} {row['task']:8} {100 * row['value']:5.1f}%  "
        f"(95 % interval {100 * row['ci_low']:.1f}% to {100 * row['ci_high']:.1f}%)"
        for row in rows_of("quickstart")
        if row["metric"] == "top1"
    }
    assert set(re.findall(r"^CLIP-V.*$", README, re.MULTILINE)) == printed


def rows_of(name: str) -> list[dict]:
    """Return the rows of a file of results/ as JSON has them."""
    lines = (ROOT / "results" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_the_figure_shows_the_rows():
    """The numbers at the ends of its curves, and one marker for each row."""
    svg = (ROOT / "docs" / "cost.svg").read_text(encoding="utf-8")
    measured = {"CLIP-VMamba-B": ("",), "CLIP-ViT-B-16": ("", " attention=plain")}
    ends, count = [], 0
    for row in rows_of("efficiency"):
        if row["metric"] in ("latency_ms", "inference_memory_mb") and row.get("condition", "").startswith("image="):
            size, _, rest = row["condition"].removeprefix("image=").partition(" ")
            if f" {rest}".rstrip() in measured.get(row["model"], ()):
                count += 1
                ends += [f"{row['value'] / 1000:#.3g}"] if size == "1024" else []
    assert (count, len(ends)) == (30, 6)
    assert all(f">{end}<" in svg for end in ends)
    assert (
        len(re.findall(r"<use xlink:href=\"#m\w+\" x=[^>]* style=\"fill: #(?:0072b2|d55e00)", svg)) == count + 3
    )  # legend


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 90


@pytest.mark.parametrize("name", ["README.md", "LOG.md", "CONVENTIONS.md", *(f"docs/{name}" for name in DOCS)])
def test_links_lead_somewhere(name):
    page = ROOT / name
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8"))
    missing = [t for t in targets if not t.startswith("https://") and not (page.parent / t).exists()]
    assert not missing


def test_every_command_in_the_documents_exists():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"(?:^|`)make ([\w-]+)", EVERYWHERE, re.MULTILINE)) <= targets
    assert set(re.findall(r"`ssmclip ([a-z]+)", EVERYWHERE)) <= COMMANDS


def test_every_command_is_in_the_table_of_questions():
    table = re.findall(r"^\| .* \|$", DOCS["commands.md"], re.MULTILINE)
    assert set(re.findall(r"`ssmclip ([a-z]+)`", "\n".join(table))) == COMMANDS


def test_the_commands_of_the_documents_are_understood():
    lines = re.findall(r"^ssmclip (.*)$", re.sub(r"\\\n\s*", "", EVERYWHERE), re.MULTILINE)
    assert len(lines) > 15
    for line in lines:
        args = build_parser().parse_args(shlex.split(line))
        if args.command == "train":
            apply_overrides(load_recipe(ROOT / args.recipe), args.set)


def test_the_conventions_list_every_registry():
    for module in pkgutil.walk_packages(ssmclip.__path__, "ssmclip."):
        if "triton" not in module.name and module.name != "ssmclip.__main__":
            importlib.import_module(module.name)
    listed = re.findall(r"`(ssmclip[\w.]*)\.([A-Z_0-9]+)`", CONVENTIONS)
    assert all(hasattr(importlib.import_module(module), name) for module, name in listed)
    registries = {
        id(value): name
        for module in list(sys.modules.values())
        if getattr(module, "__name__", "").startswith("ssmclip.")
        for name, value in vars(module).items()
        if isinstance(value, Registry) and not name.startswith("_")
    }
    here = {id(getattr(importlib.import_module(module), name)) for module, name in listed}
    assert {name for key, name in registries.items() if key not in here} == set(), "a line in CONVENTIONS.md is missing"


ENTRY = re.compile(r"^## (\d{4}-\d\d-\d\d): (.+) \((positive|negative|mixed|neutral)\)$")


def entries() -> list[tuple[str, str, str]]:
    """Return (date, heading, text) of every entry of the log, as they stand there."""
    parts = re.split(r"^(?=## )", LOG, flags=re.MULTILINE)[1:]
    headings = [part.split("\n", 1)[0] for part in parts]
    assert [heading for heading in headings if not ENTRY.match(heading)] == []
    return [(ENTRY.match(h).group(1), h, part) for h, part in zip(headings, parts, strict=True)]


def commits(entry: str) -> list[str]:
    """Return the commits an entry names, in its last line."""
    (line,) = re.findall(r"^Commit: ([0-9a-f]{7,40}(?:, [0-9a-f]{7,40})*)$", entry, re.MULTILINE)
    return line.split(", ")


def test_the_log_is_dated_newest_first_and_says_what_came_of_it():
    assert len(entries()) > 20
    dates = [day for day, _, _ in entries()]
    assert [date.fromisoformat(day).isoformat() for day in dates] == dates
    assert dates == sorted(dates, reverse=True)
    for _, heading, text in entries():
        assert commits(text), heading
        assert re.search(r"^Verdict: \S", text, re.MULTILINE), heading
        assert text.rstrip().endswith(commits(text)[-1]), heading


def git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def test_the_commits_of_the_log_are_in_the_history():
    if git("rev-parse", "--is-shallow-repository") != "false":
        pytest.skip("the history of the repository is not here")
    for day, heading, text in entries():
        dates = [git("show", "--no-patch", "--format=%ad", "--date=short", commit) for commit in commits(text)]
        assert "" not in dates, f"{heading}: a commit that git does not know"
        assert dates[0] == day, heading


def test_the_tree_names_every_command():
    entry = re.search(r"__main__\.py +(.*?)├── registry", DOCS["structure.md"], re.DOTALL).group(1)
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
