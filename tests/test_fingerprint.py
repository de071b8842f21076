"""What the embedding cache, indexes and decisions tell models apart by.

Every case changes what a model makes (which the test sees for itself) or what it is told to, and must change the key;
and a model that was not changed is known again, in another process as well.
"""

import copy
import functools
import json
import logging
import os
import random
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import Image
from torch import nn
from torch.nn import functional as F

from ssmclip.data.testsets.open import open_dataset
from ssmclip.evaluate import Model, Settings, embed_images, embed_texts
from ssmclip.evaluate.embeddings import cache, embed, fingerprint
from ssmclip.evaluate.embeddings.fingerprint import Unsure
from ssmclip.models import build_preprocess, create_clip, list_clips, load_published

VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


def clip(vision: dict | None = None, text: dict | None = None, **more) -> nn.Module:
    torch.manual_seed(0)
    arguments = {"embed_dim": 16, "vision_cfg": VISION | (vision or {}), "text_cfg": TEXT | (text or {}), **more}
    model = open_clip.CLIP(**arguments, output_dict=True).eval()
    with torch.no_grad():  # so that an activation or an epsilon shows
        for parameter in model.parameters():
            parameter.mul_(3)
    return model


def set_attribute(path: str, value):
    def change(model: nn.Module) -> None:
        *parts, last = path.split(".")
        setattr(functools.reduce(getattr, parts, model), last, value)

    return change


def use(path: str, module):
    return set_attribute(path, module)


def keep_mask(model: nn.Module) -> None:
    model.attn_mask = torch.zeros_like(model.attn_mask)


# name -> (what is changed after the weights are the same, which tower it shows in)
CHANGES = {
    "text heads": (set_attribute("transformer.resblocks.0.attn.num_heads", 1), "text"),
    "image heads": (set_attribute("visual.transformer.resblocks.0.attn.num_heads", 1), "image"),
    "activation": (use("transformer.resblocks.0.mlp.gelu", open_clip.transformer.QuickGELU()), "text"),
    "approximate GELU": (use("visual.transformer.resblocks.0.mlp.gelu", nn.GELU("tanh")), "image"),
    "epsilon": (set_attribute("ln_final.eps", 0.1), "text"),
    "attention mask, in no state": (keep_mask, "text"),
    "pooling": (set_attribute("text_pool_type", "last"), "text"),
    "image pooling": (set_attribute("visual.pool_type", "avg"), "image"),
    "a method replaced": (lambda m: set_attribute("encode_text", lambda t: torch.ones(len(t), 16))(m), "text"),
}


def made(model: nn.Module, tower: str) -> torch.Tensor:
    torch.manual_seed(1)
    tokens = torch.randint(1, 400, (3, 77))
    tokens[:, 5] = 49407
    with torch.no_grad():
        return model.encode_image(torch.randn(3, 3, 32, 32)) if tower == "image" else model.encode_text(tokens)


@pytest.mark.parametrize("change", CHANGES)
def test_what_no_weight_shows_makes_another_key(change):
    alter, tower = CHANGES[change]
    first, second = clip(), clip()
    assert cache.model_hash(first) == cache.model_hash(second)
    alter(second)
    shown = {name: value for name, value in second.state_dict().items()}
    assert all(value.equal(shown[name]) for name, value in first.state_dict().items())
    assert (made(first, tower) - made(second, tower)).abs().max() > 1e-4
    assert cache.model_hash(first) != cache.model_hash(second)


def test_heads_that_a_checkpoint_does_not_tell_make_another_key():
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    state = create_clip("CLIP-VMamba-Nano").state_dict()
    keys = {heads: cache.model_hash(load_published(state, text_heads=heads)) for heads in (8, 4, 2)}
    assert len(set(keys.values())) == 3
    assert cache.model_hash(load_published(state, text_heads=4)) == keys[4]


@pytest.mark.parametrize("setting", ["n_groups", "chunk_size", "rms_norm_epsilon", "a", "act"])
def test_any_setting_of_a_module_makes_another_key(setting):
    """Whatever it is called, and however deep it lies."""

    class Block(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2))
            setattr(self.inner[0], setting, value)

    def key(value) -> str:
        torch.manual_seed(0)
        return cache.model_hash(Block(value))

    values = [1, 2, 1.0, True, None, "1", F.gelu, F.relu, nn.GELU, functools.partial(F.gelu, approximate="tanh"),
              functools.partial(F.gelu), lambda x: x, lambda x: x + 1, lambda x: x + 2, (1, 2), [1, 2], {"a": 1},
              {"a": 2}, {1, 2}, {1, 3}, torch.ones(2), torch.zeros(2), torch.float32, np.ones(2), random.Random.choice,
              PreprocessCfg(), PreprocessCfg(size=7), b"1", Path("a"), Path("b")]  # fmt: skip
    keys = [key(value) for value in values]
    assert len(set(keys)) == len(values)
    assert [key(copy.deepcopy(value)) for value in values] == keys


def test_closures_are_known_by_what_they_hold():
    def key(number):
        return fingerprint.settings_hash(lambda x: x * number)

    assert key(1) == key(1) != key(2)


def test_hooks_and_buffers_that_are_not_kept_make_another_key():
    first, second, third = clip(), clip(), clip()
    second.visual.register_forward_hook(lambda module, given, made: 2 * made)
    third.register_buffer("scale", torch.tensor(2.0), persistent=False)
    assert len({cache.model_hash(model) for model in (first, second, third)}) == 3


class Ring(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.back = [self]  # a module that holds itself


def test_rings_end():
    torch.manual_seed(0)
    first = cache.model_hash(Ring())
    torch.manual_seed(0)
    assert cache.model_hash(Ring()) == first


@pytest.mark.parametrize("name", [name for name in list_clips() if "Nano" in name or "Femto" in name])
def test_a_model_is_known_again_after_it_was_used(name):
    """Caches that a forward pass fills are no settings."""
    torch.manual_seed(0)
    model = create_clip(name).eval()
    before = cache.model_hash(model)
    size = model.visual.image_size
    sides = size if isinstance(size, tuple) else (size, size)
    with torch.no_grad():
        model.encode_image(torch.zeros(1, 3, *sides))
        model.encode_text(torch.full((1, model.context_length), 1))
    assert cache.model_hash(model) == before
    assert cache.model_hash(model.train()) == before  # a mode is no setting: embedding sets it


# ---- preprocessing ---------------------------------------------------------------------------------------------------


def transform(**how):
    return image_transform_v2(PreprocessCfg(size=32, **how), is_train=False)


PREPROCESSINGS = {
    "bicubic": transform(interpolation="bicubic"),
    "bilinear": transform(interpolation="bilinear"),
    "squash": transform(interpolation="bicubic", resize_mode="squash"),
    "longest": transform(interpolation="bicubic", resize_mode="longest"),
    "longest, filled": transform(interpolation="bicubic", resize_mode="longest", fill_color=99),
    "mean": transform(interpolation="bicubic", mean=(0.5, 0.5, 0.5)),
    "std": transform(interpolation="bicubic", std=(0.5, 0.5, 0.5)),
    "size": image_transform_v2(PreprocessCfg(size=33, interpolation="bicubic"), is_train=False),
}


class Shrinking:
    """Like another, but for pictures larger than a limit, which no small picture shows."""

    def __init__(self, inner, limit):
        self.inner, self.limit = inner, limit

    def __call__(self, picture):
        return self.inner(picture.reduce(2) if picture.width > self.limit else picture)


def test_every_preprocessing_has_its_own_key():
    keys = {name: cache.preprocess_hash(preprocess) for name, preprocess in PREPROCESSINGS.items()}
    assert len(set(keys.values())) == len(keys)
    inner = PREPROCESSINGS["bicubic"]
    assert len({cache.preprocess_hash(Shrinking(inner, limit)) for limit in (500, 1500, 5000, 9000)}) == 4
    assert cache.preprocess_hash(transform(interpolation="bicubic")) == keys["bicubic"]


@pytest.mark.parametrize("limit", [100, 500, 1500])
def test_a_preprocessing_is_seen_at_work_on_large_pictures(limit):
    """Also where its settings can't be told apart: these two are one class with one attribute, changed in between."""
    kept = []

    def work(picture):
        return len(kept) > 0 and picture.width > limit

    def key() -> str:
        return cache.combined({str(i): str(work(p)) for i, p in enumerate(fingerprint.probe_pictures())})

    before = key()
    kept.append(1)
    assert key() != before


def test_a_random_preprocessing_is_not_kept(vit, caplog, tmp_path):
    def preprocess(picture):
        return vit.preprocess(picture) + random.random()

    with pytest.raises(Unsure, match="the preprocessing is random"):
        cache.preprocess_hash(preprocess)
    seen = embed_images(Model(vit.network, preprocess, vit.tokenizer, "v"), Drawn(), Settings(cache=tmp_path / "kept"))
    assert len(seen.features) == 5
    assert "embeddings are not cached: the preprocessing is random" in caplog.text
    assert not list((tmp_path / "kept").glob("*/*.safetensors"))


# ---- tokenizers ------------------------------------------------------------------------------------------------------

TOKENIZERS = {
    "usual": lambda: open_clip.SimpleTokenizer(),
    "long": lambda: open_clip.SimpleTokenizer(context_length=248),
    "short": lambda: open_clip.SimpleTokenizer(context_length=32),
    "longer than any text shown": lambda: open_clip.SimpleTokenizer(context_length=4000),
    "longer still": lambda: open_clip.SimpleTokenizer(context_length=4001),
    "whitespace": lambda: open_clip.SimpleTokenizer(clean="whitespace"),
    "canonicalize": lambda: open_clip.SimpleTokenizer(clean="canonicalize"),
    "more tokens": lambda: open_clip.SimpleTokenizer(additional_special_tokens=["<odd>"]),
}


def test_every_tokenizer_has_its_own_key_and_keeps_it():
    keys = {}
    for name, made in TOKENIZERS.items():
        tokenizer = made()
        keys[name] = cache.tokenizer_hash(tokenizer)
        tokenizer(["words that no one has asked it for before, supercalifragilistic"])
        assert cache.tokenizer_hash(tokenizer) == keys[name]
    assert len(set(keys.values())) == len(keys)
    assert cache.tokenizer_hash(open_clip.SimpleTokenizer()) == keys["usual"]


def test_a_random_tokenizer_and_a_random_model_are_not_kept(vit, tmp_path, caplog):
    with pytest.raises(Unsure, match="the tokenizer is random"):
        cache.tokenizer_hash(open_clip.SimpleTokenizer(reduction_mask="simple"))
    model = clip()
    model.visual.register_forward_hook(lambda module, given, made: made + torch.rand(1))
    embed_images(Model(model, vit.preprocess, vit.tokenizer, "m"), Frozen(), Settings(cache=tmp_path))
    assert "the model is random" in caplog.text
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_vocabulary_counts_also_where_no_text_shows_it():
    first, second = open_clip.SimpleTokenizer(), open_clip.SimpleTokenizer()
    second.encoder = second.encoder | {"zyzzyva</w>": 5}
    assert fingerprint.settings_hash(first) != fingerprint.settings_hash(second)


# ---- the cache as a whole --------------------------------------------------------------------------------------------


class Drawn:
    """Five pictures that need no file."""

    keys = tuple("abcde")
    labels = None

    def __len__(self):
        return 5

    def __getitem__(self, place):
        return Image.effect_noise((40, 30), 20 * place + 10).convert("RGB").point(lambda v: v // (place + 1))


class Frozen(Drawn):
    def __init__(self):
        self.pictures = [Drawn.__getitem__(self, place) for place in range(5)]

    def __getitem__(self, place):
        return self.pictures[place]


def kept(folder: Path, kind: str) -> int:
    return len(list((folder / kind).glob("*.safetensors")))


def test_a_corrected_model_gets_its_own_embeddings(tmp_path):
    """As `convert --text-heads` corrects it: same weights, other heads, same cache."""
    tools = open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer()
    settings, pictures = Settings(cache=tmp_path), Frozen()
    for alter in (lambda m: None, CHANGES["text heads"][0], CHANGES["image heads"][0]):
        model = clip()
        alter(model)
        one = Model(model, *tools, "m")
        assert embed_texts(one, ["a dog", "a cat"], settings).equal(embed_texts(one, ["a dog", "a cat"], Settings()))
        assert embed_images(one, pictures, settings).features.equal(embed_images(one, pictures, Settings()).features)
    assert (kept(tmp_path, "texts"), kept(tmp_path, "images")) == (3, 3)


def test_what_only_the_outputs_show_is_embedded_again(tmp_path, monkeypatch):
    """A class that was changed, a back end, a switch of torch's: settings and weights are the same."""
    tools = open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer()
    settings, pictures, model = Settings(cache=tmp_path), Frozen(), clip()
    first = embed_images(Model(model, *tools, "m"), pictures, settings).features
    forward = nn.GELU.forward
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: forward(self, 1.01 * x))
    one = Model(model, *tools, "m")
    second = embed_images(one, pictures, settings).features
    assert not second.equal(first)
    assert second.equal(embed_images(one, pictures, Settings()).features)
    monkeypatch.undo()
    assert embed_images(Model(model, *tools, "m"), pictures, settings).features.equal(first)
    monkeypatch.setattr(fingerprint, "versions", lambda: "others")
    embed_images(Model(model, *tools, "m"), pictures, settings)
    assert kept(tmp_path, "images") == 3


def test_what_cannot_be_seen_through_is_not_kept(vit, tmp_path, caplog):
    model = clip()
    model.lock = threading.Lock()
    one = Model(model, vit.preprocess, vit.tokenizer, "m")
    for _ in range(2):
        assert embed_texts(one, ["a dog"], Settings(cache=tmp_path)).equal(embed_texts(one, ["a dog"], Settings()))
    assert caplog.text.count("embeddings are not cached: a _thread.lock does not show all its settings") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_model_that_fails_on_what_it_is_shown_is_not_kept(vit, tmp_path, caplog):
    def preprocess(picture):
        if picture.size == fingerprint.PICTURES[0][0]:
            raise RuntimeError
        return vit.preprocess(picture)

    one = Model(vit.network, preprocess, vit.tokenizer, "m")
    assert len(embed_images(one, Frozen(), Settings(cache=tmp_path)).features) == 5
    assert "embeddings are not cached: the model raises RuntimeError" in caplog.text


def test_a_key_is_the_same_in_another_process(tmp_path):
    code = (
        "import sys, json; sys.path.insert(0, sys.argv[1])\n"
        "import test_fingerprint as t, open_clip\n"
        "from ssmclip.evaluate import Model\n"
        "from ssmclip.evaluate.embeddings import embed\n"
        "one = Model(t.clip(), open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer(), 'm')\n"
        "print(json.dumps([embed.images_made_of(one), embed.texts_made_of(one)]))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    command = [sys.executable, "-c", code, str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    one = Model(clip(), open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer(), "m")
    assert json.loads(done.stdout.splitlines()[-1]) == [embed.images_made_of(one), embed.texts_made_of(one)]


# ---- pictures --------------------------------------------------------------------------------------------------------


def folder_set(root: Path):
    for number in range(4):
        path = root / f"set/{'ab'[number % 2]}/{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (20, 20), (60 * number, 0, 0)).save(path)
    return open_dataset(f"folder:{root / 'set'}", "x")


def test_a_picture_replaced_with_its_old_time_and_size_is_seen(tmp_path):
    """As `cp -p` and `rsync -t` leave it."""
    dataset = folder_set(tmp_path)
    before = cache.data_hash(dataset, tmp_path / "kept")
    assert cache.data_hash(dataset, tmp_path / "kept") == before
    path = dataset.files[0]
    old, content = path.stat(), bytearray(path.read_bytes())
    content[-20] ^= 1
    other = path.with_name("new")
    other.write_bytes(content)
    os.utime(other, ns=(old.st_atime_ns, old.st_mtime_ns))
    other.replace(path)
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (old.st_size, old.st_mtime_ns)
    assert cache.data_hash(dataset, tmp_path / "kept") != before


def test_two_ways_to_make_pictures_of_the_same_files_have_two_keys(tmp_path):
    dataset = folder_set(tmp_path)
    before = cache.data_hash(dataset, tmp_path / "kept")
    dataset._pictures.get = functools.partial(upside_down, dataset.files)
    after = cache.data_hash(dataset, tmp_path / "kept")
    dataset._pictures.get = functools.partial(black, dataset.files)
    assert len({before, after, cache.data_hash(dataset, tmp_path / "kept")}) == 3


def upside_down(paths, index):
    return Image.open(paths[index]).convert("RGB").rotate(180)


def black(paths, index):
    return Image.new("RGB", (20, 20))


def test_a_missing_file_that_comes_is_seen(tmp_path):
    dataset = folder_set(tmp_path)
    content = dataset.files[1].read_bytes()
    dataset.files[1].unlink()
    before = cache.data_hash(dataset, tmp_path / "kept")
    dataset.files[1].write_bytes(content)
    assert cache.data_hash(dataset, tmp_path / "kept") != before


# ---- a cache that can't be used --------------------------------------------------------------------------------------


def a_file(folder: Path) -> None:
    folder.write_text("")


def below_a_file(folder: Path) -> None:
    folder.parent.rmdir()
    folder.parent.write_text("")


def a_link_to_itself(folder: Path) -> None:
    folder.symlink_to(folder.name)


def files_in_place_of_folders(folder: Path) -> None:
    folder.mkdir()
    for kind in ("images", "texts", "files"):
        (folder / kind).write_text("")


@pytest.mark.parametrize("spoil", [a_file, below_a_file, a_link_to_itself, files_in_place_of_folders])
def test_a_cache_that_is_no_folder_costs_nothing_but_a_warning(vit, tmp_path, spoil, caplog):
    parent = tmp_path / "parent"
    parent.mkdir()
    spoil(parent / "kept")
    dataset, settings = folder_set(tmp_path), Settings(cache=parent / "kept")
    for _ in range(2):
        assert embed_images(vit, dataset, settings).features.equal(embed_images(vit, dataset, Settings()).features)
        assert embed_texts(vit, ["a"], settings).equal(embed_texts(vit, ["a"], Settings()))
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert "embeddings are not cached: the cache" in warned[0].message


FAILING = ("stat", "mkdir", "write_bytes", "replace", "unlink", "read_bytes")


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), OSError(28, "No space left on device")])
@pytest.mark.parametrize("broken", [FAILING, FAILING[1:], ("write_bytes", "unlink"), ("replace", "unlink")])
def test_whatever_fails_of_the_cache_fails_alone(vit, tmp_path, monkeypatch, caplog, broken, error):
    dataset, folder = folder_set(tmp_path), tmp_path / "kept"
    expected = embed_images(vit, dataset, Settings()).features

    for name in broken:
        plain = getattr(Path, name)

        def fail(self, *args, plain=plain, **kwargs):
            if self.is_relative_to(folder):
                raise PermissionError(1, "not the reason") if plain.__name__ == "unlink" else error
            return plain(self, *args, **kwargs)

        monkeypatch.setattr(Path, name, fail)
    assert embed_images(vit, dataset, Settings(cache=folder)).features.equal(expected)
    assert len(embed_texts(vit, ["a"], Settings(cache=folder))) == 1
    warned = [record.message for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert error.strerror in warned[0]
    monkeypatch.undo()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_data_file_that_may_not_be_read_is_counted_with_a_cache_as_without(vit, tmp_path, monkeypatch):
    dataset = folder_set(tmp_path)
    plain = Path.open

    def open_(self, *args, **kwargs):
        if self == dataset.files[2]:
            raise PermissionError(13, "Permission denied")
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(Path, "open", open_)
    seen = embed_images(vit, dataset, Settings(cache=tmp_path / "kept"))
    assert list(seen.unreadable) == [2]
    monkeypatch.undo()
    assert not embed_images(vit, dataset, Settings(cache=tmp_path / "kept")).unreadable


def test_build_preprocess_at_another_size_has_another_key(tiny_config):
    sizes = [cache.preprocess_hash(build_preprocess(tiny_config, size)) for size in (None, 32, 48, (32, 48))]
    assert sizes[0] == sizes[1]
    assert len(set(sizes)) == 3
