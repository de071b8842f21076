"""The quickstart from its first step to its report, short."""

import json
from pathlib import Path

import pytest
import torch
from sklearn.metrics import accuracy_score

import ssmclip
from ssmclip.__main__ import main
from ssmclip.analyze.curvature.study import Subject
from ssmclip.cli import quickstart
from ssmclip.data.testsets.open import open_dataset
from ssmclip.rows import read_rows

ROOT = Path(__file__).parents[1]
SHORT = ["steps=2", "warmup_steps=1", "batch_size=16", "device=cpu", "progress=false", "tensorboard=false"]
SHORT += ["validation.every=2", 'validation.tasks=["digits"]', "checkpoint.every=2", "logging.every=1"]


def accuracy_by_hand(model, preprocess, tokenizer) -> float:
    digits = open_dataset("digits", "")
    with torch.no_grad():
        classes = torch.stack(
            [
                model.encode_text(tokenizer([t.replace("{}", name) for t in digits.templates]), normalize=True).mean(0)
                for name in digits.classnames
            ]
        )
        images = torch.stack([preprocess(digits[i][0]) for i in range(len(digits))])
        guesses = (model.encode_image(images) @ torch.nn.functional.normalize(classes, dim=-1).T).argmax(1)
    return accuracy_score(digits.labels, guesses)


def test_it_trains_evaluates_and_reports_and_a_second_time_trains_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(quickstart, "DISTORTED_IMAGES", 4)
    monkeypatch.setattr(quickstart, "DISTORTED", ("contrast",))
    monkeypatch.setattr(quickstart, "TASKS", ("digits",))
    words = ["quickstart", "--recipe", str(ROOT / "recipes" / "quickstart.py"), "--out", str(tmp_path), "--set", *SHORT]
    assert main(words) == 0
    _, rows = read_rows(tmp_path / "rows.jsonl")
    for name in quickstart.MODELS:
        (row,) = [row for row in rows if (row.model, row.task, row.metric) == (name, "digits", "top1")]
        assert row.value == pytest.approx(accuracy_by_hand(*ssmclip.load(tmp_path / name)), abs=1e-9)
        assert f"{name:18} digits   {row.value:6.1%}" in capsys.readouterr().out or name != quickstart.MODELS[0]
        assert {row.task for row in rows if row.model == name} == {"digits", "hessian", "surface_1d"}
    assert (tmp_path / "report.html").stat().st_size > 10_000
    trained = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == trained
    assert read_rows(tmp_path / "rows.jsonl")[1] == rows


def test_the_loss_of_a_loaded_model_is_that_of_its_run(tmp_path, tiny_config):
    """A run trained with SigLIP's loss keeps it when the model is loaded first, by its folder's config.json."""
    from ssmclip.config import apply_overrides, load_recipe
    from ssmclip.train import train

    changes = ['model.changes={"embed_dim":16}', "loss.kind=siglip", "steps=1", "warmup_steps=0", "device=cpu"]
    config = apply_overrides(load_recipe(ROOT / "recipes" / "tiny.py"), [*changes, *SHORT[4:6], "checkpoint.every=1"])
    train(config, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["loss"]["kind"] == "siglip"
    model = ssmclip.load(tmp_path / "run")
    loaded, named = Subject(model, "", 1), Subject(tmp_path / "run", "", 1)
    kinds = [type(subject.loss_of(model.network).__self__).__name__ for subject in (loaded, named)]
    assert kinds == ["SigLip", "SigLip"]
