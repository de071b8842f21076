"""The command line: what it prints, and that what a user can put right is one line and exit status 1."""

import re

import pytest
import torch

from ssmclip.__main__ import main
from ssmclip.evaluate.statistics.paired import marked
from ssmclip.models import CheckpointError, create_clip, list_clips, load
from ssmclip.rows import Result, write_rows


def test_models_prints_every_clip_and_the_documents_show_it(capsys, request):
    assert main(["models"]) == 0
    printed = capsys.readouterr().out
    table = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in printed.splitlines()[2:]}
    assert list(table) == list_clips()
    with torch.device("meta"):
        model = create_clip("CLIP-VMamba-S")
    total = sum(p.numel() for p in model.parameters()) / 1e6
    assert float(table["CLIP-VMamba-S"][3]) + float(table["CLIP-VMamba-S"][4]) == pytest.approx(total, abs=0.011)
    assert float(table["CLIP-VMamba-S"][5]) == pytest.approx(8.72, abs=0.01)  # as the original code counts, with a head
    page = (request.config.rootpath / "docs" / "models.md").read_text(encoding="utf-8")
    assert printed == re.search(r"<!-- models -->\n(.*?)<!-- /models -->", page, re.DOTALL).group(1), (
        "`make results` writes the table into docs/models.md"
    )


def test_ops_prints_every_back_end(capsys):
    assert main(["ops"]) == 0
    assert re.search(r"selective_scan +reference +yes", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["train", "recipes/none.py"], "none.py"),
        (["train", "recipes/tiny.py", "--set", "learning_rte=1"], "unknown"),
        (["evaluate", "--model", "CLIP-VMamba-Nanno", "--tasks", "digits", "--out", "x.jsonl"], "CLIP-VMamba-Nano"),
        (["evaluate", "--model", "CLIP-VMamba-Nano", "--tasks", "digit", "--out", "x.jsonl"], "did you mean 'digits'"),
        (["evaluate", "--model", "open_clip:ViT-B-32/foo", "--tasks", "digits", "--out", "x.jsonl"], "openai"),
        (["report", "none.jsonl", "--out", "."], "none.jsonl"),
    ],
)
def test_a_mistake_is_told_in_one_line(capsys, monkeypatch, tmp_path, request, arguments, says):
    recipes = request.config.rootpath / "recipes"
    monkeypatch.chdir(tmp_path)
    arguments = [a.replace("recipes/", f"{recipes}/") for a in arguments]
    assert main(arguments) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"ssmclip {arguments[0]}: ")
    assert says in error


@pytest.mark.parametrize(
    "command",
    [
        "compare a.jsonl b.jsonl --out sub/../b.jsonl",
        "captions --model CLIP-VMamba-Nano --texts b.jsonl --out b.jsonl",
        "ood score --decisions b.jsonl --humans a.jsonl --out b.jsonl",
    ],
)
def test_what_is_read_is_not_written_over(capsys, monkeypatch, tmp_path, command):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sub").mkdir()
    right = torch.tensor([True, False])
    for model, name in (("A", "a.jsonl"), ("B", "b.jsonl")):
        extra = marked(right, ["0", "1"])
        write_rows(name, [Result(model, "t", "top1", 0.5, n=2, extra=extra)])
    before = (tmp_path / "b.jsonl").read_bytes()
    assert main(command.split()) == 1
    assert "is also an input file: give another file" in capsys.readouterr().err
    assert (tmp_path / "b.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "command",
    [
        "evaluate --model A --tasks digits --out x",
        "ood decide --model A --data x --out x",
        "embed x --model A --out x",
        "search dog x",
        "analyze hessian --model A --data x --out x",
        "analyze landscape --model A --data x --out x",
        "analyze efficiency --model A --out x",
    ],
)
@pytest.mark.parametrize(
    ("device", "says"),
    [
        ("gpu", "must be cpu, cuda or cuda:1 (got 'gpu': "),
        ("meta", "must be cpu, cuda or cuda:1 (got 'meta': "),
        ("cuda:99", "cuda:99 does not exist"),
    ],
)
def test_a_device_that_is_not_there_is_told_by_every_command(capsys, command, device, says):
    with pytest.raises(SystemExit) as stopped:
        main([*command.split(), "--device", device])
    assert stopped.value.code == 2
    assert "error: argument --device: device " in (told := capsys.readouterr().err)
    assert says in told


def test_open_clips_weights_that_cannot_be_loaded_are_told(monkeypatch):
    def fail(*args, **more):
        raise RuntimeError("Failed to download weights for tag 'openai'")

    monkeypatch.setattr("open_clip.create_model", fail)
    with pytest.raises(CheckpointError, match="open_clip:ViT-B-32/openai can't be loaded: Failed to download"):
        load("open_clip:ViT-B-32/openai")


@pytest.mark.parametrize(
    "command", ["evaluate --tasks digits", "embed x", "analyze hessian --data x", "ood decide --data x"]
)
def test_a_size_that_is_none_is_told_with_its_reason(capsys, command):
    with pytest.raises(SystemExit):
        main([*command.split(), "--model", "A", "--out", "x", "--image-size", "0"])
    assert "argument --image-size: image size must be pixels or HEIGHTxWIDTH" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("analyze hessian --model no/model --data x --k 0", "k must be at least 1 (got 0)"),
        ("analyze hessian --model no/model --data x --which foo", "which must be 'both', 'largest', 'smallest'"),
        ("analyze landscape --model no/model --data x --points 1", "a surface needs at least 2 points"),
        ("analyze efficiency --model A --batch-size 0", "--batch-size must be at least 1 (got 0)"),
        ("ood score --decisions none --humans none", ""),
    ],
)
def test_the_command_below_is_named_and_options_are_checked_before_a_model_is_loaded(capsys, tmp_path, command, says):
    assert main([*command.split(), "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith(f"ssmclip {' '.join(command.split()[:2])}: {says}")
