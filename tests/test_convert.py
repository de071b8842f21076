"""Published weights into folders that open_clip, timm and transformers read, and those to the hub and back."""

import hashlib
import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image

import ssmclip
from ssmclip.__main__ import main
from ssmclip.models import CheckpointError, create_clip, load_config
from ssmclip.models.files import hub
from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.published.language_model import load_language_model

ODD = dict(depths=(1, 2, 1, 1), dims=(8, 14, 20, 36))


@pytest.fixture
def odd_checkpoint(tiny_config, tmp_path):
    """(a CLIP of odd dimensions, the training checkpoint that CLIP-Mamba's code would have saved of it)."""
    tiny_config["model_cfg"]["vision_cfg"]["timm_model_name"] = name_with_fields("vmamba", {**ODD, "gated": True})
    tiny_config["model_cfg"]["quick_gelu"] = True
    torch.manual_seed(0)
    model = create_clip(tiny_config).eval()
    state = {f"module.{k.replace('visual.trunk.', 'visual.')}": v for k, v in model.state_dict().items()}
    state["module.image_projection"] = state.pop("module.visual.head.proj.weight").T
    torch.save({"epoch": 25, "state_dict": state}, tmp_path / "checkpoint_best.pt")
    return model, tmp_path / "checkpoint_best.pt"


def with_clip_vit(config):
    config["model_cfg"]["vision_cfg"] = dict(image_size=32, patch_size=8, width=32, layers=2, head_width=16)


def with_timm_vit(config):
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "vit_nano_patch16"


def with_bias(config):
    config["model_cfg"] |= dict(custom_text=True, init_logit_bias=-3.0)


def with_silu(config):
    fields = {**ODD, "act_layer": "silu"}
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = name_with_fields("mambaout_femto_linear_head", fields)


def with_mamba2(config):
    fields = dict(vocab_size=60, hidden_size=16, num_hidden_layers=1, state_size=6, num_heads=4, head_dim=8, n_groups=2)
    config["model_cfg"]["text_cfg"] = dict(mamba=dict(model_type="mamba2", layer_norm_epsilon=1e-2, **fields))


@pytest.mark.parametrize("change", [dict, with_clip_vit, with_timm_vit, with_bias, with_silu, with_mamba2])
@torch.no_grad()
def test_a_saved_clip_is_read_and_converted_by_its_own_configuration(tiny_config, tmp_path, change):
    change(tiny_config)
    torch.manual_seed(0)
    model = create_clip(tiny_config).eval()
    for p in model.parameters():  # away from biases of 0, where activations and norms are nearly alike
        p.add_(0.2 * torch.randn_like(p))
    ssmclip.save_model(model, tiny_config, tmp_path)
    assert ssmclip.convert(tmp_path, tmp_path / "again") == "clip"
    config = {name: load_config(folder) for name, folder in (("of", tmp_path), ("again", tmp_path / "again"))}
    assert config["again"] == config["of"]
    image, text = torch.randn(2, 3, 32, 32), torch.randint(1, 60, (2, 77))
    for read in (ssmclip.load_published(tmp_path), ssmclip.load(tmp_path / "again").model):
        assert torch.equal(read.encode_image(image), model.encode_image(image))
        assert torch.equal(read.encode_text(text), model.encode_text(text))
        assert all(torch.equal(value, model.state_dict()[key]) for key, value in read.state_dict().items())


@torch.no_grad()
def test_what_is_asked_for_is_preferred_to_the_configuration(tiny_config, tmp_path):
    ssmclip.save_model(create_clip(tiny_config), tiny_config, tmp_path / "clip")
    assert ssmclip.load_published(tmp_path / "clip").transformer.resblocks[0].attn.num_heads == 2
    assert ssmclip.load_published(tmp_path / "clip", text_heads=4).transformer.resblocks[0].attn.num_heads == 4
    with_mamba2(tiny_config)
    model = create_clip(tiny_config).eval()
    ssmclip.save_model(model, tiny_config, tmp_path / "mamba2")
    mamba = ssmclip.load_published(tmp_path / "mamba2", n_groups=1, text_heads=3).text.transformer.config
    assert (mamba.n_groups, mamba.state_size, mamba.layer_norm_epsilon) == (1, 12, 1e-2)
    ssmclip.convert(model.text.transformer.state_dict(), tmp_path / "language", n_groups=4, layer_norm_epsilon=1e-3)
    for asked, found in (({}, (4, 3, 1e-3)), (dict(n_groups=1, layer_norm_epsilon=1e-6), (1, 12, 1e-6))):
        mamba = ssmclip.load_published(tmp_path / "language", **asked).config
        assert (mamba.n_groups, mamba.state_size, mamba.layer_norm_epsilon) == found


def test_a_bare_clip_may_have_a_bias_of_its_similarities(tiny_config):
    model = create_clip(tiny_config | {"model_cfg": tiny_config["model_cfg"] | {"init_logit_bias": -7.0}})
    assert ssmclip.load_published(model.state_dict()).logit_bias.item() == -7


TEXT = torch.randint(0, 49406, (2, 77), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_clip_is_read_back_by_open_clip_and_ssmclip(odd_checkpoint, tmp_path):
    model, path = odd_checkpoint
    heads = ["--text-heads", "2"]
    assert main(["convert", str(path), str(tmp_path / "out"), *heads]) == 0
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    ours = ssmclip.load(tmp_path / "out")
    picture = Image.effect_noise((50, 40), 60).convert("RGB")
    image = preprocess(picture)[None]
    assert torch.equal(ours.preprocess(picture), image[0])
    for read in (theirs.eval(), ours.model):
        assert torch.equal(read.encode_image(image), model.encode_image(image))
        assert torch.equal(read.encode_text(TEXT), model.encode_text(TEXT))
        assert read.logit_scale == model.logit_scale
    (tmp_path / "out").rename(tmp_path / "moved")  # nothing in the folder says where it was
    theirs = open_clip.create_model(f"local-dir:{tmp_path / 'moved'}").eval()
    assert torch.equal(theirs.encode_image(image), model.encode_image(image))


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("test_vmamba", {}),
        ("vmamba", {**ODD, "num_classes": 5}),
        ("simba", {**ODD, "d_state": 5, "num_classes": 0, "in_chans": 1}),
        ("simba", {**ODD, "num_classes": 3, "aux_head": True}),
        ("mambaout_femto", {**ODD, "num_classes": 4}),
        ("mambaout_femto", {**ODD, "num_classes": 4, "act_layer": "silu"}),
        ("mambaout_femto_linear_head", {**ODD, "num_classes": 4}),
        ("mambaout_femto_linear_head", {**ODD, "num_classes": 0, "in_chans": 1}),
    ],
)
@torch.no_grad()
def test_an_encoder_is_read_back_by_timm(name, fields, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model(name, **fields).eval()
    told = {key: fields[key] for key in fields if key == "act_layer"}
    assert ssmclip.convert({"model": model.state_dict()}, tmp_path, **told) == "encoder"
    image = torch.randn(2, fields.get("in_chans", 3), 32, 40)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    for read in (theirs, ssmclip.load_published(tmp_path)):
        assert torch.equal(read(image), model(image))


@pytest.mark.parametrize(
    ("kind", "fields"), [("mamba", {}), ("mamba2", dict(num_heads=4, head_dim=12, n_groups=1, state_size=8))]
)
@torch.no_grad()
def test_a_language_model_is_read_back_by_transformers(kind, fields, tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    fields = dict(model_type=kind, vocab_size=30, hidden_size=24, num_hidden_layers=2, **fields)
    model = LanguageModel(read_config(fields)).eval()
    state = {f"backbone.{key}": value for key, value in model.state_dict().items()}
    assert ssmclip.convert(state, tmp_path) == "language_model"
    tokens = torch.randint(0, 30, (2, 7))
    theirs = transformers.AutoModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(theirs(tokens).last_hidden_state, model(tokens), rtol=1e-4, atol=1e-4)
    assert torch.equal(load_language_model(tmp_path)(tokens), model(tokens))


def test_a_text_tower_alone_has_no_folder_form(shared, tmp_path):
    state = torch.load(shared / "parity" / "text_clip.pt")["state_dict"]
    with pytest.raises(CheckpointError, match="text tower alone"):
        ssmclip.convert(state, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_name_with_fields_is_a_model_and_a_wrong_one_says_so():
    name = name_with_fields("vmamba", {**ODD, "ssm_ratio": 1.5, "patch_embed": "v1"})
    assert name == 'vmamba.depths=[1, 2, 1, 1];dims=[8, 14, 20, 36];ssm_ratio=1.5;patch_embed="v1"'
    assert timm.create_model(name).layers[1].blocks[1].op.inner == 21
    with pytest.raises(ValueError, match=r"tag must be the name of weights.*got 'in1k'"):
        timm.create_model("vmamba.in1k")


# ---- the hub, played by a folder


@pytest.fixture
def fake_hub(tmp_path, monkeypatch):
    """A folder of repositories that huggingface_hub's functions read, instead of the network; with what was asked."""
    root, asked = tmp_path / "hub", []

    def files(repo):
        return sorted(p for p in (root / repo).rglob("*") if p.is_file())

    def model_info(self, repo, files_metadata=False):
        if not (root / repo).is_dir():
            raise OSError("no network here")
        siblings = [
            SimpleNamespace(
                rfilename=str(p.relative_to(root / repo)),
                lfs=None if p.suffix == ".json" else SimpleNamespace(sha256=hashlib.sha256(p.read_bytes()).hexdigest()),
            )
            for p in files(repo)
        ]
        return SimpleNamespace(sha="abc", siblings=siblings)

    def hf_hub_download(repo, name, revision=None):
        asked.append(name)
        path = tmp_path / "cache" / repo / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((root / repo / name).read_bytes() + (b"!" if "broken" in name else b""))
        return str(path)

    def try_to_load_from_cache(repo, name, revision=None):
        path = tmp_path / "cache" / repo / name
        return str(path) if path.is_file() else None

    def snapshot_download(repo, local_files_only):
        assert local_files_only
        if not (tmp_path / "cache" / repo).is_dir():
            raise OSError("not in the cache")
        return str(tmp_path / "cache" / repo)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    for function in (hf_hub_download, try_to_load_from_cache, snapshot_download):
        monkeypatch.setattr(huggingface_hub, function.__name__, function)
    return SimpleNamespace(root=root, asked=asked)


def test_a_clip_comes_from_the_hub_once_and_then_from_disk(fake_hub, tiny_clip, tiny_config):
    ssmclip.save_model(tiny_clip[0], tiny_config, fake_hub.root / "someone" / "clip")
    (fake_hub.root / "someone" / "clip" / "README.md").write_text("not needed")
    for _ in range(2):
        loaded = ssmclip.load("hf-hub:someone/clip").model
        assert torch.equal(loaded.text_projection, tiny_clip[0].text_projection)
    assert sorted(fake_hub.asked) == ["open_clip_config.json", "open_clip_model.safetensors"]
    (fake_hub.root / "someone").rename(fake_hub.root / "unreachable")
    assert torch.equal(ssmclip.load("hf-hub:someone/clip").model.text_projection, tiny_clip[0].text_projection)
    with pytest.raises(
        FileNotFoundError, match=r"someone/else was not found locally and could not be downloaded.*no network here"
    ):
        ssmclip.load("hf-hub:someone/else")


def test_one_file_of_several_is_named(fake_hub):
    folder = fake_hub.root / "someone" / "checkpoints"
    folder.mkdir(parents=True)
    for seed, name in enumerate(["small.pt", "large.pt", "broken.pt"]):
        torch.manual_seed(seed)
        torch.save(timm.create_model("test_vmamba").state_dict(), folder / name)
    torch.manual_seed(1)
    truth = timm.create_model("test_vmamba").patch_embed[0].weight
    assert torch.equal(ssmclip.load_published("hf-hub:someone/checkpoints/large.pt").patch_embed[0].weight, truth)
    assert fake_hub.asked == ["large.pt"]
    with pytest.raises(FileNotFoundError, match=r"has no file huge\.pt; it has .*large\.pt"):
        ssmclip.load_published("hf-hub:someone/checkpoints/huge.pt")
    with pytest.raises(CheckpointError, match=r"the checksum of broken\.pt of someone/checkpoints must be"):
        hub.download("someone/checkpoints/broken.pt")
    (folder / "broken.pt").unlink()
    fake_hub.asked.clear()
    with pytest.raises(CheckpointError, match=r"several checkpoints.*name one"):
        ssmclip.load_published("hf-hub:someone/checkpoints")
    assert not fake_hub.asked


def test_a_file_of_the_hub_comes_with_its_configuration(fake_hub):
    folder = fake_hub.root / "someone" / "mamba"
    config = dict(model_type="mamba2", hidden_size=32, num_heads=4, head_dim=16, state_size=8, n_groups=2)
    model = LanguageModel(read_config(config | dict(vocab_size=20, num_hidden_layers=1)))
    ssmclip.convert(model.state_dict(), folder, n_groups=2)
    read = ssmclip.load_published("hf-hub:someone/mamba/model.safetensors")
    assert set(fake_hub.asked) == {"model.safetensors", "config.json"}
    tokens = torch.arange(7)[None]
    assert torch.equal(read(tokens), model.eval()(tokens))


def test_timms_own_folder_of_a_linear_head_is_read(tmp_path):
    model = timm.create_model("mambaout_femto_linear_head", num_classes=7).eval()
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    images = torch.randn(1, 3, 64, 64)
    truth = model(images)
    assert torch.equal(ssmclip.load_published(tmp_path)(images), truth)
    assert torch.equal(timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()(images), truth)


def test_weights_in_shards_come_from_the_hub_without_their_neighbours(fake_hub):
    state = timm.create_model("test_vmamba").state_dict()
    folder = fake_hub.root / "someone" / "large"
    folder.mkdir(parents=True)
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(state)}
    for name in set(names.values()):
        safetensors.torch.save_file({key: state[key].clone() for key in state if names[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    (folder / "model.fp16.safetensors").write_bytes(b"another precision")
    (folder / "pytorch_model.bin").write_bytes(b"the same again")
    for file in ("", "/model.safetensors.index.json"):
        read = ssmclip.load_published(f"hf-hub:someone/large{file}").state_dict()
        assert all(torch.equal(read[key], state[key]) for key in state)
    assert set(fake_hub.asked) == {*names.values(), "model.safetensors.index.json"}
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="has no file model-00002-of-00002"):
        ssmclip.load_published("hf-hub:someone/large")


def test_a_clip_comes_from_a_repository_that_holds_another_librarys_form_too(fake_hub, tiny_clip, tiny_config):
    folder = fake_hub.root / "someone" / "both"
    ssmclip.save_model(tiny_clip[0], tiny_config, folder)
    (folder / "config.json").write_text('{"model_type": "clip"}')
    (folder / "model.safetensors").write_bytes(b"the same in other names")
    for read in (ssmclip.load("hf-hub:someone/both").model, ssmclip.load_published("hf-hub:someone/both")):
        assert torch.equal(read.text_projection, tiny_clip[0].text_projection)
    assert "model.safetensors" not in fake_hub.asked


def test_a_language_model_comes_from_the_hub_by_its_name(fake_hub):
    torch.manual_seed(0)
    fields = dict(model_type="mamba", vocab_size=30, hidden_size=24, num_hidden_layers=1)
    model = LanguageModel(read_config(fields))
    ssmclip.convert(model.state_dict(), fake_hub.root / "someone" / "mamba-hf")
    (fake_hub.root / "someone" / "mamba-hf" / "pytorch_model.bin").write_bytes(b"the same again")
    assert torch.equal(load_language_model("someone/mamba-hf").embeddings.weight, model.embeddings.weight)
    assert sorted(fake_hub.asked) == ["config.json", "model.safetensors"]
    with pytest.raises(FileNotFoundError, match=r"is not a folder; a repository .* must be OWNER/NAME"):
        load_language_model("nowhere")


def test_push_makes_the_repository_and_sends_the_folder(tiny_clip, tiny_config, tmp_path, monkeypatch):
    sent = {}

    def create_repo(self, repo, private, exist_ok):
        sent["private"] = private
        assert exist_ok
        return f"https://huggingface.co/{repo}"

    def upload_folder(self, folder_path, repo_id, commit_message, ignore_patterns=None):
        names = [path.name for path in Path(folder_path).iterdir()]
        names = huggingface_hub.utils.filter_repo_objects(names, ignore_patterns=ignore_patterns)
        sent[repo_id] = {name: (Path(folder_path) / name).read_bytes() for name in names}

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    ssmclip.save_model(tiny_clip[0], tiny_config, tmp_path / "clip")
    for name in ("state.pt", ".notes", "tokenizer.json"):
        (tmp_path / "clip" / name).write_text("{}")
    assert main(["push", str(tmp_path / "clip"), "someone/clip", "--private"]) == 0
    assert sent["private"]
    assert set(sent["someone/clip"]) == {"open_clip_config.json", "open_clip_model.safetensors", "tokenizer.json"}
    assert json.loads(sent["someone/clip"]["open_clip_config.json"]) == tiny_config
    with pytest.raises(CheckpointError, match=r"contains no model: it has neither open_clip_config\.json and"):
        ssmclip.push(tmp_path, "someone/clip")
