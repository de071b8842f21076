"""VMamba without its state-space model: the block written out by hand, and SS2D whose scan is made to do nothing."""

import pytest
import timm
import torch

from ssmclip.models import clip_config, create_clip
from ssmclip.models.networks.vmamba import SS2D, GatedConv, VMamba

TINY_FIELDS = dict(dims=(8, 16, 24, 32), depths=(1, 2, 1, 1), num_classes=5)
SCAN = ("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")


def silu(x):
    return x / (1 + torch.exp(-x))


@pytest.mark.parametrize("conv_bias", [False, True])
@torch.no_grad()
def test_gated_conv_equals_the_block_written_out(conv_bias):
    torch.manual_seed(0)
    op = GatedConv(6, ssm_ratio=1.5, conv_bias=conv_bias).double()
    for p in op.parameters():
        p.add_(0.3 * torch.randn_like(p))
    image = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    both = image @ op.in_proj.weight.T
    x, z = both[..., :9], both[..., 9:]
    mixed = torch.zeros_like(x)
    for row in range(4):  # the sum over the neighbours that exist
        for column in range(5):
            for i in range(max(row - 1, 0), min(row + 2, 4)):
                for j in range(max(column - 1, 0), min(column + 2, 5)):
                    mixed[:, row, column] += x[:, i, j] * op.conv2d.weight[:, 0, i - row + 1, j - column + 1]
    if conv_bias:
        mixed += op.conv2d.bias
    mixed = silu(mixed)
    mixed = (mixed - mixed.mean(-1, keepdim=True)) / (mixed.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    truth = ((mixed * op.out_norm.weight + op.out_norm.bias) * silu(z)) @ op.out_proj.weight.T
    torch.testing.assert_close(op(image), truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("size", [(32, 64), (45, 27)])
@torch.no_grad()
def test_a_vmamba_whose_scans_pass_their_input_on_is_the_one_without(size):
    """B = C = 0 and D = 1/4 in each of the four directions: the scan is then the identity."""
    torch.manual_seed(0)
    with_scan = VMamba(**TINY_FIELDS, gated=True).double().eval()
    without = VMamba(**TINY_FIELDS, mixer="gated_conv").double().eval()
    for module in with_scan.modules():
        if isinstance(module, SS2D):
            module.x_proj_weight.zero_()
            module.Ds.fill_(0.25)
    missing, unexpected = without.load_state_dict(with_scan.state_dict(), strict=False)
    assert not missing
    assert len(unexpected) == 5 * len(SCAN)
    assert all(key.endswith(SCAN) for key in unexpected)
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(without(image), with_scan(image), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["vmamba_nano", "vmamba_tiny_s2l5", "vmamba_tiny_v0"])
def test_the_mixer_is_one_field_of_every_version(name):
    fields = dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
    without = timm.create_model(name, mixer="gated_conv", **fields)
    gated = timm.create_model(name, gated=True, **fields)
    scans = sum(getattr(module, key).numel() for module in gated.modules() if isinstance(module, SS2D) for key in SCAN)
    assert sum(p.numel() for p in without.parameters()) + scans == sum(p.numel() for p in gated.parameters())
    without(torch.randn(2, 3, 32, 32)).sum().backward()
    assert all(p.grad is not None for p in without.parameters())


def test_the_clip_without_a_scan_differs_from_the_published_one_by_the_scans_alone():
    names = ("CLIP-VMamba-T220", "CLIP-VMamba-T220-GatedConv")
    one, other = (clip_config(name) for name in names)
    one["model_cfg"]["vision_cfg"]["timm_model_name"] = "vmamba_tiny_gated_conv"
    assert one == other
    with torch.device("meta"):
        published, without = (create_clip(name).state_dict() for name in names)
    shapes = {key: value.shape for key, value in published.items() if not key.endswith(SCAN)}
    assert {key: value.shape for key, value in without.items()} == shapes
