"""Counted multiply-accumulates against published tables, PyTorch's own counter, and counts by hand."""

import math

import open_clip
import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import ssmclip
from ssmclip.analyze.cost.macs import count_macs, long_sequence, sequence_criterion, transformer_macs
from ssmclip.models.networks.mamba import Mamba, Mamba2
from ssmclip.models.networks.vmamba import SS2D
from ssmclip.registry import UnknownName

# GMACs at 224 px. VMamba, SiMBA: the original code's own count; MambaOut, Swin, ConvNeXt: timm's results tables.
PUBLISHED = {
    "vmamba_tiny_gated": 5.05,
    "vmamba_small_s2l15": 8.72,
    "vmamba_base_s2l15": 15.36,
    "simba_small": 6.84,
    "simba_large": 20.14,
    "mambaout_femto": 1.16,
    "mambaout_base": 15.83,
    "swin_tiny_patch4_window7_224": 4.51,
    "convnext_tiny": 4.47,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_totals_are_the_published_ones(name):
    assert count_macs(name).total / 1e9 == pytest.approx(PUBLISHED[name], abs=0.00501)


def test_climps_ratio_at_896_pixels():
    """Equation 6 of MambaOut for ViT-B/16 against VMamba-B: the 1.8 times fewer FLOPs of CLIMP's abstract."""
    attention, scan = transformer_macs(768, 12, 56 * 56), count_macs("vmamba_base_s2l15", 896).total
    assert attention / 1e9 == pytest.approx(447.6, abs=0.05)
    assert attention / scan == pytest.approx(1.82, abs=0.005)
    assert scan == pytest.approx(16 * count_macs("vmamba_base_s2l15").total, rel=1e-3)  # the head does not grow


def test_a_vit_is_equation_6_and_what_it_leaves_out():
    count = count_macs("vit_base_patch16_224", 896)
    tokens = 56 * 56
    assert count.image.matmul == transformer_macs(768, 12, tokens + 1) + tokens * 768 * 3 * 16 * 16 + 768 * 1000
    assert count.parts["attention"] == 12 * 2 * 768 * (tokens + 1) ** 2
    assert count.parts["norm"] == 5 * 25 * 768 * (tokens + 1)  # two a block, one at the end


@pytest.mark.parametrize("name", ["test_vmamba", "test_simba", "test_vit", "test_mambaout", "test_convnext"])
@torch.no_grad()
def test_products_are_those_of_pytorchs_counter(name):
    """PyTorch's counts the real computation, at a size that is not square."""
    model = timm.create_model(name, **({"img_size": (64, 96)} if name == "test_vit" else {})).eval()
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(torch.randn(1, 3, 64, 96))
    ours = count_macs(model, (64, 96)).image
    # SiMBA's short convolutions, 4 taps, are sums to PyTorch: channels of each stage times positions, the class's last.
    shifted = 4 * (32 * 384 + 32 * 96 + 64 * 24 + 64 * 6 + 64) if name == "test_simba" else 0
    # VMamba's projections to delta are part of its scan: 4 directions, positions, inner channels, rank of each stage.
    projected = 4 * (384 * 32 + 96 * 32 + 24 * 64 * 2 + 6 * 64 * 2) if name == "test_vmamba" else 0
    assert 2 * (ours.matmul - shifted - projected) == counter.get_total_flops()


@pytest.mark.parametrize("readout", ["mean", "first", "last"])
@torch.no_grad()
def test_causal_attention_is_half_of_what_pytorchs_counter_counts(readout):
    """PyTorch's counts all pairs of tokens, whatever it is told of a mask."""
    fields = dict(img_size=64, embed_dim=48, depth=2, readout=readout)
    full, causal = (timm.create_model("vit_nano_patch16", mixing=mixing, **fields) for mixing in ("full", "causal"))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        causal.eval()(torch.randn(1, 3, 64, 64))
    ours, all_pairs = count_macs(causal, 64).image, count_macs(full, 64).image
    assert ours.attention == 2 * 48 * (16 + 1) ** 2
    assert 2 * (ours.matmul + ours.attention) == counter.get_total_flops() == 2 * all_pairs.matmul
    assert (ours.linear, ours.conv, ours.norm) == (all_pairs.linear, all_pairs.conv, all_pairs.norm)
    causal.blocks[0].attn.fused_attn = False
    assert count_macs(causal, 64).image == ours
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in causal.modules())


def test_a_causal_vit_b_by_the_formulas():
    """L = 197, D = 768: (24 D^2 L + 4 D L^2) / 2 for each of 12 blocks, causal 2 D L^2; patches 3 * 16^2 D N."""
    blocks, patches, head = 12 * (12 * 768**2 * 197 + 2 * 768 * 197**2), 768 * 196 * 768, 768 * 1000
    full, causal = (count_macs(f'vit_base_patch16.mixing="{mixing}"').image for mixing in ("full", "causal"))
    assert (blocks + patches) / 1e9 == pytest.approx(17.56, abs=0.01)
    assert full.matmul == blocks + patches + head
    assert full.matmul - causal.matmul == 12 * 2 * 768 * 197**2 // 2
    assert causal.matmul == transformer_macs(768, 12, 197, causal=True) + patches + head
    assert full == count_macs("deit_base_patch16_224").image


@torch.no_grad()
def test_text_towers_are_counted_at_their_length(tiny_clip):
    model, _, tokenizer = tiny_clip
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.encode_text(tokenizer(["a dog"]))
    count = count_macs(model, 32, text_length=77)
    assert 2 * count.text.matmul == counter.get_total_flops()
    assert count.total == count.image.total + count.text.total
    assert count_macs(model, 32).text.total == 0
    assert count.parts["attention"] == 2 * 16 * 77**2


@torch.no_grad()
def test_open_clips_resnets_are_counted():
    """Their attention pool is made for one number of pixels."""
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("RN50")).eval()
        images = torch.empty(1, 3, 224, 224)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model.encode_image(images)
    assert 2 * count_macs("open_clip:RN50", 224).image.matmul == counter.get_total_flops()
    assert count_macs("open_clip:RN50", 288).image_parameters - sum(p.numel() for p in model.visual.parameters()) == (
        2048 * (9 * 9 - 7 * 7)  # positions of the pool
    )


def test_texts_are_not_made_for_a_model_that_does_not_say_its_tokens():
    text = {"context_length": 7, "vocab_size": 100, "width": 16, "heads": 2, "layers": 1}
    vision = {"image_size": 32, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8}
    model = open_clip.CoCa(
        embed_dim=16,
        multimodal_cfg=text,
        text_cfg={**text, "embed_cls": True, "output_tokens": True},
        vision_cfg={**vision, "attentional_pool": True, "output_tokens": True},
    )
    with pytest.raises(ValueError, match=r"CoCa has no vocab_size.*leave text_length out"):
        count_macs(model, 32, text_length=7)
    assert count_macs(model, 32).text_parameters > 0


def test_a_mamba_block_by_hand():
    dim, inner, state, rank, taps, length = 16, 32, 4, 3, 4, 29

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Mamba(dim, d_state=state, dt_rank=rank, d_conv=taps)

        def forward(self, images):
            return self.block(images.new_empty(1, length, dim))

    parts = count_macs(Reader(), 8).parts
    linear = length * (dim * 2 * inner + inner * (rank + 2 * state) + rank * inner + inner * dim)
    scan = length * inner * (9 * state + 1 + 1)  # D and the gate
    assert parts == {"linear": linear, "conv": length * inner * taps, "attention": 0, "scan": scan, "norm": 0}


def test_a_block_of_mamba_2_by_hand():
    dim, inner, state, heads, taps, length = 16, 32, 8, 4, 4, 29

    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = Mamba2(dim, d_state=state, head_dim=inner // heads, d_conv=taps)

        def forward(self, images):
            return self.block(images.new_empty(1, length, dim))

    parts, mixed = count_macs(Reader().bfloat16(), 8).parts, inner + 2 * state
    linear = length * (dim * (inner + mixed + heads) + inner * dim)
    scan = length * inner * (9 * state + 1)
    assert parts == {"linear": linear, "conv": length * mixed * taps, "attention": 0, "scan": scan, "norm": 0}


@pytest.mark.parametrize("directions", [4, 2, 1])
def test_a_cross_scan_by_hand(directions):
    dim, inner, state, height, width = 16, 32, 2, 5, 7
    rank = 1

    class Map(nn.Module):
        def __init__(self):
            super().__init__()
            self.op = SS2D(dim, d_state=state, directions=directions)

        def forward(self, images):
            return self.op(images.new_empty(1, height, width, dim))

    parts, places = count_macs(Map(), 8).parts, height * width
    linear = places * (2 * dim * inner + directions * inner * (rank + 2 * state) + directions * rank * inner)
    assert parts == {
        "linear": linear,
        "conv": places * inner * 9,
        "attention": 0,
        "scan": directions * places * inner * (9 * state + 1),
        "norm": 5 * places * inner,
    }


def test_a_module_is_left_as_it_is():
    model = timm.create_model("test_vit")
    before = {name: x.clone() for name, x in model.state_dict().items()}
    whole = count_macs(model, 320)
    assert model.training
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert whole.parameters == sum(p.numel() for p in timm.create_model("test_vit", img_size=320).parameters())


def test_any_clip_is_counted_without_its_memory():
    count = ssmclip.count_macs("CLIMP-Mamba1", 1024, text_length=256)
    assert count.text.linear == 256 * 48 * (2048 * 8192 + 4096 * (128 + 32) + 128 * 4096 + 4096 * 2048) + 2048 * 768
    assert count.text.scan == 256 * 48 * 4096 * (9 * 16 + 2)
    openai = count_macs("open_clip:ViT-B-32", 224, text_length=77)
    assert openai.text.matmul == transformer_macs(512, 12, 77) + 512 * 512
    assert openai.parameters == 151_277_313


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (("vmamba_bse_s2l15",), UnknownName, "vmamba_base_s2l15"),
        (("open_clip:RN50", (224, 448)), ValueError, "open_clip:RN50 .* 224 x 448: take a square size"),
        (("vit_base_patch16_224", 225), ValueError, "multiple of the patch, 16 .*: try 224, 240"),
        (("test_vmamba", 0), ValueError, "above 0"),
        (("test_vmamba", (64, -64)), ValueError, "height, width"),
    ],
)
def test_bad_input_is_named(arguments, error, says):
    with pytest.raises(error, match=says):
        count_macs(*arguments)


def test_bad_lengths_are_named(tiny_clip):
    with pytest.raises(ValueError, match=r"text_length must be at least 1 token \(got 0\)"):
        count_macs(tiny_clip[0], 32, text_length=0)
    with pytest.raises(ValueError, match="cannot take an input of 100 tokens"):
        count_macs(tiny_clip[0], 32, text_length=100)
    with pytest.raises(ValueError, match="reads no text"):
        count_macs("test_vmamba", 32, text_length=77)


def test_mambaouts_criterion():
    """Thresholds and sides worked out by hand from r = L / (6 D)."""
    for name, patch, threshold, side in [
        ("vit_small_patch16_224", 16, 2304, 768),
        ("vit_base_patch16_224", 16, 4608, 1086),
        ("vit_base_patch32_224", 32, 4608, 2172),
        ("vit_large_patch14_224", 14, 6144, 1097),
    ]:
        (tower,) = sequence_criterion(name, 56 * patch)
        assert (tower["threshold"], round(tower["side"])) == (threshold, side)
        assert tower["ratio"] == pytest.approx(56 * 56 / threshold)
    (tower,) = sequence_criterion('vit_base_patch16.mixing="causal"', 896)
    assert (tower["causal"], tower["threshold"], round(tower["side"])) == (True, 9216, 1536)  # 96 x 96 patches
    assert tower["ratio"] == pytest.approx(56 * 56 / 9216)
    assert [one["threshold"] for one in sequence_criterion("vit_base_patch16", 896)] == [4608]
    image, text = sequence_criterion("CLIP-ViT-B-16", 896)
    assert (image["ratio"], text["threshold"], text["causal"]) == (pytest.approx(0.6806, abs=1e-4), 6144, True)
    assert sequence_criterion("open_clip:ViT-L-14", 224)[0]["threshold"] == 6144
    for name in ("vmamba_tiny_s1l8", "vit_small_r26_s32_224", "swin_tiny_patch4_window7_224"):
        assert sequence_criterion(name) == []
    # At the threshold the two halves of equation 6 are equal.
    assert transformer_macs(768, 1, 4608) == 2 * (24 * 768**2 * 4608 // 2)
    assert long_sequence(768, 9216, causal=True) == 1
    assert math.isclose(transformer_macs(512, 12, 77, causal=True), 12 * (12 * 512**2 * 77 + 512 * 77**2))
