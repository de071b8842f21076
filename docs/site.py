"""What mkdocs asks for beyond the pages of this folder: tutorials as pages and notebooks, the project's own documents.

The scripts in tutorials/ are the only source: cells begin with `# %%`, and jupytext turns them into a page and a
notebook. Those in examples/ become a page of their docstring and code. Links between documents are those that work in
the repository; here they are turned to where things are on the site.
"""

from __future__ import annotations

import ast
import json
import posixpath
import re
from pathlib import Path

import jupytext
import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

DOCS = Path(__file__).parent
ROOT = DOCS.parent
PROJECT = ("CHANGELOG", "CONTRIBUTING", "CONVENTIONS", "LOG")  # documents at the top of the repository
LINK = re.compile(r"(?<!!)\[(?P<text>[^\]]*)\]\((?!https?://|#)(?P<path>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")
FENCE = re.compile(r"(^```.*?^```$)", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and notebooks that are made of scripts, the project's documents, and the files they link to."""
    for name, content in generated().items():
        files.append(File.generated(config, name, content=content))
    for path in [*rows_files(), ROOT / "LICENSE", ROOT / "CITATION.cff"]:
        name = f"project/{path.relative_to(ROOT).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def generated() -> dict[str, str]:
    """Return the content of every file that is made of others, by its place on the site."""
    made = {f"project/{name}.md": (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in PROJECT}
    made["project/results.md"] = rows_page()
    for script in sorted(DOCS.glob("tutorials/*.py")):
        made[f"tutorials/{script.stem}.md"] = tutorial_page(script)
        made[f"tutorials/{script.stem}.ipynb"] = nbformat.writes(notebook(script))
    for script in sorted(DOCS.glob("examples/*.py")):
        made[f"examples/{script.stem}.md"] = example_page(script)
    return made


def notebook(script: Path) -> nbformat.NotebookNode:
    """Return a script whose cells begin with `# %%` as a notebook without outputs, the same at every call."""
    made = jupytext.read(script)
    made.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    for place, cell in enumerate(made.cells):
        cell.id, cell.metadata = f"cell-{place:02}", {}
        if cell.cell_type == "markdown":  # other pages are not beside a notebook that was downloaded
            cell.source = LINK.sub(r"\g<text>", cell.source)
    nbformat.validate(made)
    return made


def tutorial_page(script: Path) -> str:
    """Return a script whose cells begin with `# %%` as Markdown: its text, and its code in fences."""
    cells = jupytext.read(script).cells
    parts = [cell.source if cell.cell_type == "markdown" else f"```python\n{cell.source}\n```" for cell in cells]
    files = f'<a href="{script.stem}.ipynb" download>notebook</a>, <a href="{script.name}" download>script</a>'
    return "\n\n".join([*parts, f"This page as a file: {files}. The tests run it."]) + "\n"


def example_page(script: Path) -> str:
    """Return a script as Markdown: its docstring, whose first sentence is the title too, and its code."""
    source = script.read_text(encoding="utf-8")
    text = ast.get_docstring(ast.parse(source))
    title = re.split(r"[.:,]\s", " ".join(text.split()))[0].rstrip(".")
    code = source.split('"""', 2)[2].strip()
    file = f'This page as a file: <a href="{script.name}" download>script</a>. The tests run it.'
    return f"# {title}\n\n{text}\n\n```python\n{code}\n```\n\n{file}\n"


def rows_files() -> list[Path]:
    """Return the rows files behind the numbers in the documents."""
    return sorted((ROOT / "results").glob("*.jsonl"))


def rows_page() -> str:
    """Return a page that lists the rows files with what their first line says made them."""
    lines = ["# Rows files", "", "`ssmclip report FILE… --out report` draws them.", ""]
    lines += ["| file | commit | device | rows |", "| --- | --- | --- | --: |"]
    for path in rows_files():
        first, *rows = path.read_text(encoding="utf-8").splitlines()
        run = json.loads(first)["run"]
        lines.append(f"| [{path.name}](results/{path.name}) | {run['commit']} | {run['device']} | {len(rows):,} |")
    return "\n".join(lines) + "\n"


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Return the page with its links, outside of code, turned from the repository to the site."""
    here = page.file.src_uri
    if here == "project/results.md":
        return markdown  # its links are the site's already
    parts = FENCE.split(markdown)
    parts[::2] = [LINK.sub(lambda link: turned(link, here, files), part) for part in parts[::2]]
    return "".join(parts)


def turned(link: re.Match, here: str, files: Files) -> str:
    """Return a link of the page `here` as it works on the site: only its text where the site lacks the target.

    A target that the repository lacks as well stays, for mkdocs to refuse.
    """
    origin = posixpath.basename(here) if here.startswith("project/") else f"docs/{here}"
    target = posixpath.normpath(posixpath.join(posixpath.dirname(origin), link["path"]))
    place = site_path(target)
    if files.get_file_from_path(place):
        return f"[{link['text']}]({posixpath.relpath(place, posixpath.dirname(here) or '.')}{link['anchor'] or ''})"
    return link["text"] if (ROOT / target).exists() else link[0]


def site_path(target: str) -> str:
    """Return where a file of the repository is on the site: scripts are pages there, and so is the list of results."""
    if target == "results":
        return "project/results.md"
    if not target.startswith("docs/"):
        return f"project/{target}"
    inside = target.removeprefix("docs/")
    return inside.removesuffix(".py") + ".md" if inside.endswith(".py") else inside
