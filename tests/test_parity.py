"""Outputs of the original VMamba, SiMBA and CLIP-Mamba code, kept elsewhere: float64 to 1e-9, float32 to 1e-4."""

import json

import pytest
import torch

from ssmclip.models import build_tokenizer, clip_config, create_clip
from ssmclip.models.networks.mamba import Mamba
from ssmclip.models.networks.simba import EinFFT, SiMBA
from ssmclip.models.networks.vmamba import SS2D, VMamba

VMAMBAS = ["mc_small_v3noz", "mc_t220_v2", "up_s1_v05noz_ln2d", "up_s2_v05noz_ln2d", "up_v0"]
SS2DS = ["mc_v3noz", "mc_v2", "mc_v2_dstate8", "mc_v0", "up_v05noz"]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def relative(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def build_original(config: dict) -> VMamba:
    """A VMamba from the original's own settings."""
    return VMamba(
        depths=config["depths"],
        dims=config["dims"],
        d_state=config["ssm_d_state"],
        ssm_ratio=config["ssm_ratio"],
        gated="noz" not in config["forward_type"],
        conv_bias=config["ssm_conv_bias"],
        mlp_ratio=config["mlp_ratio"],
        patch_embed=config["patchembed_version"],
        downsample=config["downsample_version"],
        num_classes=config["num_classes"],
    )


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", VMAMBAS)
@torch.no_grad()
def test_vmamba_equals_the_original(shared, name, dtype):
    fixture = torch.load(shared / "parity" / f"vmamba_{name}.pt")
    model = build_original(fixture["config"]).eval()
    model.load_state_dict(fixture["state_dict"])
    model.to(dtype)
    for image, output in (("input", "output"), ("input2", "output2")):
        assert relative(model(fixture[image].to(dtype)), fixture[output]) < TOLERANCE[dtype]
    maps = model.forward_intermediates(fixture["input"].to(dtype), intermediates_only=True, output_fmt="NHWC")
    for i, depth in enumerate(fixture["config"]["depths"]):
        truth = fixture["features"].get(f"layers.{i}.blocks.{depth - 1}")
        if truth is None:
            continue
        if truth.shape != maps[i].shape:  # the channels-first versions
            truth = truth.permute(0, 2, 3, 1)
        assert relative(maps[i], truth) < TOLERANCE[dtype], f"stage {i}"


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", SS2DS)
@torch.no_grad()
def test_ss2d_equals_the_original(shared, name, dtype):
    fixture = torch.load(shared / "parity" / "ops.pt")[name]
    state = fixture["state_dict"]
    inner = state["out_norm.weight"].numel()
    dim = state["out_proj.weight"].shape[0]
    op = SS2D(
        dim,
        d_state=state["A_logs"].shape[1],
        ssm_ratio=inner / dim,
        gated=state["in_proj.weight"].shape[0] == 2 * inner,
        conv_bias="conv2d.bias" in state,
    )
    op.load_state_dict(state)
    op.to(dtype)
    assert relative(op(fixture["input_bhwc"].to(dtype)), fixture["output"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", ["mlp", "einfft"])
@torch.no_grad()
def test_simba_equals_the_original(shared, name, dtype):
    fixture = torch.load(shared / "parity" / f"simba_{name}.pt")
    config = fixture["config"]
    model = SiMBA(
        depths=config["depths"],
        dims=config["embed_dims"],
        mlp_ratios=config["mlp_ratios"],
        stem_dim=config["stem_hidden_dim"],
        channel_mixer=config["cm_type"].lower(),
        num_classes=config["num_classes"],
        **config["mamba"],
    ).eval()
    model.load_state_dict(fixture["state_dict"])
    model.to(dtype)
    for image, output in (("input", "output"), ("input2", "output2")):
        assert relative(model(fixture[image].to(dtype)), fixture[output]) < TOLERANCE[dtype]
    maps, normed = (
        model.forward_intermediates(fixture["input"].to(dtype), norm=norm, intermediates_only=True, output_fmt="NHWC")
        for norm in (False, True)
    )
    for i, depth in enumerate(config["depths"]):
        assert relative(maps[i].flatten(1, 2), fixture["features"][f"block{i + 1}.{depth - 1}"]) < TOLERANCE[dtype]
    for i in range(3):
        assert relative(normed[i].flatten(1, 2), fixture["features"][f"norm{i + 1}"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_mamba_block_equals_the_original(shared, dtype):
    fixture = torch.load(shared / "parity" / "ops.pt")["mamba1_block"]
    config = fixture["config"]
    block = Mamba(config["d_model"], d_state=config["d_state"], d_conv=config["d_conv"], expand=config["expand"])
    block.load_state_dict(fixture["state_dict"])
    block.to(dtype)
    assert relative(block(fixture["input_bld"].to(dtype)), fixture["output"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_einfft_equals_the_original(shared, dtype):
    fixture = torch.load(shared / "parity" / "ops.pt")["einfft"]
    op = EinFFT(fixture["config"]["dim"])
    op.load_state_dict(fixture["state_dict"])
    op.to(dtype)
    x = fixture["input_bnc"].unflatten(1, (fixture["config"]["H"], fixture["config"]["W"])).to(dtype)
    assert relative(op(x).flatten(1, 2), fixture["output"]) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@torch.no_grad()
def test_text_tower_equals_the_original(shared, dtype):
    fixture = torch.load(shared / "parity" / "text_clip.pt")
    original = fixture["config"]
    config = clip_config("CLIP-VMamba-S")
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = "test_vmamba"
    config["model_cfg"]["embed_dim"] = original["embed_dim"]
    config["model_cfg"]["text_cfg"] = {
        "context_length": original["context_length"],
        "vocab_size": original["vocab_size"],
        "width": original["transformer_width"],
        "heads": original["transformer_heads"],
        "layers": original["transformer_layers"],
    }
    model = create_clip(config)
    missing, unexpected = model.load_state_dict(fixture["state_dict"], strict=False)
    assert not unexpected
    assert all(key.startswith("visual.") for key in missing)
    model.to(dtype).eval()
    assert relative(model.encode_text(fixture["input"]), fixture["output"]) < TOLERANCE[dtype]


def test_tokenizer_equals_the_original_but_keeps_the_end(shared):
    record = json.loads((shared / "parity" / "tokenizer.json").read_text())
    tokenizer = build_tokenizer(clip_config("CLIP-VMamba-S"))
    texts = record["texts"]
    for ids, original in zip(tokenizer(texts).tolist(), record["ids"], strict=True):
        if 49407 not in original:  # the original cut the end token off
            assert ids[:-1] == original[:-1]
            assert ids[-1] == 49407
        else:
            assert ids == original
