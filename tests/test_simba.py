"""SiMBA's parts against other people's Mamba, a Fourier transform by matrices, and counts of the original code."""

import math

import mambapy.mamba
import pytest
import timm
import torch
from torch import nn

from ssmclip import ops
from ssmclip.models import create_clip
from ssmclip.models.networks.mamba import Mamba
from ssmclip.models.networks.simba import EinFFT, SiMBA

TINY_FIELDS = dict(
    dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), mlp_ratios=(2, 2, 2, 2), stem_dim=4, d_state=4, num_classes=5
)
# Counted by running the original code: the tower, the tower with a head of 1000 classes, the CLIP.
PUBLISHED_PARAMETERS = {
    "simba_small": (25_693_088, 26_142_088, "CLIP-SiMBA-S", 89_350_561),
    "simba_base": (39_183_744, 39_696_744, "CLIP-SiMBA-B", 102_873_985),
    "simba_large": (65_736_512, 66_249_512, "CLIP-SiMBA-L", 129_426_753),
}


def parameters(model):
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED_PARAMETERS)
def test_parameter_counts_are_those_of_the_original(name):
    tower, with_head, clip_name, clip = PUBLISHED_PARAMETERS[name]
    with torch.device("meta"):
        assert parameters(timm.create_model(name, num_classes=0)) == tower
        assert parameters(timm.create_model(name)) == with_head
        model = create_clip(clip_name)
        assert parameters(model) == clip
        assert parameters(model.visual.trunk) == tower


def test_parameter_count_with_einfft_is_that_of_the_original():
    """The original was counted with an auxiliary head of 1000 classes beside the head."""
    with torch.device("meta"):
        assert parameters(timm.create_model("simba_large", channel_mixer="einfft", aux_head=True)) == 36_641_264
        assert parameters(timm.create_model("simba_large", aux_head=True)) == 66_762_512


@torch.no_grad()
def test_the_second_head_adds_half_of_its_largest_logits_over_the_map():
    torch.manual_seed(0)
    model = SiMBA(**TINY_FIELDS, aux_head=True).double().eval()
    image = torch.randn(2, 3, 70, 40, dtype=torch.float64)
    features = model.forward_features(image)
    truth = model.head(model.forward_head(features, pre_logits=True))
    for row, own in zip(truth, features.flatten(1, 2), strict=True):
        normed = (own - own.mean(1, keepdim=True)) / (own.var(1, keepdim=True, correction=0) + 1e-6).sqrt()
        at_positions = (normed * model.norm4.weight + model.norm4.bias) @ model.aux_head.weight.T + model.aux_head.bias
        row += torch.stack([logits.max() for logits in at_positions.T]) / 2
    torch.testing.assert_close(model(image), truth, rtol=1e-9, atol=1e-12)
    model.reset_classifier(3)
    model.double()
    assert not any("aux" in key for key in model.state_dict())
    torch.testing.assert_close(model(image), model.head(model.forward_head(features, pre_logits=True)))


@pytest.mark.parametrize("length", [1, 3, 29])
@torch.no_grad()
def test_mamba_equals_mambapy(length):
    torch.manual_seed(0)
    theirs = mambapy.mamba.MambaBlock(mambapy.mamba.MambaConfig(d_model=24, n_layers=1, d_state=8, pscan=False))
    ours = Mamba(24, d_state=8)
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(2, length, 24, dtype=torch.float64)
    # mambapy rounds A to float32 whatever the input.
    torch.testing.assert_close(ours.double()(x), theirs.double()(x), rtol=1e-6, atol=1e-8)


@torch.no_grad()
def test_einfft_equals_transforms_by_matrices():
    """Real and imaginary parts by hand: cosine and sine matrices over positions and over blocks."""
    torch.manual_seed(0)
    op = EinFFT(8).double()
    for p in op.parameters():
        p.mul_(30)  # so that the shrinking neither kills nor keeps everything
    x = torch.randn(2, 3, 5, 8, dtype=torch.float64)

    def transform(real, imag, sign):
        for axis, n in ((1, 15), (2, 4)):
            turns = torch.arange(n, dtype=torch.float64)
            angle = 2 * math.pi * sign * torch.outer(turns, turns) / n
            cos, sin = angle.cos() / n**0.5, angle.sin() / n**0.5

            def along(matrix, value, axis=axis):
                return torch.tensordot(matrix, value, dims=([1], [axis])).movedim(0, axis)

            real, imag = along(cos, real) - along(sin, imag), along(sin, real) + along(cos, imag)
        return real, imag

    def linear(real, imag, weight, bias):
        def product(value, w):
            return (value[..., None] * w).sum(-2)

        return (
            product(real, weight[0]) - product(imag, weight[1]) + bias[0],
            product(real, weight[1]) + product(imag, weight[0]) + bias[1],
        )

    parts = transform(x.reshape(2, 15, 4, 2), torch.zeros(2, 15, 4, 2, dtype=torch.float64), -1)
    parts = [part.clamp(min=0) for part in linear(*parts, op.complex_weight_1, op.complex_bias_1)]
    parts = linear(*parts, op.complex_weight_2, op.complex_bias_2)
    parts = [part.sign() * (part.abs() - 0.01).clamp(min=0) for part in parts]
    truth = transform(*parts, 1)[0].reshape(2, 3, 5, 8)
    torch.testing.assert_close(op(x), truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("channel_mixer", ["mlp", "einfft"])
@pytest.mark.parametrize("size", [(32, 64), (45, 27), (1, 9)])
@torch.no_grad()
def test_back_ends_agree_in_float64_at_any_size(size, channel_mixer):
    model = SiMBA(**TINY_FIELDS, channel_mixer=channel_mixer).double().eval()
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    fast = model(image)
    with ops.using("reference"):
        torch.testing.assert_close(fast, model(image), rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_the_class_block_sees_the_mean_of_the_last_map_alone():
    """A map of one position has no neighbours: the block is then a gated MLP, written out here."""
    torch.manual_seed(0)
    model = SiMBA(**TINY_FIELDS).double().eval()
    features = torch.randn(2, 3, 4, 32, dtype=torch.float64)
    block, mamba = model.post_network[0], model.post_network[0].attn.mamba
    x = features.mean(dim=(1, 2))
    u, z = mamba.in_proj(block.attn.norm(x)).chunk(2, -1)
    u = nn.functional.silu(u * mamba.conv1d.weight[:, 0, -1] + mamba.conv1d.bias)
    dt, B, C = mamba.x_proj(u).split([2, 4, 4], -1)
    y = u * (nn.functional.softplus(mamba.dt_proj(dt)) * (B * C).sum(-1, keepdim=True) + mamba.D)
    x = x + mamba.out_proj(y * nn.functional.silu(z))
    x = model.norm4(x + block.mlp.fc2(nn.functional.gelu(block.mlp.fc1(block.norm2(x)))))
    torch.testing.assert_close(model.forward_head(features, pre_logits=True), x, rtol=1e-9, atol=1e-12)


@torch.no_grad()
def test_features_only_gives_what_the_blocks_gave():
    model = timm.create_model("test_simba").eval()
    extractor = timm.create_model("test_simba", features_only=True).eval()
    missing, unexpected = extractor.model.load_state_dict(model.state_dict(), strict=False)
    assert not missing
    assert {key.split(".")[0] for key in unexpected} == {"post_network", "norm4", "head"}
    seen = []
    for i in range(1, 5):
        model.get_submodule(f"block{i}")[-1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    image = torch.randn(1, 3, 52, 37)
    model(image)
    maps = extractor(image)
    assert extractor.feature_info.channels() == [m.shape[1] for m in maps]
    for ours, truth in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, truth.permute(0, 3, 1, 2))
    short = timm.create_model("test_simba", features_only=True, out_indices=(1,)).eval()
    short.model.load_state_dict(model.state_dict(), strict=False)
    torch.testing.assert_close(short(image)[0], maps[1])


def test_delta_starts_in_mambas_range():
    model = timm.create_model("test_simba")
    steps = torch.cat(
        [nn.functional.softplus(m.dt_proj.bias.detach()) for m in model.modules() if isinstance(m, Mamba)]
    )
    assert steps.min() >= 1e-3 * 0.999
    assert steps.max() <= 1e-1 * 1.001
    assert steps.log().std() > 1


def test_fields_are_checked():
    with pytest.raises(ValueError, match="same number of stages"):
        timm.create_model("test_simba", depths=(1, 1))
    with pytest.raises(ValueError, match=r"multiple of its 4 blocks \(got 18"):
        timm.create_model("test_simba", channel_mixer="einfft", dims=(18, 16, 32, 32))
    with pytest.raises(ValueError, match="'token'"):
        timm.create_model("test_simba", global_pool="avg")


def test_bfloat16_and_autocast_stay_near_float32():
    torch.manual_seed(0)
    for channel_mixer in ("mlp", "einfft"):
        model = timm.create_model("test_simba", num_classes=0, channel_mixer=channel_mixer).eval()
        image = torch.randn(2, 3, 32, 32)
        with torch.no_grad():
            truth = model(image)
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert (model(image).float() - truth).norm() / truth.norm() < 3e-2
            assert (model.bfloat16()(image.bfloat16()).float() - truth).norm() / truth.norm() < 6e-2
