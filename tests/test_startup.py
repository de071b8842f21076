"""What starts without torch. Python's own list of imported modules is the witness; seconds are a benchmark."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from ssmclip import lazy
from ssmclip.__main__ import COMMANDS
from ssmclip.rows import Result, write_rows

HEAVY = ("torch", "torchvision", "timm", "open_clip", "numba", "accelerate", "transformers")
WITNESS = """
import sys
from pathlib import Path
{code}
print(*(name for name in {heavy} if name in sys.modules), file=sys.stderr, end="")
"""


def heavy_after(code: str) -> list[str]:
    """Run code in a fresh process; return which of HEAVY it has imported then."""
    script = WITNESS.format(code=code, heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr.split()


def running(*arguments: object) -> str:
    words = [str(argument) for argument in arguments]
    return f"from ssmclip.__main__ import main\ntry: main({words!r})\nexcept SystemExit as end: assert not end.code"


@pytest.mark.parametrize("module", ["ssmclip", "ssmclip.rows", "ssmclip.config", "ssmclip.report", "ssmclip.registry"])
def test_importing_needs_no_torch(module):
    assert heavy_after(f"import {module}") == []


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_needs_no_torch(command):
    assert heavy_after(running(*command.split(), "--help")) == []


def test_data_sets_are_listed_without_torch(tmp_path):
    assert heavy_after(running("datasets", "--data", tmp_path)) == []


def test_a_report_is_drawn_without_torch(tmp_path):
    extra = {"title": "Digits", "kind": "classification", "chance": 0.1}
    rows = [Result(model, "digits", "top1", 0.5, 0.4, 0.6, 100, extra=extra) for model in "AB"]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert heavy_after(running("report", tmp_path / "rows.jsonl", "--out", tmp_path / "page")) == []
    assert "Digits" in (tmp_path / "page" / "report.html").read_text()


@pytest.mark.parametrize(
    "code",
    [
        "import ssmclip, timm; timm.create_model('vmamba_nano')",
        "import timm, ssmclip; timm.create_model('vmamba_nano')",
        "import ssmclip, open_clip; open_clip.get_model_config('CLIP-VMamba-Nano')['vision_cfg']",
        "import open_clip, ssmclip; assert 'CLIP-VMamba-Nano' in open_clip.list_models()",
        "import ssmclip; from timm.models import create_model; create_model('simba_small')",
        "import ssmclip; ssmclip.create_clip('CLIP-VMamba-Nano')",
    ],
)
def test_timm_and_open_clip_know_our_models_whoever_is_imported_first(code):
    assert {"torch", "timm"} <= set(heavy_after(code))


@pytest.mark.parametrize("package", ["ssmclip", "ssmclip.models", "ssmclip.evaluate"])
def test_lazy_names_are_those_that_type_checkers_see(package):
    """The names under `if TYPE_CHECKING`, read from the source, against those that the package answers to."""
    module = importlib.import_module(package)
    (checked,) = [
        node
        for node in ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
    ]
    seen = {alias.asname: node.module for node in checked.body for alias in node.names}
    assert set(seen) == set(module.__all__)
    for name, home in seen.items():
        expected = getattr(importlib.import_module(home), name, None) or importlib.import_module(f"{home}.{name}")
        assert getattr(module, name) is expected


def test_a_name_that_is_not_there_is_an_attribute_error():
    get, names = lazy.lazily("ssmclip", {"Result": "ssmclip.rows"})
    assert get("Result") is Result
    assert "Result" in names()
    with pytest.raises(AttributeError, match="module 'ssmclip' has no attribute 'Reslut'"):
        get("Reslut")
