"""The tutorials run and check themselves, as scripts and as notebooks; the site is built of them, without a warning."""

import ast
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from urllib.parse import unquote, urlsplit

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

import pytest

import ssmclip

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
QUICK = "hessian_of_your_loss"  # the tutorial that is run as a notebook, too
ids = {"ids": lambda path: path.stem}


def alone(tmp_path) -> dict[str, str]:
    """Return an environment without network and caches, as nothing may be downloaded."""
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "TMPDIR": str(tmp_path),
    }


@pytest.fixture(scope="module")
def site():
    """The module behind `mkdocs.yml`, which makes pages and notebooks of scripts."""
    for name in ("jupytext", "nbformat", "mkdocs"):
        pytest.importorskip(name, reason="the extra docs is not installed")
    spec = spec_from_file_location("site_hook", ROOT / "docs" / "site.py")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_five_tutorials():
    assert len(TUTORIALS) == 5


@pytest.mark.parametrize("path", TUTORIALS, **ids)
def test_a_tutorial_runs_and_checks_itself(path, tmp_path):
    code = ast.parse(path.read_text(encoding="utf-8"))
    assert sum(isinstance(node, ast.Assert) for node in ast.walk(code)) >= 3
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=alone(tmp_path), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout


@pytest.mark.parametrize("path", TUTORIALS, **ids)
def test_a_notebook_has_the_code_of_its_script_and_the_text_between(site, path):
    import nbformat

    made = nbformat.reads(nbformat.writes(site.notebook(path)), as_version=4)
    source = path.read_text(encoding="utf-8")
    code = "\n".join(cell.source for cell in made.cells if cell.cell_type == "code")
    assert ast.dump(ast.parse(code)) == ast.dump(ast.parse(source))
    titles = re.findall(r"^# (#+ .+)$", source, re.MULTILINE)
    assert (
        re.findall(r"^(#+ .+)$", "\n".join(c.source for c in made.cells if c.cell_type == "markdown"), re.M) == titles
    )
    assert made.cells[0].cell_type == "markdown"
    assert titles[0].startswith("# ")


def test_a_notebook_runs(site, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the extra docs is not installed")
    pytest.importorskip("ipykernel", reason="the extra docs is not installed")
    for name, value in alone(tmp_path).items():
        monkeypatch.setenv(name, value)
    made = site.notebook(ROOT / "docs" / "tutorials" / f"{QUICK}.py")
    nbclient.NotebookClient(made, timeout=200, resources={"metadata": {"path": str(tmp_path)}}).execute()
    outputs = [output for cell in made.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any("eigenvalues" in output.get("text", "") for output in outputs)
    assert all(output.output_type != "error" for output in outputs)


def test_a_notebook_whose_claim_is_wrong_fails(site, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the extra docs is not installed")
    wrong = tmp_path / "wrong.py"
    wrong.write_text("# %% [markdown]\n# # Wrong\n\n# %%\nassert 1 + 1 == 3\n", encoding="utf-8")
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="AssertionError"):
        nbclient.NotebookClient(site.notebook(wrong), timeout=100).execute()


# ---- the site


def build(folder, out) -> subprocess.CompletedProcess:
    """Run `make docs` on a checkout, into another folder."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(out)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def built(site, tmp_path_factory) -> Path:
    for name in ("material", "mkdocstrings"):
        pytest.importorskip(name, reason="the extra docs is not installed")
    out = tmp_path_factory.mktemp("site")
    done = build(ROOT, out)
    assert done.returncode == 0, done.stderr
    return out


class Links(HTMLParser):
    """What a page points to (links) and what a browser loads to show it (loaded), and the ids it has."""

    def __init__(self, page: Path):
        super().__init__()
        self.links, self.loaded, self.ids = [], [], set()
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.ids |= {found[key] for key in ("id", "name") if found.get(key)}
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag != "a":
            self.loaded += [found[key] for key in ("src", "href") if found.get(key)]


def test_every_link_of_the_site_leads_somewhere(built):
    pages = {page: Links(page) for page in built.rglob("*.html") if page.name != "404.html"}
    assert len(pages) > 20
    dead = []
    for page, found in pages.items():
        for link in [*found.links, *found.loaded]:
            parts = urlsplit(link)
            target = (page.parent / unquote(parts.path)).resolve() if parts.path else page
            if parts.scheme in ("http", "https"):
                continue
            if not target.exists() or (
                target.suffix == ".html" and unquote(parts.fragment or "") not in ids_of(target, pages)
            ):
                dead.append(f"{page.relative_to(built)}: {link}")
    assert dead == []


def ids_of(target: Path, pages: dict[Path, Links]) -> set[str]:
    return pages[target].ids | {""} if target in pages else {""}


def test_a_page_loads_nothing_from_another_host(built):
    loaded = {link for page in built.rglob("*.html") for link in Links(page).loaded}
    assert {link for link in loaded if urlsplit(link).netloc} == set()
    styles = "\n".join(sheet.read_text(encoding="utf-8") for sheet in built.rglob("*.css"))
    assert re.findall(r"(?:url\(|@import)\s*['\"]?(?:https?:)?//[^)]*", styles) == []


def test_every_page_is_in_the_navigation(built):
    home = Links(built / "index.html")
    menu = {urlsplit(link).path for link in home.links}
    pages = {page.relative_to(built).as_posix() for page in built.rglob("*.html")}
    assert pages - menu == {"404.html"}


def test_every_public_name_is_in_the_reference(built):
    public = set(ssmclip.__all__) - {"models", "ops"}  # which have pages of their own
    named = Links(built / "reference" / "index.html").ids
    assert {
        name for name in public if not any(key.startswith("ssmclip.") and key.endswith(f".{name}") for key in named)
    } == set()


def test_a_dead_link_stops_the_build(built, tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    for path in (ROOT / "src", ROOT / "results", ROOT / "mkdocs.yml", ROOT / "CITATION.cff", ROOT / "LICENSE"):
        (tmp_path / path.name).symlink_to(path)
    for path in ROOT.glob("*.md"):
        shutil.copy(path, tmp_path)
    with open(tmp_path / "CHANGELOG.md", "a", encoding="utf-8") as file:
        file.write("\n[nowhere](docs/nothing.md)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "nothing.md" in done.stdout + done.stderr


# ---- the documents of a release


def test_the_citation_names_what_a_citation_must():
    yaml = pytest.importorskip("yaml", reason="the extra docs is not installed")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    for reference in citation["references"]:
        assert {"type", "title", "authors"} <= set(reference)
        assert all(set(author) <= {"name", "family-names", "given-names"} for author in reference["authors"])


def test_the_changelog_has_this_version_first():
    versions = re.findall(r"^## (\S+?),? ", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert versions[0] == PROJECT["version"]


def test_contributing_takes_ten_lines():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert len([line for line in text.splitlines() if line and not line.startswith("#")]) <= 10
