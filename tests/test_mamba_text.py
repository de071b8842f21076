"""The Mamba text towers against transformers' models, and what padding and neighbours must not change."""

import pytest
import torch
from torch import nn

from ssmclip.models import CheckpointError
from ssmclip.models.networks.mamba import Mamba2
from ssmclip.models.networks.mamba_text import LanguageModel, MambaText, left_align, read_config
from ssmclip.models.published.language_model import load_language_model
from ssmclip.registry import UnknownName

transformers = pytest.importorskip("transformers")

# kind: transformers' names of it, then fields, the second set away from every default
KINDS = {
    "mamba": ("MambaConfig", "MambaModel", "MambaForCausalLM"),
    "mamba2": ("Mamba2Config", "Mamba2Model", "Mamba2ForCausalLM"),
}
ODD = dict(
    vocab_size=70,
    hidden_size=24,
    num_hidden_layers=3,
    state_size=5,
    expand=3,
    conv_kernel=3,
    layer_norm_epsilon=1e-3,
    use_bias=True,
    use_conv_bias=False,
)
FIELDS = {
    "mamba": [
        dict(vocab_size=90, hidden_size=40, num_hidden_layers=2),
        ODD | dict(time_step_rank=4),
    ],
    "mamba2": [
        dict(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=1),
        ODD | dict(num_heads=6, head_dim=12, n_groups=2, time_step_limit=(0.02, 0.6)),
    ],
}
CASES = [(kind, i) for kind, cases in FIELDS.items() for i in range(len(cases))]
PAD = 0


def theirs(kind, fields, causal=False):
    """A transformers model with random weights, away from their initial values, in evaluation mode."""
    config_name, *model_names = KINDS[kind]
    config = getattr(transformers, config_name)(**fields, residual_in_fp32=False, use_cache=False, pad_token_id=PAD)
    torch.manual_seed(0)
    model = getattr(transformers, model_names[causal])(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.2 * torch.randn_like(p)
    return model


def ours(kind, fields, model):
    mine = LanguageModel(read_config({"model_type": kind, **fields})).eval()
    mine.load_state_dict(model.state_dict())
    return mine


class GatedNorm(nn.Module):
    """transformers' MambaRMSNormGated without its casts."""

    def __init__(self, original):
        super().__init__()
        self.weight, self.eps, self.size = original.weight, original.variance_epsilon, original.group_size

    def forward(self, y, gate):
        y = (y * gate / (1 + torch.exp(-gate))).unflatten(-1, (-1, self.size))
        return self.weight * (y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt()).flatten(-2)


@pytest.fixture
def in_float64(monkeypatch):
    """transformers' Mamba with its fixed casts to float32 made casts to float64."""

    def convert(model):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if type(child).__name__ in ("MambaRMSNorm", "Mamba2RMSNorm"):
                    norm = nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                    norm.weight = child.weight
                    setattr(module, name, norm)
                elif type(child).__name__ == "MambaRMSNormGated":
                    setattr(module, name, GatedNorm(child))
        return model.double()

    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return convert


def tokens(batch, length, vocab, seed=1):
    return torch.randint(1, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def relative(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


@pytest.mark.parametrize("length", [1, 2, 45])
@pytest.mark.parametrize(("kind", "case"), CASES)
@torch.no_grad()
def test_every_hidden_state_equals_transformers(kind, case, length):
    fields = FIELDS[kind][case]
    model = theirs(kind, fields)
    mine = ours(kind, fields, model)
    text = tokens(3, length, fields["vocab_size"])
    assert relative(mine(text), model(text).last_hidden_state) < 5e-6


@pytest.mark.parametrize(("kind", "case"), CASES)
def test_states_and_gradients_equal_transformers_in_float64(kind, case, in_float64):
    fields = FIELDS[kind][case]
    model = theirs(kind, fields)
    mine = ours(kind, fields, model).double()
    model = in_float64(model)
    text = tokens(2, 20, fields["vocab_size"])
    a, b = mine(text), model(text).last_hidden_state
    assert relative(a, b) < 1e-9
    b.sin().sum().backward()
    a.sin().sum().backward()
    truth = {name: p.grad for name, p in model.named_parameters()}
    for name, p in mine.named_parameters():
        assert relative(p.grad, truth[name]) < 1e-9, name


@pytest.mark.parametrize("saved", ["backbone", "with head", "in shards"])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_what_save_pretrained_wrote_loads(tmp_path, kind, saved):
    fields = FIELDS[kind][1]
    model = theirs(kind, fields, causal=saved == "with head")
    model.save_pretrained(tmp_path, **({"max_shard_size": "10KB"} if saved == "in shards" else {}))
    mine = load_language_model(tmp_path).eval()
    assert mine.config == read_config({"model_type": kind, **fields})
    text = tokens(2, 9, fields["vocab_size"])
    truth = getattr(model, "backbone", model)(text).last_hidden_state
    assert relative(mine(text), truth) < 5e-6


def test_a_folder_that_is_no_language_model_says_so(tmp_path):
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read"):
        load_language_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UnknownName, match="mamba"):
        load_language_model(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "hidden_act": "relu"}')
    with pytest.raises(CheckpointError, match=r"must be 'silu' \(got 'relu'"):
        load_language_model(tmp_path)


def test_heads_that_do_not_come_out_even_are_named():
    with pytest.raises(ValueError, match=r"num_heads=7 times head_dim=8 must be expand=2 times hidden_size=32"):
        read_config({"model_type": "mamba2", "hidden_size": 32, "num_heads": 7, "head_dim": 8})
    with pytest.raises(ValueError, match=r"must divide into 3 groups of heads of 8 \(got 64"):
        Mamba2(32, head_dim=8, n_groups=3)


# ---- pooling and padding

TEXTS = [[5, 9, 3], [7], [4, PAD, 8, 8, 2, 6, 5], [3, 3]]


def tower(kind):
    torch.manual_seed(0)
    fields = FIELDS[kind][0]
    text = MambaText(16, {"model_type": kind, **fields}, pad_id=PAD, proj_bias=True).eval()
    text.transformer.load_state_dict(theirs(kind, fields).state_dict())
    return text


def padded(texts, width, left=0):
    rows = [[PAD] * left + text + [PAD] * (width - left - len(text)) for text in texts]
    return torch.tensor(rows)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_embedding_is_the_projected_state_of_the_last_real_token(kind):
    """Against transformers alone, one text at a time and without any padding."""
    text = tower(kind)
    model = theirs(kind, FIELDS[kind][0])
    embeddings = text(padded(TEXTS, 9))
    for own, embedding in zip(TEXTS, embeddings, strict=True):
        last = model(torch.tensor([own])).last_hidden_state[0, -1]
        assert relative(embedding, last @ text.proj.weight.T + text.proj.bias) < 5e-6


@pytest.mark.parametrize(("width", "left"), [(7, 0), (64, 0), (300, 0), (64, 57), (64, 20), (300, 293)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_padding_and_neighbours_change_no_embedding(kind, width, left):
    text = tower(kind)
    alone = torch.cat([text(torch.tensor([own])) for own in TEXTS])
    torch.testing.assert_close(text(padded(TEXTS, width, left)), alone, rtol=1e-5, atol=1e-5)
    long = tokens(5, width, 90)
    together = text(torch.cat([long, padded(TEXTS, width, left)]))
    torch.testing.assert_close(together[5:], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_an_empty_text_is_one_padding_token(kind):
    text = tower(kind)
    empty = text(torch.full((2, 30), PAD))
    torch.testing.assert_close(empty[:1], text(torch.full((1, 1), PAD)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="must have at least one token"):
        text(torch.zeros(2, 0, dtype=torch.long))


def test_left_align_moves_every_text_to_the_front():
    moved, last = left_align(torch.tensor([[0, 0, 4, 0, 5, 0], [6, 7, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]), 0)
    assert moved[0].tolist() == [4, 0, 5]
    assert moved[1, :2].tolist() == [6, 7]
    assert last.tolist() == [2, 1, 0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_traced_tower_gives_the_same_embeddings_at_the_padded_length(untyped, kind):
    text = tower(kind)
    compiled = torch.compile(text, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(padded(TEXTS, 12, 2)), text(padded(TEXTS, 12, 2)), rtol=1e-5, atol=1e-5)


def test_grad_checkpointing_changes_no_gradient():
    text = tower("mamba").double()

    def gradients(enable):
        text.set_grad_checkpointing(enable)
        text.zero_grad()
        text(padded(TEXTS, 9)).square().sum().backward()
        return [p.grad.clone() for p in text.parameters()]

    for plain, checkpointed in zip(gradients(False), gradients(True), strict=True):
        torch.testing.assert_close(plain, checkpointed, rtol=1e-9, atol=1e-12)


def test_locking_freezes_the_language_model_and_not_the_projection():
    text = tower("mamba")

    def learning():
        text.zero_grad()
        text(padded(TEXTS, 9)).square().sum().backward()
        return {name for name, p in text.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}

    projection = {"proj.weight", "proj.bias"}
    text.lock()
    assert learning() == projection
    text.lock(unlocked_layers=1)
    of_last = {name for name, _ in text.named_parameters() if name.startswith("transformer.layers.1.")}
    assert learning() == projection | of_last | {"transformer.norm_f.weight"}
    text.lock(freeze_layer_norm=False)
    norms = {name for name, _ in text.named_parameters() if "norm" in name}
    assert len(norms) == 3
    assert learning() == projection | norms


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_stays_near_float32(kind):
    text = tower(kind)
    with torch.no_grad():
        truth = text(padded(TEXTS, 9))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert relative(text(padded(TEXTS, 9)), truth) < 3e-2
        assert relative(text.bfloat16()(padded(TEXTS, 9)), truth) < 6e-2
