"""Rows files that go on, and the mapping that says under what a row was measured."""

import json
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from ssmclip.registry import UnknownName
from ssmclip.rows import Result, read_rows, write_rows
from ssmclip.rows.condition import parse, text
from ssmclip.rows.resume import RowsFile, latest

RUN = {"seed": 0, "max_images": None}
ADDS = """
import sys
from ssmclip.rows import Result
from ssmclip.rows.resume import RowsFile
name, path = sys.argv[1:]
file = RowsFile(path, {"seed": 0}, ["seed"])
print("open", flush=True)
sys.stdin.readline()  # until both are open
for i in range(50):
    file.add([Result(name, "digits", f"metric_{i}", i / 50)])
"""


@pytest.mark.parametrize(
    ("written", "where", "against"),
    [
        ("", {}, ""),
        ("minus B", {}, "B"),
        ("step=200", {"step": 200}, ""),
        ("level=c30", {"level": "c30"}, ""),
        ("step=4,batch=0,tower=image", {"step": 4, "batch": 0, "tower": "image"}, ""),
        ("image=224 attention=plain", {"image": 224, "attention": "plain"}, ""),
        ("image=97x160", {"image": "97x160"}, ""),
        ("step=200 77 tokens", {"step": 200, "tokens": 77}, ""),
        ("text=77", {"tokens": 77}, ""),
        ("77 tokens, minus a=b, c", {"tokens": 77}, "a=b, c"),
        ("x=-0.5,y=0.25", {"x": -0.5, "y": 0.25}, ""),
        ("mean over levels, minus B", {"average": "mean over levels"}, "B"),
        ("17 data sets", {"average": "17 data sets"}, ""),
        ("anything else", {"case": "anything else"}, ""),
    ],
)
def test_conditions_of_earlier_files_are_read(written, where, against, tmp_path):
    """The left column is what versions before `where` wrote, spelled here by hand."""
    line = {"model": "A", "task": "digits", "metric": "top1", "value": 0.5, "condition": written}
    (tmp_path / "old.jsonl").write_text(json.dumps({"run": RUN}) + "\n" + json.dumps(line) + "\n")
    (row,) = read_rows(tmp_path / "old.jsonl")[1]
    assert (row.where, row.against) == (where, against)
    assert parse(text(where, against)) == (where, against)


@pytest.mark.parametrize(
    ("where", "error", "message"),
    [
        ({"steps": 3}, UnknownName, "unknown key of where 'steps'; did you mean 'step'"),
        ({"step": "3"}, TypeError, r"where\['step'\] must be a whole number \(got '3'\)"),
        ({"step": True}, TypeError, r"got True"),
        ({"tower": 3}, TypeError, r"must be text \(got 3\)"),
    ],
)
def test_where_takes_known_keys_of_their_types(where, error, message):
    with pytest.raises(error, match=message):
        Result("A", "digits", "top1", 0.5, where=where)


def test_two_programs_add_rows_to_one_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    with ExitStack() as stack:
        asked = [[sys.executable, "-c", ADDS, name, path] for name in "AB"]
        both = [stack.enter_context(subprocess.Popen(one, stdin=-1, stdout=-1, text=True)) for one in asked]
        for one in both:
            assert one.stdout.readline() == "open\n"
        for one in both:
            one.stdin.write("\n")
            one.stdin.flush()
    assert [one.returncode for one in both] == [0, 0]
    rows = read_rows(path)[1]
    assert {(row.model, row.metric, row.value) for row in rows} == {
        (name, f"metric_{i}", i / 50) for name in "AB" for i in range(50)
    }


def test_a_row_measured_again_takes_its_place(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = Result("A", "digits", "top1", 0.5), Result("A", "digits", "top5", 0.9)
    RowsFile(path, RUN).add([first, second])
    file = RowsFile(path, RUN)
    assert file.found == [first, second]
    again = Result("A", "digits", "top1", 0.6)
    file.add([again, other := Result("B", "digits", "top1", 0.7)])
    assert read_rows(path) == (RUN, [again, second, other])
    assert latest([first, second, again]) == ([again, second], 1)


def test_other_settings_are_refused(tmp_path):
    path = tmp_path / "rows.jsonl"
    RowsFile(path, RUN, ["max_images"]).add([Result("A", "digits", "top1", 0.5)])
    before = path.read_bytes()
    with pytest.raises(ValueError, match=r"different settings \(max_images was None, is 5\)"):
        RowsFile(path, RUN | {"max_images": 5}, ["max_images"])
    assert path.read_bytes() == before
    RowsFile(path, RUN | {"max_images": 5, "seed": 1}, ["seed_of_a_later_version"])


@pytest.mark.parametrize("text", ["notes", "notes\nmore", '{"model": 3}\nx', ""])
def test_a_file_that_is_no_rows_file_stays_as_it_is(text, tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    if text:
        with pytest.raises(ValueError, match="not a result row"):
            RowsFile(path, RUN)
    assert path.read_text() == text


def test_half_a_line_of_a_kill_is_dropped(tmp_path):
    path = tmp_path / "rows.jsonl"
    row = Result("A", "digits", "top1", 0.5)
    write_rows(path, [row], RUN)
    path.write_bytes(path.read_bytes() + b'{"model": "B", "ta')
    assert RowsFile(path, RUN).found == [row]
    assert [*Path(tmp_path).glob("*.partial")] == []
