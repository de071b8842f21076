"""The examples in docs/ run as they stand, each in a Python of its own, and assert what they claim."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))


def test_there_is_an_example_of_each_kind():
    assert {path.stem for path in EXAMPLES} >= {
        "reading_rows",
        "your_backbone",
        "your_data_set",
    }


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_checks_itself(path, tmp_path):
    source = path.read_text(encoding="utf-8")
    assert source.count("\nassert ") >= 2
    # Elsewhere, so that it finds nothing by luck; without network, as it promises no download.
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "XDG_CACHE_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, path], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout
