"""CLIMP: its published towers and preprocessing, its language model's tokenizer, and the way into files and back."""

import dataclasses
import shutil
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import tokenizers
import torch
from PIL import Image

import ssmclip
from ssmclip.config import DataConfig, LoggingConfig, ModelConfig, OptimiserConfig, ScheduleConfig, TrainConfig
from ssmclip.models import build_preprocess, build_tokenizer, clip_config, create_clip
from ssmclip.models.tokenizer import LanguageModelTokenizer, find_tokenizer
from ssmclip.train.blueprint import blueprint
from ssmclip.train.start import load_start

transformers = pytest.importorskip("transformers")

# name: Hugging Face's config of the published language model
CLIMPS = {
    "CLIMP-Mamba1": transformers.MambaConfig(vocab_size=50280, hidden_size=2048, num_hidden_layers=48),
    "CLIMP-Mamba2": transformers.Mamba2Config(
        vocab_size=50288, hidden_size=2048, num_hidden_layers=48, num_heads=64, head_dim=64, n_groups=1
    ),
}
# CLIMP's name of a part: open_clip's.
PARTS = {
    "vision_encoder.": "visual.trunk.",
    "vision_projection.": "visual.head.proj.",
    "text_encoder.": "text.transformer.",
    "text_projection.": "text.proj.",
}
OF_VMAMBA_BASE = 88_557_800 - 1000 * (1024 + 1)  # without its classifier


def tiny_climp(text_config: dict, embed_dim: int = 24) -> dict:
    """The configuration of a CLIMP with the dimensions of the small fixtures."""
    kind = text_config["model_type"]
    config = clip_config(next(n for n, c in CLIMPS.items() if c.model_type == kind))
    model_cfg = config["model_cfg"]
    model_cfg["embed_dim"] = embed_dim
    model_cfg["vision_cfg"]["timm_model_name"] = "test_vmamba"
    known = ("model_type", "vocab_size", "hidden_size", "num_hidden_layers", "state_size", "num_heads", "head_dim")
    known += ("n_groups",)
    model_cfg["text_cfg"]["mamba"] = {key: text_config[key] for key in known if key in text_config}
    return config


@pytest.mark.parametrize("name", CLIMPS)
@torch.no_grad()
def test_climp_equals_the_original(shared, name, monkeypatch):
    fixture = torch.load(shared / "parity" / f"{name.lower().replace('-', '_')}.pt")
    config = tiny_climp(fixture["text_config"])
    state = fixture["state_dict"]
    depths = [1 + max(int(k.split(".")[4]) for k in state if f".layers.{i}.blocks." in k) for i in range(4)]
    dims = [state[f"vision_encoder.layers.{i}.blocks.0.norm.weight"].numel() for i in range(4)]
    create_model = open_clip.timm_model.timm.create_model
    monkeypatch.setattr(
        open_clip.timm_model.timm, "create_model", lambda *a, **k: create_model(*a, **k, depths=depths, dims=dims)
    )
    model = create_clip(config).eval()
    for part, own in PARTS.items():
        state = {key.replace(part, own): value for key, value in state.items()}
    model.load_state_dict(state)
    for value, truth in (
        (model.encode_image(fixture["image"]), fixture["image_embed"]),
        (model.encode_text(fixture["input_ids"]), fixture["text_embed"]),
    ):
        assert (value - truth).norm() / truth.norm() < 1e-5


@pytest.mark.parametrize("name", CLIMPS)
def test_climp_has_the_published_towers(name):
    with torch.device("meta"):
        model = create_clip(name)
        theirs = transformers.AutoModel.from_config(CLIMPS[name])
    assert {k: v.shape for k, v in theirs.state_dict().items()} == {
        k: v.shape for k, v in model.text.transformer.state_dict().items()
    }
    image = sum(p.numel() for p in model.visual.parameters())
    assert image == OF_VMAMBA_BASE + 1024 * 768 + 768
    assert model.text.proj.weight.shape == (768, 2048)
    assert model.text.proj.bias is not None


def test_climp_squashes_an_image_and_takes_imagenets_statistics():
    preprocess = build_preprocess(clip_config("CLIMP-Mamba1"))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 400, 3), dtype=np.uint8))
    pixels = torch.from_numpy(np.array(picture.resize((224, 224), Image.Resampling.BILINEAR))).permute(2, 0, 1) / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(preprocess(picture), (pixels - mean[:, None, None]) / std[:, None, None])


# ---- the tokenizer


@pytest.fixture
def tokenizer_file(shared):
    return shared / "data" / "tokenizers" / "20B_tokenizer.json"


CAPTIONS = ["Hello world", "", "Ein Bild: zwei   Hunde, naïve façade ☃", "a photo of a dog " * 40]


def test_tokens_are_those_of_transformers(tokenizer_file):
    tokenizer = LanguageModelTokenizer(tokenizer_file)
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tokenizer_file), pad_token="<|endoftext|>")
    ids = tokenizer(CAPTIONS)
    assert ids[0, :2].tolist() == [12092, 1533]
    assert torch.equal(ids, theirs(CAPTIONS, padding=True, return_tensors="pt").input_ids)
    cut = theirs(CAPTIONS, padding="max_length", truncation=True, max_length=12, return_tensors="pt").input_ids
    assert torch.equal(tokenizer(CAPTIONS, context_length=12), cut)
    assert tokenizer("").tolist() == [[0]]


def test_tokenizer_is_found_on_disk_without_asking_the_network(tokenizer_file, tmp_path, monkeypatch):
    import huggingface_hub

    assert find_tokenizer(str(tokenizer_file)) == tokenizer_file
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match=r"someone/model was not found locally.*text_cfg\.hf_tokenizer_name"):
        find_tokenizer("someone/model")
    cached = tmp_path / "models--someone--model"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("abc")
    (cached / "snapshots" / "abc").mkdir(parents=True)
    (cached / "snapshots" / "abc" / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    assert find_tokenizer("someone/model").read_bytes() == tokenizer_file.read_bytes()
    with pytest.raises(FileNotFoundError, match=r"contains no tokenizer\.json"):
        find_tokenizer(str(tmp_path))


@torch.no_grad()
def test_a_saved_climp_loads_with_the_tokenizer_beside_it(tokenizer_file, tmp_path):
    fields = {"model_type": "mamba", "vocab_size": 50280, "hidden_size": 8, "num_hidden_layers": 1}
    config = tiny_climp(fields, embed_dim=8)
    model = create_clip(config).eval()
    ssmclip.save_model(model, config, tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_file.read_bytes())
    loaded, preprocess, tokenizer = ssmclip.load(tmp_path)
    text = tokenizer(CAPTIONS)
    torch.testing.assert_close(loaded.encode_text(text), model.encode_text(text))
    image = preprocess(Image.effect_noise((50, 40), 60).convert("RGB"))[None]
    torch.testing.assert_close(loaded.encode_image(image), model.encode_image(image))


def test_open_clip_names_what_makes_a_climp(tmp_path):
    """open_clip has no place to add a text tower to: the name is known to it, and its error says where to go."""
    assert set(CLIMPS) < set(open_clip.list_models())
    says = r"made by ssmclip\.load and ssmclip\.create_clip"
    for name in ("CLIMP-Mamba1", "CLIMP-Nano"):
        with pytest.raises(TypeError, match=says):
            open_clip.create_model(name)
        for ask in (clip_config, ssmclip.load):
            with pytest.raises(ValueError, match=f"pass {name}, without open_clip:"):
                ask(f"open_clip:{name}")
    fields = {"model_type": "mamba", "vocab_size": 50, "hidden_size": 8, "num_hidden_layers": 1}
    config = tiny_climp(fields, embed_dim=8)
    del config["model_cfg"]["text_cfg"]["hf_tokenizer_name"]  # of many more tokens than 50
    torch.manual_seed(0)
    model = create_clip(config).eval()
    ssmclip.save_model(model, config, tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer.json").write_text("{}")
    assert ssmclip.convert(tmp_path / "saved", tmp_path / "out") == "clip"
    with pytest.raises(TypeError, match=says):
        open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "out" / "tokenizer.json").unlink()
    ids = torch.randint(1, 50, (2, 7))
    assert torch.equal(ssmclip.load(tmp_path / "out").model.encode_text(ids), model.encode_text(ids))


# ---- training


class FourPairs:
    """A stream of the same four pairs."""

    def __init__(self, config, plan, size, rank=0, world_size=1, cursor=None):
        self.images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.texts = plan.texts()(["cat", "dog", "red dog", "blue cat cat"])
        self.skipped, self.skipped_examples, self.cursor = {}, {}, None

    def __next__(self):
        return SimpleNamespace(images=self.images, texts=self.texts, keys=["a", "b", "c", "d"])

    def close(self):
        pass


def a_language_model(folder):
    """Random weights and a tokenizer of six words, as from the hub."""
    fields = dict(vocab_size=16, hidden_size=8, num_hidden_layers=2, num_heads=2, head_dim=8, n_groups=1, state_size=4)
    torch.manual_seed(1)
    model = transformers.Mamba2Model(transformers.Mamba2Config(**fields)).eval()
    model.save_pretrained(folder)
    words = {w: i for i, w in enumerate(["<pad>", "cat", "dog", "red", "blue", "<unk>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    return model, {"model_type": "mamba2", **fields}


def test_a_run_keeps_a_frozen_language_model_and_its_tokenizer(tmp_path, monkeypatch):
    from ssmclip.train import loop, train

    source, out = tmp_path / "language_model", tmp_path / "run"
    source.mkdir()
    theirs, fields = a_language_model(source)
    monkeypatch.setattr(loop, "open_stream", FourPairs)
    text_cfg = {"hf_tokenizer_name": str(source), "mamba": fields, "context_length": 5}
    changes = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_vmamba"}, "text_cfg": text_cfg}
    config = TrainConfig(
        steps=3,
        batch_size=4,
        device="cpu",
        model=ModelConfig(name="CLIMP-VMamba-T-Mamba2-130m", changes=changes, drop_path_rate=0.0),
        data=DataConfig(image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=1e-2, weight_decay=0.5),
        schedule=ScheduleConfig(warmup_steps=0),
        logging=LoggingConfig(tensorboard=False, progress=False),
    )
    model = dataclasses.replace(config.model, text_weights=str(source), freeze_text=True)
    train(dataclasses.replace(config, model=model), out)
    shutil.rmtree(source)  # the run has all it needs
    trained, _, tokenizer = ssmclip.load(out)
    assert tokenizer(["blue cat zebra"]).tolist() == [[4, 1, 5, 0, 0]]
    for name, value in theirs.state_dict().items():
        assert torch.equal(trained.text.transformer.state_dict()[name], value), name
    torch.manual_seed(config.seed)
    fresh = blueprint(config).create()
    for name in ("text.proj.weight", "visual.head.proj.weight", "visual.trunk.layers.0.blocks.0.op.in_proj.weight"):
        assert not torch.equal(trained.state_dict()[name], fresh.state_dict()[name]), name


def test_only_mamba_towers_start_from_a_language_model():
    config = TrainConfig(model=ModelConfig(name="CLIP-ViT-Nano", text_weights="somewhere"))
    with pytest.raises(ValueError, match="the text tower of CLIP-ViT-Nano is none"):
        load_start(create_clip("CLIP-ViT-Nano"), config, blueprint(config), None)


@torch.no_grad()
def test_climp_nano_works_without_any_download():
    model, preprocess, tokenizer = ssmclip.load("CLIMP-Nano")
    assert build_tokenizer(clip_config("CLIMP-Nano")).context_length == 77
    texts = ["a dog", "two cats on a red sofa"]
    together = model.encode_text(tokenizer(texts), normalize=True)
    for text, embedding in zip(texts, together, strict=True):
        ids = open_clip.tokenize([text], context_length=20)
        torch.testing.assert_close(model.encode_text(ids, normalize=True)[0], embedding, rtol=1e-5, atol=1e-5)
    assert "CLIMP-Nano" in ssmclip.list_clips()
    assert preprocess(Image.new("RGB", (10, 30))).shape == (3, 96, 96)
