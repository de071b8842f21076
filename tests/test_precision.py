"""Models evaluated in bfloat16: against the same weights in float32, and against PyTorch's own conversion."""

import argparse
import copy
import json
from dataclasses import replace

import open_clip
import pytest
import timm
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity, interpolate

import ssmclip
from small_clips import SMALL, saved
from ssmclip.cli import classify, embed, search
from ssmclip.evaluate import Settings, Study
from ssmclip.evaluate.search.index import read_index
from ssmclip.evaluate.suites import MEAN, SUITES, Suite
from ssmclip.evaluate.tasks import open_tasks
from ssmclip.humans.decide import CATEGORIES
from ssmclip.humans.stimuli import Stimulus
from ssmclip.humans.study import Experiment
from ssmclip.humans.trials import read_trials
from ssmclip.models.names import find
from ssmclip.models.precision import has_bfloat16, resolve
from ssmclip.registry import UnknownName
from ssmclip.report import read_store, table
from ssmclip.report.table1 import table1
from ssmclip.rows import Result, read_rows, write_rows

FEW = Settings(batch_size=50, examples=0, max_images=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("small") / "model", SMALL)[1]


@pytest.fixture(scope="module")
def digits():
    return open_tasks(["digits"], "")


def smooth_pictures(n: int, side: int) -> torch.Tensor:
    """Noise at several scales, as photographs have."""
    generator = torch.Generator().manual_seed(1)
    parts = [torch.randn(n, 3, size, size, generator=generator) for size in (4, 16, side)]
    pictures = sum(interpolate(part, side, mode="bilinear") for part in parts)
    return pictures / pictures.std()


@pytest.mark.parametrize("name", ["vmamba_tiny_s1l8", "vmamba_tiny_v0"])
def test_embeddings_in_bfloat16_point_where_those_in_float32_do(name, tmp_path):
    torch.manual_seed(0)
    network = timm.create_model(name, depths=(2, 2, 2, 2), num_classes=0).eval()
    pictures = smooth_pictures(2, 96)
    with torch.no_grad():
        full = network(pictures)
        half = ssmclip.models.precision.convert(network, "bfloat16")(pictures.bfloat16()).float()
    assert cosine_similarity(full, half).min() >= 0.9999
    assert not torch.equal(full, half)


def test_all_weights_are_bfloat16_but_the_scale_of_logits(folder):
    full, half = find(folder), find(folder, precision="bfloat16")
    assert (full.dtype, half.dtype) == (torch.float32, torch.bfloat16)
    other = {name for name, p in half.network.named_parameters() if p.dtype != torch.bfloat16}
    assert other == {"logit_scale"}
    assert torch.equal(half.network.logit_scale, full.network.logit_scale)
    rounded = copy.deepcopy(full.network.visual).bfloat16().state_dict()
    assert all(torch.equal(value, rounded[name]) for name, value in half.network.visual.state_dict().items())


def test_rows_say_bfloat16_and_those_in_float32_stay_as_they_are(folder, digits, tmp_path):
    out = tmp_path / "rows.jsonl"
    models = {"A": str(folder), "B": find(folder)}
    plain = Study(models, digits, FEW).rows()
    named = Study(models, digits, FEW, precision="float32", out=out).rows()
    assert [repr(row) for row in named] == [repr(row) for row in plain]
    assert all(row.where == {} for row in plain)
    half = Study({"A": str(folder)}, digits, FEW, precision="bfloat16", out=out).rows()
    measured, between = [row for row in half if not row.against], [row for row in half if row.against]
    assert [row.where for row in measured] == [{"precision": "bfloat16"}] * len(measured)
    assert between == [row for row in plain if row.against]
    kept = read_rows(out)[1]
    assert [row for row in kept if not row.against] == [row for row in plain if not row.against] + measured


def test_accuracy_in_bfloat16_is_within_the_interval_of_float32(folder, digits):
    both = [Study({"A": str(folder)}, digits, FEW, precision=name).rows() for name in ("float32", "bfloat16")]
    assert [row.metric for row in both[0]] == [row.metric for row in both[1]]
    for full, half in zip(*both, strict=True):
        if full.metric in ("top1", "top5"):
            assert full.ci_low <= half.value <= full.ci_high, full.metric


def test_differences_between_models_are_within_one_precision(folder, digits):
    models = {"A": str(folder), "B": str(folder)}
    rows = Study(models, digits, FEW, precision="bfloat16").rows()
    between = [row for row in rows if row.against]
    assert {(row.model, row.against, row.value) for row in between} == {("A", "B", 0.0)}
    assert all(row.where == {"precision": "bfloat16"} for row in between)


def test_the_mean_of_a_suite_is_within_one_precision(folder, digits, monkeypatch):
    for name in ("float32", "bfloat16"):
        monkeypatch.setitem(SUITES._items, "both", Suite("Both", "", {"digits": ("top1",)}))
        rows = Study({"A": str(folder)}, digits, FEW, precision=name, suites=["both"]).rows()
        one, mean = (next(row for row in rows if row.metric == metric) for metric in ("top1", MEAN))
        assert (mean.value, mean.where) == (one.value, one.where)


def test_classes_in_bfloat16_are_those_of_float32(folder, tmp_path, capsys):
    Image.effect_noise((40, 50), 90).convert("RGB").save(tmp_path / "a.png")
    shown = []
    for precision in ("float32", "bfloat16"):
        words = (tmp_path / "a.png", "--model", folder, "--labels", "a dog,a cat", "--json", "--precision", precision)
        assert run(classify, *words) == 0
        guesses = json.loads(capsys.readouterr().out)["guesses"]
        shown.append({guess["label"]: guess["probability"] for guess in guesses})
    assert shown[0] != shown[1]
    assert shown[0] == pytest.approx(shown[1], abs=0.02)


def test_a_report_shows_bfloat16_as_a_model_of_its_own(tmp_path):
    full = Result("A", "digits", "top1", 0.5, 0.4, 0.6, 60, extra={"kind": "classification"})
    half = replace(full, value=0.45, where={"precision": "bfloat16"})
    write_rows(tmp_path / "rows.jsonl", [full, half, replace(half, against="B")], {})
    store = read_store([tmp_path / "rows.jsonl"])
    assert store.models == ["A", "A (bfloat16)"]
    assert [(row.plain, row.against) for row in store.rows] == [(True, ""), (True, ""), (False, "B (bfloat16)")]
    assert "| A | A (bfloat16) |" in table(store.rows).splitlines()[0]
    measured = [replace(row, task=task) for row in store.rows for task in ("cifar10", "food101")]
    lines = [line for line in table1(measured).lines if not line.published]
    assert [(line.model, line.shared) for line in lines] == [("A", 50.0), ("A (bfloat16)", 45.0)]


def test_decisions_in_bfloat16_are_those_of_another_subject(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:1])
    picture = tmp_path / "a.png"
    Image.effect_noise((40, 40), 90).convert("RGB").save(picture)
    stimuli = [Stimulus("edge", "a.png", None, "edg", None, "0", CATEGORIES[0], "a.png", picture)]
    out = tmp_path / "decisions.parquet"
    for precision in ("float32", "bfloat16", "bfloat16"):
        experiment = Experiment(stimuli, out, "categories", precision=precision)
        list(experiment.run({"A": str(folder)}, FEW))
    assert sorted(read_trials(out).subjects) == ["A", "A (bfloat16)"]


def run(command, *words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_an_index_is_searched_in_the_precision_it_was_made_in(precision, folder, tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.effect_noise((40, 50), 90).convert("RGB").save(pictures / "a.png")
    out = tmp_path / "index.parquet"
    assert run(embed, pictures, "--model", folder, "--out", out, "--precision", precision) == 0
    index = read_index(out)
    assert index.about["precision"] == precision
    assert run(search, "a dog", out) == 0
    assert "a.png" in capsys.readouterr().out
    embedder = ssmclip.Embedder(folder, dtype=getattr(torch, precision))
    text = embedder.encode_texts("a dog")
    run(search, "a dog", out)
    assert float(capsys.readouterr().out.split()[0]) == pytest.approx(
        float(text[0].numpy() @ index.vectors[0]), abs=1e-4
    )


def test_a_float64_index_is_searched_in_float64(folder, tmp_path, capsys):
    Image.effect_noise((40, 50), 90).convert("RGB").save(tmp_path / "a.png")
    embedder = ssmclip.Embedder(folder, dtype=torch.float64)
    ssmclip.evaluate.search.index.build_index(tmp_path, embedder, tmp_path / "index.parquet")
    assert run(search, "a dog", tmp_path / "index.parquet") == 0
    assert "a.png" in capsys.readouterr().out


def test_auto_is_bfloat16_where_the_processor_multiplies_it(monkeypatch, folder):
    for instructions, precision in (({"avx512_bf16": True}, "bfloat16"), ({"avx2": True}, "float32")):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=instructions: found)
        assert has_bfloat16(torch.device("cpu")) == (precision == "bfloat16")
        assert resolve("auto") == precision
        assert ssmclip.Embedder(folder, dtype="auto").clip.dtype == getattr(torch, precision)
    assert not has_bfloat16(torch.device("meta"))


def test_another_precision_is_refused_by_name(folder, digits, tmp_path, capsys):
    for call in (
        lambda: find(folder, precision="half"),
        lambda: ssmclip.Embedder(folder, dtype="half"),
        lambda: Study({"A": str(folder)}, digits, FEW, precision="half").rows(),
        lambda: Experiment([], tmp_path / "d.parquet", precision="half").decider("A", str(folder), FEW),
    ):
        with pytest.raises(UnknownName, match=r"unknown precision 'half'.*auto, bfloat16, float32"):
            call()
    with pytest.raises(SystemExit):
        run(embed, ".", "--model", folder, "--out", "x", "--precision", "half")
    assert "invalid choice: 'half' (choose from" in capsys.readouterr().err
