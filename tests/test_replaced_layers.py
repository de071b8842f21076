"""Layers that other libraries put in place of PyTorch's have their effect: quantisation, LoRA, pruning, hooks."""

import copy
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.nn.utils import prune

from ssmclip.models import create_clip
from ssmclip.models.networks.mamba import Mamba, Mamba2
from ssmclip.models.networks.parts import causal_conv, is_untouched, linear_and_bias
from ssmclip.models.text_towers import TEXT_TOWERS

IMAGE_ENCODERS = {
    "test_vmamba": {},
    "vmamba_nano": {},
    "vmamba": dict(depths=(1, 1), dims=(16, 32), d_state=4, gated=True, conv_bias=True, downsample="v1"),
    "vmamba_tiny_gated_conv": dict(depths=(1, 1), dims=(16, 32)),
    "test_simba": {},
    "simba": dict(depths=(1, 1), dims=(16, 32), mlp_ratios=(2, 2), channel_mixer="einfft"),
    "mambaout_femto_linear_head": dict(depths=(1, 1, 1, 1), dims=(16, 24, 32, 40)),
    "vit_nano_patch16": {},
}
LANGUAGE_MODEL = dict(vocab_size=99, hidden_size=48, num_hidden_layers=2)
TEXT = {
    "bag_of_words": dict(context_length=12, vocab_size=99, width=48, layers=0),
    "mamba": dict(mamba=LANGUAGE_MODEL),
    "mamba2": dict(mamba=LANGUAGE_MODEL | dict(model_type="mamba2", num_heads=4, head_dim=24, n_groups=1)),
}


def quantised(model, kinds=(nn.Linear,)):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch recommends another of its packages
        return torch.ao.quantization.quantize_dynamic(copy.deepcopy(model).eval(), set(kinds), dtype=torch.qint8)


def off(value, truth):
    return ((value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize("name", IMAGE_ENCODERS)
@torch.no_grad()
def test_a_dynamically_quantised_image_encoder_stays_near(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=7, **IMAGE_ENCODERS[name]).eval()
    image = torch.randn(2, 3, 64, 64)
    model8 = quantised(model)
    assert any("quantized" in type(module).__module__ for module in model8.modules())
    assert 0 < off(model8(image), model(image)) < 0.1


# open_clip's own transformer reads a weight's type past its module, which no configuration of ours changes.
@pytest.mark.parametrize("kind", [kind for kind, tower in TEXT_TOWERS.items() if tower.build is not None])
@torch.no_grad()
def test_a_dynamically_quantised_text_tower_stays_near(kind, tiny_config):
    torch.manual_seed(0)
    tiny_config["model_cfg"]["text_cfg"] = TEXT[kind]
    model = create_clip(tiny_config).eval()
    tokens = torch.randint(1, 97, (3, 12))
    assert 0 < off(quantised(model).encode_text(tokens), model.encode_text(tokens)) < 0.1


# ---- LoRA


class LowRank(nn.Module):
    """As peft wraps a layer: another module, with the old one inside, whose `weight` it shows."""

    def __init__(self, base_layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = base_layer
        self.A = nn.Parameter(torch.randn(rank, base_layer.in_features))
        self.B = nn.Parameter(torch.randn(base_layer.out_features, rank))

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + x @ self.A.T @ self.B.T


class LowRankLinear(nn.Linear):
    """As loralib has it: a subclass."""

    def __init__(self, layer: nn.Linear):
        super().__init__(layer.in_features, layer.out_features)
        self.load_state_dict(layer.state_dict())
        self.A, self.B = nn.Parameter(torch.randn(2, self.in_features)), nn.Parameter(torch.randn(self.out_features, 2))

    def forward(self, x):
        return super().forward(x) + x @ self.A.T @ self.B.T


@pytest.mark.parametrize("wrap", [LowRank, LowRankLinear])
def test_a_low_rank_update_of_every_linear_layer_of_mamba_acts_as_if_merged_and_learns(wrap):
    torch.manual_seed(0)
    block, x = Mamba(24).double(), torch.randn(2, 9, 24, dtype=torch.float64)
    plain = block(x)
    merged = copy.deepcopy(block)
    for name in ("in_proj", "x_proj", "dt_proj", "out_proj"):
        if name == "dt_proj" or wrap is LowRank:
            layer = wrap(getattr(block, name)).double()
            setattr(block, name, layer)
            with torch.no_grad():
                getattr(merged, name).weight += layer.B @ layer.A
    y = block(x)
    torch.testing.assert_close(y, merged(x), rtol=1e-9, atol=1e-9)
    assert off(y, plain) > 1e-4
    y.sum().backward()
    assert block.dt_proj.A.grad.abs().sum() > 0


# ---- other ways to change a layer


@pytest.mark.parametrize("block", [Mamba(24), Mamba2(24, head_dim=8)], ids=["mamba", "mamba2"])
def test_a_replaced_convolution_has_its_effect(block):
    class Doubled(nn.Conv1d):
        def forward(self, x):
            return 2 * super().forward(x)

    torch.manual_seed(0)
    block, x = block.double(), torch.randn(2, 9, 24, dtype=torch.float64)
    by_hand = copy.deepcopy(block)
    with torch.no_grad():
        by_hand.conv1d.weight *= 2
        by_hand.conv1d.bias *= 2
    conv = block.conv1d
    other = Doubled(conv.in_channels, conv.out_channels, conv.kernel_size, groups=conv.groups).double()
    other.load_state_dict(conv.state_dict())
    block.conv1d = other
    torch.testing.assert_close(block(x), by_hand(x), rtol=1e-12, atol=1e-12)


def test_pruning_a_layer_has_its_effect():
    torch.manual_seed(0)
    block, x = Mamba(24).double(), torch.randn(1, 5, 24, dtype=torch.float64)
    zeroed = copy.deepcopy(block)
    with torch.no_grad():
        zeroed.dt_proj.weight.zero_()
        zeroed.conv1d.weight.zero_()
    for layer in (block.dt_proj, block.conv1d):
        prune.custom_from_mask(layer, "weight", torch.ones_like(layer.weight))
        with torch.no_grad():
            layer.weight_orig.zero_()  # from which the weight is computed before each call
    torch.testing.assert_close(block(x), zeroed(x), rtol=1e-12, atol=1e-12)


def test_a_hook_on_a_layer_is_called():
    block, called = Mamba(24), []
    block.dt_proj.register_forward_hook(lambda *args: called.append("dt_proj"))
    block.conv1d.register_forward_pre_hook(lambda *args: called.append("conv1d"))
    block(torch.randn(1, 5, 24))
    assert called == ["conv1d", "dt_proj"]


def test_an_untouched_layer_gives_its_weights_to_the_operator(monkeypatch):
    """The fast path: neither layer is called."""
    linear, conv = nn.Linear(3, 4), nn.Conv1d(3, 3, 2, groups=3)
    x = torch.randn(2, 5, 3)
    product, bias = linear_and_bias(linear, x)
    assert torch.equal(product, x @ linear.weight.T)
    assert bias is linear.bias
    for layer in (linear, conv):
        assert is_untouched(layer, type(layer))
        monkeypatch.setattr(type(layer), "forward", lambda *args: pytest.fail("the layer was called"))
    causal_conv(conv, x.mT.contiguous(), 2)
    linear_and_bias(linear, x)
    linear.forward = lambda x: x  # as offloading does
    assert not is_untouched(linear, nn.Linear)


@torch.no_grad()
def test_a_norm_without_weights_may_stand_in(tiny_config):
    tiny_config["model_cfg"]["text_cfg"] = TEXT["mamba"]
    model = create_clip(tiny_config).eval()
    model.text.transformer.norm_f = nn.RMSNorm(48, elementwise_affine=False)
    model.text.transformer.layers[0].norm = nn.Identity()
    assert model.encode_text(torch.randint(1, 97, (2, 7))).isfinite().all()
