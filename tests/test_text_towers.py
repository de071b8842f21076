"""Text towers are a list: each is built, saved, read again and takes open_clip's calls; one can be added."""

import inspect

import open_clip
import pytest
import torch
from open_clip.hf_model import HFTextEncoder
from torch import nn

import ssmclip
from ssmclip.models import create_clip, save_model, save_tokenizer
from ssmclip.models.text_towers import TEXT_TOWERS, TextTower, text_tower_kind
from ssmclip.registry import UnknownName

TRANSFORMER = dict(context_length=12, vocab_size=49408, width=16, heads=2, layers=1)
LANGUAGE_MODEL = dict(vocab_size=49408, hidden_size=16, num_hidden_layers=2)
CONFIGS = {
    "transformer": TRANSFORMER,
    "bag_of_words": TRANSFORMER | {"layers": 0},
    "mamba": dict(context_length=12, mamba=LANGUAGE_MODEL),
    "mamba2": dict(
        context_length=12, mamba=LANGUAGE_MODEL | dict(model_type="mamba2", num_heads=4, head_dim=8, n_groups=1)
    ),
}


def clip_with(text_cfg, tiny_config):
    return tiny_config | {"model_cfg": tiny_config["model_cfg"] | {"text_cfg": dict(text_cfg)}}


@pytest.mark.parametrize("kind", list(TEXT_TOWERS))
def test_a_kind_is_recognised_in_configurations_older_than_the_key(kind):
    assert text_tower_kind(CONFIGS[kind]) == kind
    assert text_tower_kind({**CONFIGS[kind], "kind": kind}) == kind


@pytest.mark.parametrize("kind", list(TEXT_TOWERS))
@torch.no_grad()
def test_a_named_kind_builds_the_same_tower_and_is_read_back(kind, tiny_config, tmp_path):
    named = clip_with({**CONFIGS[kind], "kind": kind}, tiny_config)
    torch.manual_seed(0)
    model = create_clip(named).eval()
    torch.manual_seed(0)
    older = create_clip(clip_with(CONFIGS[kind], tiny_config)).eval()
    assert all(torch.equal(value, older.state_dict()[key]) for key, value in model.state_dict().items())
    save_model(model, named, tmp_path)
    save_tokenizer(named, tmp_path)
    loaded = ssmclip.load(tmp_path)
    tokens = loaded.tokenizer(["a brown dog", ""])
    assert tokens.shape == (2, 12)
    assert torch.equal(loaded.network.encode_text(tokens), model.encode_text(tokens))


@pytest.mark.parametrize("kind", list(TEXT_TOWERS))
def test_the_image_tower_of_a_saved_one_is_open_clips_where_it_can_build_the_text_tower(kind, tiny_config, tmp_path):
    named = clip_with({**CONFIGS[kind], "kind": kind}, tiny_config)
    save_model(create_clip(named), named, tmp_path)
    if TEXT_TOWERS[kind].build is None:
        assert open_clip.create_model(f"local-dir:{tmp_path}").context_length == 12
    else:
        with pytest.raises(TypeError, match=r"made by ssmclip\.load"):
            open_clip.create_model(f"local-dir:{tmp_path}")


@pytest.mark.parametrize("kind", list(TEXT_TOWERS))
def test_a_key_that_a_kind_does_not_read_is_refused(kind, tiny_config):
    with pytest.raises(UnknownName, match="unknown key of text_cfg 'wdith'"):
        create_clip(clip_with({**CONFIGS[kind], "wdith": 3}, tiny_config))


def test_a_kind_nobody_registered_is_refused_with_those_there_are(tiny_config):
    with pytest.raises(UnknownName, match="unknown text tower 'gru'; known: bag_of_words, mamba, mamba2, transformer"):
        create_clip(clip_with({**TRANSFORMER, "kind": "gru"}, tiny_config))


def test_a_kind_and_a_model_type_that_contradict_each_other_are_refused(tiny_config):
    with pytest.raises(ValueError, match=r"kind must match its mamba\.model_type 'mamba2' \(got 'mamba'\)"):
        create_clip(clip_with({**CONFIGS["mamba2"], "kind": "mamba"}, tiny_config))


# ---- what open_clip calls


OWN = [kind for kind, tower in TEXT_TOWERS.items() if tower.build is not None]
# Of open_clip 4's development version, in the order in which `CustomTextCLIP` passes them.
NEXT = {
    "lock": ["unlocked_layers", "freeze_layer_norm", "pooler_in_head"],
    "set_grad_checkpointing": ["enable", "impl"],
}


@pytest.mark.parametrize("method", list(NEXT))
@pytest.mark.parametrize("theirs", [open_clip.transformer.TextTransformer, HFTextEncoder])
@pytest.mark.parametrize("kind", OWN)
def test_a_text_tower_takes_what_open_clips_own_takes(kind, theirs, method):
    tower = TEXT_TOWERS[kind].build(8, CONFIGS[kind])
    own = inspect.signature(getattr(tower, method)).parameters
    for name, parameter in list(inspect.signature(getattr(theirs, method)).parameters.items())[1:]:
        assert own[name].default == parameter.default
    assert list(own) == NEXT[method]


@pytest.mark.parametrize("kind", OWN)
def test_a_clip_is_locked_and_checkpointed_as_open_clips_training_does(kind, tiny_config):
    model = create_clip(clip_with(CONFIGS[kind], tiny_config))
    model.lock_text_tower(unlocked_layers=0, freeze_layer_norm=True)
    locked = {name for name, p in model.text.named_parameters() if not p.requires_grad}
    assert any("embedding" in name for name in locked)
    model.text.lock(1, True, True)
    model.text.set_grad_checkpointing(True, impl="inline")
    model.set_grad_checkpointing(False)


# ---- one from outside


class Mean(nn.Module):
    """The mean of the bytes' embeddings."""

    def __init__(self, embed_dim: int, length: int, scale: float):
        super().__init__()
        self.context_length, self.vocab_size, self.scale = length, 256, scale
        self.table = nn.Embedding(256, embed_dim)

    def forward(self, text):
        return self.scale * self.table(text).mean(1)

    def lock(self, unlocked_layers=0, freeze_layer_norm=True, pooler_in_head=True):
        self.requires_grad_(False)

    def set_grad_checkpointing(self, enable=True, impl="inline"):
        pass


def bytes_of(text_cfg, folder):
    length = text_cfg["length"]
    return lambda texts: torch.tensor([list(text.encode().ljust(length)[:length]) for text in texts])


@pytest.fixture
def mean():
    tower = TextTower(
        keys=frozenset({"length", "scale"}),
        build=lambda embed_dim, text_cfg: Mean(embed_dim, **text_cfg),
        tokenizer=bytes_of,
        save_tokenizer=lambda text_cfg, folder: None,
    )
    TEXT_TOWERS.register("mean")(tower)
    yield
    del TEXT_TOWERS._items["mean"]


@torch.no_grad()
def test_a_tower_from_outside_is_built_saved_loaded_and_evaluated(mean, tiny_config, tmp_path):
    config = clip_with(dict(kind="mean", length=5, scale=2.0), tiny_config)
    model = create_clip(config).eval()
    save_model(model, config, tmp_path)
    save_tokenizer(config, tmp_path)
    loaded = ssmclip.load(tmp_path)
    table = model.text.table.weight
    expected = 2 * torch.stack([table[ord(letter)] for letter in "a dog"]).mean(0)
    features = loaded.network.encode_text(loaded.tokenizer(["a dog"]))[0]
    torch.testing.assert_close(features, expected, rtol=1e-6, atol=1e-7)
    with pytest.raises(UnknownName, match="unknown key of text_cfg 'depth'"):
        create_clip(clip_with(dict(kind="mean", length=5, scale=2.0, depth=1), tiny_config))
