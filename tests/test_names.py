"""A model by its name means the same in every command and function."""

import dataclasses
import json
import logging

import open_clip
import pytest
import timm
import torch
from PIL import Image

import ssmclip
from ssmclip.__main__ import build_parser, main
from ssmclip.cli import convert
from ssmclip.cli.options import MODEL, labelled
from ssmclip.models import CheckpointError, create_clip, list_clips
from ssmclip.models.names import RANDOM, build_model, find, load_tokenizer, own_size, reads_text
from ssmclip.models.published.layout import Hints
from ssmclip.registry import UnknownName
from ssmclip.rows import read_rows
from ssmclip.rows.paper_tables import PUBLISHED

PICTURE = Image.effect_noise((150, 120), 60).convert("RGB")
TEXTS = ["a photo of a dog", "the sea"]


@pytest.fixture
def named(tmp_path, tiny_config):
    """(a CLIP, {how it may be named: name}): the same weights by a folder, a run, and files."""
    torch.manual_seed(0)
    model = create_clip("CLIP-VMamba-Nano").eval()
    config = ssmclip.clip_config("CLIP-VMamba-Nano")
    folder, run = tmp_path / "folder", tmp_path / "run"
    for place in (folder, run / "checkpoints" / "step_10"):
        ssmclip.save_model(model, config, place)
    (run / "checkpoints" / "best").write_text("step_10\n")
    torch.save({"state_dict": {f"module.{k}": v for k, v in model.state_dict().items()}}, tmp_path / "checkpoint.pt")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "weights.pth").write_bytes((tmp_path / "checkpoint.pt").read_bytes())
    names = {"folder": folder, "run": run, "file": tmp_path / "checkpoint.pt", "folder of a file": alone}
    names["safetensors"] = folder / "open_clip_model.safetensors"
    return model, {kind: str(path) for kind, path in names.items()}


KINDS = ["folder", "run", "file", "folder of a file", "safetensors"]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_clip_is_the_same_however_it_is_kept(named, kind):
    model, names = named
    found = find(names[kind], label="mine")
    network, preprocess, tokenizer = found
    image = preprocess(PICTURE)[None]
    assert image.shape[2:] == (96, 96)
    tokens = open_clip.SimpleTokenizer(context_length=32)(TEXTS)
    assert torch.equal(tokenizer(TEXTS), tokens)
    assert torch.equal(network.encode_image(image), model.encode_image(image))
    assert torch.equal(network.encode_text(tokens), model.encode_text(tokens))
    assert found.label == "mine"
    assert found.origin.startswith(names[kind])
    assert reads_text(names[kind])
    assert own_size(names[kind]) == (96, 96)
    assert build_model(names[kind]).state_dict().keys() == model.state_dict().keys()
    assert torch.equal(load_tokenizer(names[kind])(TEXTS), tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_size_is_obeyed_however_a_clip_is_kept(named, kind):
    _, names = named
    for size, pixels in ((64, (64, 64)), ((32, 64), (32, 64))):
        assert find(names[kind], image_size=size).preprocess(PICTURE).shape[1:] == pixels


def test_a_vit_from_a_file_has_its_positions_resampled(tmp_path):
    torch.manual_seed(0)
    torch.save(create_clip("CLIP-ViT-Nano").state_dict(), tmp_path / "vit.pt")
    found = find(tmp_path / "vit.pt", image_size=64)
    with torch.no_grad():
        assert found.network.encode_image(found.preprocess(PICTURE)[None]).shape == (1, 256)


# ---- image encoders


@pytest.mark.parametrize("name", ["timm:test_resnet", "timm:test_vit", "test_vit", "timm:test_vmamba"])
@pytest.mark.parametrize("size", [None, 64, (48, 96)])
def test_an_encoder_of_timm_takes_the_image_size(name, size):
    found = find(name, image_size=size)
    own = timm.create_model(name.removeprefix("timm:")).default_cfg["input_size"][1:]
    sides = own if size is None else (size, size) if isinstance(size, int) else size
    image = found.preprocess(PICTURE)
    assert image.shape[1:] == sides
    assert found.tokenizer is None
    assert found.network(image[None]).shape == (1, 1000)
    assert own_size(name) == own
    assert not reads_text(name)


def test_a_size_that_an_encoder_cannot_take_is_refused():
    with pytest.raises(ValueError, match="must be a multiple of the patch, 16"):
        find("timm:test_vit", image_size=50)


@torch.no_grad()
def test_weights_of_an_encoder_come_from_a_file(tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("test_resnet").eval()
    torch.save(model.state_dict(), tmp_path / "resnet.pt")
    ours = timm.create_model("test_vmamba", num_classes=7).eval()
    torch.save({"model": ours.state_dict()}, tmp_path / "vmamba.pth")
    for name, truth in ((f"timm:test_resnet/{tmp_path}/resnet.pt", model), (tmp_path / "vmamba.pth", ours)):
        found = find(name)
        image = found.preprocess(PICTURE)[None]
        assert torch.equal(found.network(image), truth(image))
        assert found.origin != RANDOM


def test_what_reads_text_is_asked_for_by_load(tmp_path):
    with pytest.raises(
        ValueError, match=r"must be a CLIP \(got timm:test_resnet, an image encoder without a text tower"
    ):
        ssmclip.load("timm:test_resnet")
    with pytest.raises(ValueError, match="image encoder without a text tower"):
        load_tokenizer("test_vmamba")


def test_a_tower_that_reads_no_images_is_no_model(tmp_path):
    from ssmclip.models.networks.mamba_text import LanguageModel, read_config

    fields = dict(vocab_size=9, hidden_size=24, num_hidden_layers=1)
    torch.save(LanguageModel(read_config(fields)).state_dict(), tmp_path / "mamba.pt")
    with pytest.raises(CheckpointError, match="contains only a language model tower"):
        find(tmp_path / "mamba.pt")


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("CLIP-VMamba-Nanno", UnknownName, "did you mean 'CLIP-VMamba-Nano'"),
        ("timm:resnett50", UnknownName, "unknown timm model 'resnett50'"),
        ("open_clip:ViT-B-322", UnknownName, "unknown open_clip model 'ViT-B-322'"),
        ("open_clip:ViT-B-32/openay", UnknownName, "unknown weights of ViT-B-32 'openay'"),
        ("runs/none", FileNotFoundError, "no such file or folder: runs/none"),
    ],
)
def test_a_name_of_nothing_says_what_there_is(name, kind, says):
    with pytest.raises(kind, match=says):
        find(name)


# ---- random weights


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("CLIP-VMamba-S", "CLIP-VMamba-S has random weights: pass hf-hub:weiquan/mamba-clip for the published ones"),
        ("CLIP-VMamba-Nano", "CLIP-VMamba-Nano has random weights: pass a run or checkpoint folder"),
        ("timm:test_resnet", "timm:test_resnet has random weights: pass timm:test_resnet.TAG"),
        ("open_clip:ViT-B-32", "open_clip:ViT-B-32 has random weights: pass open_clip:ViT-B-32/openai"),
    ],
)
def test_random_weights_are_reported_with_what_to_pass_instead(name, says, caplog, monkeypatch):
    monkeypatch.setattr("ssmclip.models.names.create_clip", lambda config: create_clip("CLIP-VMamba-Nano"))
    monkeypatch.setattr(open_clip, "create_model", lambda *args, **how: open_clip.CLIP(16, TINY, TINY_TEXT))
    monkeypatch.setattr(open_clip, "get_model_preprocess_cfg", lambda network: {"size": 32})
    caplog.set_level(logging.WARNING)
    assert find(name).origin == RANDOM
    assert says in caplog.text


TINY = dict(image_size=32, patch_size=8, width=32, layers=1, head_width=16)
TINY_TEXT = dict(context_length=8, vocab_size=50, width=16, heads=2, layers=1)


def test_trained_weights_are_not(named, caplog):
    _, names = named
    caplog.set_level(logging.WARNING)
    for name in names.values():
        find(name)
    assert not caplog.records


# ---- commands


def test_evaluate_takes_a_checkpoint_file_and_gives_the_folders_numbers(named, tmp_path):
    _, names = named
    for kind in ("folder", "file"):
        words = ["--tasks", "digits", "--max-images", "20", "--cache", "none", "--examples", "0"]
        assert main(["evaluate", "--model", f"m={names[kind]}", *words, "--out", str(tmp_path / f"{kind}.jsonl")]) == 0
    of_folder, of_file = (read_rows(tmp_path / f"{kind}.jsonl")[1] for kind in ("folder", "file"))
    assert of_folder
    assert [(row.metric, row.value) for row in of_file] == [(row.metric, row.value) for row in of_folder]


def test_efficiency_takes_a_checkpoint_file_and_an_encoder_of_timm(named, tmp_path):
    _, names = named
    out = tmp_path / "rows.jsonl"
    words = ["--sizes", "64", "--count-only", "--out", str(out)]
    models = f"file={names['file']},folder={names['folder']},a=timm:test_resnet,b=test_resnet"
    assert main(["analyze", "efficiency", "--model", models, *words]) == 0
    values = {(row.model, row.metric): row.value for row in read_rows(out)[1]}
    for metric in ("macs", "parameters"):
        assert values["file", metric] == values["folder", metric] > 0
        assert values["a", metric] == values["b", metric] > 0


def options(parser, path=()):
    """(command, option) of every command."""
    for action in parser._actions:
        if hasattr(action, "choices") and isinstance(action.choices, dict):
            for name, sub in action.choices.items():
                yield from options(sub, (*path, name))
        else:
            yield path, action


def test_every_command_describes_a_model_in_the_same_words():
    found = [(path, action) for path, action in options(build_parser()) if action.dest == "model"]
    assert len(found) >= 8
    assert all(MODEL in action.help for _, action in found), [
        path for path, action in found if MODEL not in action.help
    ]


def test_every_hint_is_a_flag_of_convert():
    flags = {flag.removeprefix("--").replace("-", "_") for flag in convert.HINTS}
    assert flags == {field.name for field in dataclasses.fields(Hints)}


def test_convert_writes_what_it_is_told(tmp_path):
    torch.manual_seed(0)
    config = ssmclip.clip_config("CLIP-VMamba-Nano")
    config["model_cfg"]["text_cfg"]["layers"] = 3
    torch.save(create_clip(config).state_dict(), tmp_path / "bare.pt")
    words = ["--text-heads", "4", "--no-quick-gelu", "--image-size", "96"]
    assert main(["convert", str(tmp_path / "bare.pt"), str(tmp_path / "out"), *words]) == 0
    written = json.loads((tmp_path / "out" / "open_clip_config.json").read_text())["model_cfg"]
    assert written["text_cfg"]["heads"] == 4
    assert (written["quick_gelu"], written["vision_cfg"]["image_size"]) == (False, 96)


def test_the_published_numbers_are_the_papers():
    """As the CLIP-Mamba and CLIMP repositories give them."""
    assert set(PUBLISHED) <= set(list_clips())
    assert PUBLISHED["CLIP-SiMBA-L"] == ("hf-hub:weiquan/mamba-clip", "CLIP-Mamba: mean of 26 data sets 36.71")
    assert PUBLISHED["CLIP-ViT-B-16"] == ("", "CLIP-Mamba: mean of 26 data sets 34.21")
    climp = ("hf-hub:NimrodShabtay1986/CLIMP-Mamba2", "CLIMP: NoCaps at 224 px, image R@1 37.4, text R@1 51.0")
    assert PUBLISHED["CLIMP-Mamba2"] == climp


def test_a_path_with_a_comma_or_an_equals_sign_is_one_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("lr=0.1", "a,b", "lr=0.1,wd=0.2", "plain"):
        (tmp_path / name).mkdir()
    for text, expected in {
        "lr=0.1": {"lr=0.1": "lr=0.1"},
        "mine=lr=0.1": {"mine": "lr=0.1"},
        "a,b": {"a,b": "a,b"},
        "plain,a,b,CLIP-VMamba-S": {"plain": "plain", "a,b": "a,b", "CLIP-VMamba-S": "CLIP-VMamba-S"},
        "x=lr=0.1,wd=0.2,plain": {"x": "lr=0.1,wd=0.2", "plain": "plain"},
        f"{tmp_path}/lr=0.1,y=plain": {"lr=0.1": f"{tmp_path}/lr=0.1", "y": "plain"},
        "y=nowhere,z=CLIP-VMamba-S": {"y": "nowhere", "z": "CLIP-VMamba-S"},
        "plain,": {"plain": "plain"},
    }.items():
        assert labelled(text) == expected


def test_of_very_many_names_the_nearest_are_listed():
    error = UnknownName("encoder", "vmamba_tiny", [f"resnet{n}" for n in range(1000)] + ["vmamba_tiny_v0"])
    assert "did you mean 'vmamba_tiny_v0'?" in str(error)
    assert str(error).endswith(" others")
    assert len(str(error)) < 300
