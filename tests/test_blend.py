"""Blends of two models: the interpolation, what is refused, and that every reader takes the folder."""

import copy
import json

import open_clip
import pytest
import timm
import torch

import ssmclip
from small_clips import SMALL, a_clip, saved, with_text, with_vision
from ssmclip.__main__ import main
from ssmclip.models import CheckpointError, blend
from ssmclip.models.classifier_files import classifier_config, create_classifier, save_classifier
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.models.interpolation import interpolate


@pytest.fixture
def two(tmp_path):
    first, second = (saved(tmp_path / name, seed=seed)[0] for name, seed in (("a", 1), ("b", 2)))
    return first.state_dict(), second.state_dict(), [str(tmp_path / name) for name in "ab"]


def test_a_blend_is_between_its_models_and_open_clip_loads_it(two, tmp_path, capsys):
    first, second, names = two
    assert main(["blend", *names, "--weight", "0.3", "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    theirs, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    for name, value in theirs.state_dict().items():
        expected = 0.7 * first[name].double() + 0.3 * second[name].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-6, atol=1e-7)
    ours, _, tokenizer = ssmclip.load(tmp_path / "out")
    texts = tokenizer(["a dog", "two cats"])
    torch.testing.assert_close(ours.encode_text(texts), theirs.eval().encode_text(texts))


def test_a_curve_begins_and_ends_with_the_models_themselves(two, tmp_path, capsys):
    first, second, names = two
    assert main(["blend", *names, "--weight", "0,0.5,1", "--out", str(tmp_path / "out")]) == 0
    folders = capsys.readouterr().out.split()
    assert folders == [str(tmp_path / "out" / weight) for weight in ("0", "0.5", "1")]
    ends = [ssmclip.load(folder).network.state_dict() for folder in (folders[0], folders[2])]
    for end, state in zip(ends, (first, second), strict=True):
        assert all(torch.equal(end[name], state[name]) for name in state)


def test_whole_numbers_are_the_nearer_ones_and_half_precision_is_computed_in_double():
    first = {"n": torch.tensor(3), "x": torch.tensor([1.0, 2049.0], dtype=torch.float16)}
    second = {"n": torch.tensor(8), "x": torch.tensor([2.0, 2048.0], dtype=torch.float16)}
    near, far = interpolate(first, second, 0.25), interpolate(first, second, 0.75)
    assert (near["n"], far["n"]) == (3, 8)
    assert near["x"].dtype == torch.float16
    assert near["x"].tolist() == [1.25, 2048.0]


def test_other_architectures_are_refused_key_by_key(two, tmp_path):
    names = two[2]
    for folder, changes, message in (
        (
            "deeper",
            with_text(layers=4),
            r"12 weights differ: transformer.resblocks.3.ln_1.weight is missing in the first",
        ),
        ("wider", {**SMALL, "embed_dim": 24}, r"visual.head.proj.weight \(16, \d+\) and \(24, \d+\)"),
        ("heads", with_text(heads=4), r"transformer.resblocks.0.attn 2 heads and 4 heads"),
        ("quick", {**SMALL, "quick_gelu": True}, r"transformer.resblocks.0.mlp.gelu GELU and QuickGELU"),
    ):
        saved(tmp_path / folder, changes)
        with pytest.raises(CheckpointError, match=f"the same architecture; .*{message}"):
            blend(names[0], tmp_path / folder, [0.5], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_bad_input_is_told_in_a_line(two, tmp_path, capsys):
    names, half = two[2], tmp_path / "curve" / "0.5"
    saved(half)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for words, message in (
        ([*names, "--weight", "1.5", "--out", "x"], "must be from 0, the first model, to 1, the second (got (1.5,))"),
        ([*names, "--weight", "nan", "--out", "x"], "must be from 0, the first model"),
        ([*names, "--out", names[1]], "contains a model to blend, or a training run"),
        ([*names, "--out", str(tmp_path / "run")], "contains a model to blend, or a training run"),
        ([names[0], f"{names[1]}/{WEIGHTS_NAME}", "--out", names[1]], "contains a model to blend, or a training run"),
        ([names[0], str(half), "--weight", "0.5,1", "--out", str(half.parent)], "contains a model to blend"),
        ([names[0], "timm:test_vmamba", "--out", "x"], "must be CLIPs, or neither of them (got timm:test_vmamba"),
        (["timm:test_vmamba", "timm:test_vmamba", "--out", "x"], "must be a training run's folder, or one in timm's"),
        ([names[0], "nowhere", "--out", "x"], "unknown model 'nowhere'"),
    ):
        assert main(["blend", *words]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["blend", *names, "--weight", "half", "--out", "x"])
    assert "W must be numbers separated by commas (got 'half')" in capsys.readouterr().err


def test_another_preprocessing_is_told_and_the_seconds_is_kept(two, tmp_path, caplog):
    saved(tmp_path / "c", seed=3, preprocess={"mean": [0.5] * 3, "std": [0.5] * 3})
    blend(two[2][0], tmp_path / "c", [0.5], tmp_path / "out")
    assert "the two models preprocess images differently: the blend does so like" in caplog.text
    assert json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["preprocess_cfg"]["mean"] == [0.5] * 3


def test_a_tokenizer_comes_with_the_blend(tmp_path):
    fields = {"model_type": "mamba", "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 1}
    changes = {**SMALL, "text_cfg": {"mamba": fields, "hf_tokenizer_name": str(tmp_path / "gone")}}
    for name in "ab":
        saved(tmp_path / name, changes)
        (tmp_path / name / "tokenizer.json").write_text('{"of": "both"}')
    blend(tmp_path / "a", tmp_path / "b", [0.5], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"of": "both"}'


def test_classifiers_are_blended_with_their_classes(tmp_path):
    config = classifier_config("test_efficientnet", ["ant", "bee"], image_size=32)
    networks = []
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        networks.append(create_classifier(config))
        save_classifier(networks[-1], config, tmp_path / name)
    blend(tmp_path / "a", tmp_path / "b", [0.25], tmp_path / "out")
    blended = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True)
    expected = copy.deepcopy(networks[0])
    for ours, first, second in zip(
        expected.parameters(), networks[0].parameters(), networks[1].parameters(), strict=True
    ):
        ours.data = torch.lerp(first.data, second.data, 0.25)
    for ours, other in zip(blended.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-5, atol=1e-7)
    assert ssmclip.find(tmp_path / "out").classes == ("ant", "bee")
    save_classifier(networks[0], classifier_config("test_efficientnet", ["ant", "cow"], image_size=32), tmp_path / "c")
    with pytest.raises(ValueError, match="must have the same classes; the first has ant, bee"):
        blend(tmp_path / "a", tmp_path / "c", [0.5], tmp_path / "other")


def test_what_knows_a_run_knows_its_blend(two):
    """Neither a drop path rate nor an image size makes another architecture of a state-space model."""
    first, second = a_clip(with_vision(timm_drop_path=0.5)), a_clip(with_vision(image_size=64))
    assert set(interpolate(first.state_dict(), second.state_dict(), 0.5)) == set(two[0])
