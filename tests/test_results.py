"""Rows survive the file they are written to; a file that holds none is refused by line."""

import dataclasses
import json
import math

import pytest

from ssmclip.rows import Result, append_rows, describe_run, read_rows, write_rows

GOOD = '{"model": "A", "task": "t", "condition": "", "metric": "m", "value": 1.0}'
ROWS = [
    Result(
        "Modèle \u2028 <b>", "digits", "top1", 0.1 + 0.2, 0.25, 0.35, 360, extra={"names": ["zéro", "|"], "chance": 0.1}
    ),
    Result("B", "train", "loss", 3.0, where={"step": 10}, n=0),
]


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "new" / "rows.jsonl"
    write_rows(path, ROWS, {"seed": 1})
    assert read_rows(path) == ({"seed": 1}, ROWS)
    assert list(path.parent.iterdir()) == [path]
    with path.open("a") as file:
        file.write(GOOD.replace("1.0", "1") + "\n")  # other programs write whole numbers so
    assert repr(read_rows(path)[1][-1].value) == "1.0"
    write_rows(path, ROWS, {"seed": 1})
    append_rows(path, ROWS[:1])
    assert read_rows(path) == ({"seed": 1}, [*ROWS, ROWS[0]])
    append_rows(tmp_path / "appended.jsonl", ROWS)
    run, rows = read_rows(tmp_path / "appended.jsonl")
    assert rows == ROWS
    assert set(run) >= {"commit", "versions", "seed", "device"}


def test_every_line_is_json_also_when_a_value_is_not_finite(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, [Result("A", "t", "loss", math.nan), Result("A", "t", "grad_norm", math.inf)])

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    assert [math.isnan(row.value) for row in read_rows(path)[1]] == [True, True]


def test_the_run_line_says_where_it_ran():
    run = describe_run(3, "cuda", recipe="tiny")
    assert (run["seed"], run["device"], run["recipe"]) == (3, "cuda", "tiny")
    assert run["versions"]["numpy"] == __import__("numpy").__version__
    json.dumps(run)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS)
    with pytest.raises(TypeError):
        write_rows(path, [dataclasses.replace(ROWS[0], extra={"model": object()})])
    assert read_rows(path)[1] == ROWS


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (b"\x89PNG\r\n", "codec|decode"),
        (GOOD[: len(GOOD) // 2].encode(), "delimiter|Expecting|Unterminated"),
        (b"<html>", "Expecting value"),
        (b"[1, 2]", "a row must be an object"),
        (b'"run"', "a row must be an object"),
        (b'{"run": 7}', r"run must be an object \(got '7'\)"),
        (GOOD.replace('"value"', '"valeu"').encode(), r"unknown fields \['valeu'\]"),
        (GOOD.replace(', "value": 1.0', "").encode(), "value"),
        (GOOD.replace("1.0", '"1.0"').encode(), "value is '1.0'"),
        (GOOD.replace('"A"', "7").encode(), "model is '7'"),
        (GOOD.replace("1.0}", '1.0, "extra": [1]}').encode(), "extra is"),
    ],
)
def test_a_line_that_is_no_row_is_named(tmp_path, line, why):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"run": {}}\n\n' + GOOD.encode() + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl, line 4: not a result row \(.*({why})"):
        read_rows(path)
