"""Weights of any dimensions become the model they came from: configurations drawn at random, told nothing but weights.

What is read is compared by what it computes with the model that was built from the configuration.
"""

import argparse
import random
import re

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import ssmclip
from ssmclip.models import create_clip
from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.published.text import clip_text_fields

RATIOS = (0.5, 1 / 3, 1.0, 1.1, 1.5, 2.0, 2.7, 8 / 3, 3.0, 4.0)


def stages(rng, multiple=2):
    count = rng.randint(1, 4)
    return dict(
        depths=tuple(rng.choice((1, 1, 2, 3, 11)) if i == 0 else 1 for i in range(count)),
        dims=tuple(multiple * rng.randint(2, 40 // multiple) for _ in range(count)),
    )


def random_vmamba(rng):
    mixer = rng.choice(("ss2d", "ss2d", "ss2d", "gated_conv"))
    fields = dict(
        stages(rng),
        mixer=mixer,
        ssm_ratio=rng.choice(RATIOS),
        gated=rng.random() < 0.5,
        conv_bias=rng.random() < 0.5,
        mlp_ratio=rng.choice((0.0, *RATIOS)),
        patch_embed=rng.choice(("v1", "v2")),
        downsample=rng.choice(("v1", "v3")),
    )
    if mixer == "ss2d":
        fields |= dict(d_state=rng.randint(1, 19), dt_rank=rng.choice((None, None, 1, 3, 7)))
    return fields


def random_simba(rng):
    fields = stages(rng, 4)
    return fields | dict(
        mlp_ratios=tuple(rng.choice((0.7, 1, 1.5, 2.5, 4, 8)) for _ in fields["dims"]),
        stem_dim=rng.randint(1, 9),
        d_state=rng.randint(1, 70),
        d_conv=rng.randint(2, 6),
        expand=rng.randint(1, 3),
        channel_mixer=rng.choice(("mlp", "einfft")),
    )


def random_mambaout(rng):
    depths = tuple(rng.randint(1, 2) for _ in range(rng.randint(2, 4)))
    return dict(
        depths=depths,
        dims=tuple(rng.sample(range(4, 30), len(depths))),  # all of one width would not tell `downsample`
        expansion_ratio=rng.choice((1.5, 2.0, 8 / 3, 3.0)),
        conv_ratio=rng.choice((0.5, 1.0, 1.25)),
        kernel_size=rng.choice((3, 5, 7)),
        stem_mid_norm=rng.random() < 0.5,
        ls_init_value=rng.choice((None, 1e-6)),
        downsample=rng.choice(("conv", "conv_nf")),
    )


def random_language_model(rng):
    kind, expand = rng.choice(("mamba", "mamba2")), rng.randint(1, 3)
    fields = dict(
        model_type=kind,
        vocab_size=rng.randint(2, 200),
        hidden_size=4 * rng.randint(1, 20),
        num_hidden_layers=rng.choice((1, 2, 11)),
        state_size=rng.randint(1, 20),
        expand=expand,
        conv_kernel=rng.randint(1, 5),
        use_bias=rng.random() < 0.5,
        use_conv_bias=rng.random() < 0.5,
    )
    if kind == "mamba":
        return fields | dict(time_step_rank=rng.choice(("auto", 1, 5)))
    inner = expand * fields["hidden_size"]
    heads = rng.choice([n for n in range(1, inner + 1) if inner % n == 0])
    groups = rng.choice([n for n in range(1, heads + 1) if heads % n == 0])
    return fields | dict(num_heads=heads, head_dim=inner // heads, n_groups=groups)


FAMILIES = {"vmamba": random_vmamba, "simba": random_simba, "mambaout_femto": random_mambaout}


def perturbed(model, rng):
    """In evaluation mode, with every weight and statistic away from its initial value."""
    generator = torch.Generator().manual_seed(rng.randint(0, 2**31))
    with torch.no_grad():
        for value in model.state_dict().values():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand(value.shape, generator=generator))
    return model.eval()


def wrap(state, rng):
    """As some training script would have saved it."""
    prefix = rng.choice(("", "module."))
    state = {prefix + key: value for key, value in state.items()}
    key = rng.choice((None, "model", "state_dict", "model_ema"))
    return {key: state, "epoch": 3} if key else state


def single_file(state):
    """VMamba's single-file layout: what the four directions have is one matrix."""
    return {
        key.replace("x_proj_weight", "x_proj.weight").replace("dt_projs_weight", "dt_projs.weight"): value.flatten(0, 1)
        if key.endswith(("x_proj_weight", "dt_projs_weight"))
        else value
        for key, value in state.items()
    }


MAMBAOUT = [
    (r"^stem\.", "downsample_layers.0."),
    (r"^stages\.(\d+)\.blocks\.", r"stages.\1."),
    (r"^stages\.(\d+)\.downsample\.", r"downsample_layers.\1."),
    (r"^head\.norm\.", "norm."),
    (r"^head\.fc\.", "head.fc2."),
    (r"^head\.pre_logits\.fc\.", "head.fc1."),
    (r"^head\.pre_logits\.norm\.", "head.norm."),
]


def original_mambaout(state):
    """The names of MambaOut's authors, of which timm's are a translation."""
    renamed = {}
    for key, value in state.items():
        old, new = next(((old, new) for old, new in MAMBAOUT if re.match(old, key)), ("", ""))
        renamed[re.sub(old, new, key, count=1)] = value
    return renamed


OTHER_LAYOUTS = {"vmamba": single_file, "mambaout_femto": original_mambaout}


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_an_encoder_is_read_back(family, seed):
    rng = random.Random(f"{family} {seed}")
    fields = FAMILIES[family](rng) | dict(num_classes=rng.choice((0, 1, 7)), in_chans=rng.choice((3, 3, 1, 5)))
    model = perturbed(timm.create_model(family, **fields), rng)
    state = model.state_dict()
    if seed % 2 and family in OTHER_LAYOUTS:
        state = OTHER_LAYOUTS[family](state)
    read = ssmclip.load_published(wrap(state, rng))
    image = torch.randn(2, fields["in_chans"], rng.randint(33, 50), rng.randint(33, 50))
    assert torch.equal(read(image), model(image)), fields


@pytest.mark.parametrize("seed", range(10))
@torch.no_grad()
def test_a_language_model_is_read_back(seed):
    rng = random.Random(seed)
    fields = random_language_model(rng)
    model = perturbed(LanguageModel(read_config(fields)), rng)
    tokens = torch.randint(0, fields["vocab_size"], (2, rng.randint(1, 20)))
    read = ssmclip.load_published(wrap(model.state_dict(), rng), n_groups=fields.get("n_groups", 1))
    assert torch.equal(read(tokens), model(tokens)), fields


def random_clip(rng, config, family):
    """The configuration of a CLIP of CLIP-Mamba's kind, and what its shapes cannot tell."""
    fields = FAMILIES[family](rng)
    heads = rng.randint(1, 5)
    width = heads * rng.choice((4, 16, 16, 64))
    config["model_cfg"] = dict(
        embed_dim=rng.randint(3, 70),
        quick_gelu=True,
        vision_cfg={**config["model_cfg"]["vision_cfg"], "timm_model_name": name_with_fields(family, fields)},
        text_cfg=dict(
            context_length=rng.randint(1, 90),
            vocab_size=rng.randint(2, 300),
            width=width,
            heads=heads,
            layers=rng.choice((1, 2, 11)),
            mlp_ratio=rng.choice((0.5, 1, 2.5, 4)),
        ),
    )
    return config


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("family", ["vmamba", "simba"])
@torch.no_grad()
def test_a_training_checkpoint_is_read_back_in_all_its_weights(tiny_config, tmp_path, family, seed):
    rng = random.Random(f"{family} {seed}")
    config = random_clip(rng, tiny_config, family)
    online = perturbed(create_clip(config), rng)
    averaged = perturbed(create_clip(config), rng)
    state = {}
    for model, mark in ((online, ""), (averaged, "_e")):
        for key, value in model.state_dict().items():
            if key == "logit_scale":  # has no average
                state |= {} if mark else {"module.logit_scale": value}
                continue
            if key == "visual.head.proj.weight":
                key, value = "image_projection", value.T
            first, dot, rest = key.replace("visual.trunk.", "visual.").partition(".")
            state[f"module.{first}{mark}{dot}{rest}"] = value
    held = {
        "epoch": seed,
        "state_dict": state,
        "optimizer": {"param_groups": [{"lr": np.float64(1e-3), "params": [0]}], "state": {}},
        "scaler": {"scale": 65536.0},
        "best_acc": np.float64(1.5),
        "args": argparse.Namespace(model="CLIP_Simba_L", lr=1e-3, betas=(0.9, 0.98)),
    }
    torch.save(held, tmp_path / "checkpoint.pt")
    text_cfg = config["model_cfg"]["text_cfg"]
    bare = {key.removeprefix("module."): value for key, value in state.items()}
    told = {} if clip_text_fields(bare)["heads"] == text_cfg["heads"] else {"text_heads": text_cfg["heads"]}
    image = torch.randn(2, 3, rng.randint(33, 50), rng.randint(33, 50))
    text = torch.randint(0, text_cfg["vocab_size"], (3, text_cfg["context_length"]))
    for weights, truth in (("online", online), ("ema", averaged), ("ema_online_bn", averaged)):
        if weights == "ema_online_bn":
            for module, other in zip(averaged.modules(), online.modules(), strict=True):
                if isinstance(module, torch.nn.BatchNorm2d):
                    module.load_state_dict(module.state_dict() | dict(other.named_buffers()))
        read = ssmclip.load_published(tmp_path / "checkpoint.pt", weights, **told)
        assert torch.equal(read.encode_image(image), truth.encode_image(image)), config
        assert torch.equal(read.encode_text(text), truth.encode_text(text)), config
        assert read.logit_scale == online.logit_scale


CLIMP = {
    "visual.trunk.": "vision_encoder.",
    "visual.head.proj.": "vision_projection.",
    "text.transformer.": "text_encoder.",
    "text.proj.": "text_projection.",
}


@pytest.mark.parametrize("seed", range(6))
@torch.no_grad()
def test_a_climp_is_read_back(tiny_config, tmp_path, seed):
    rng = random.Random(seed)
    mamba = random_language_model(rng)
    vision = {**tiny_config["model_cfg"]["vision_cfg"], "timm_proj_bias": rng.random() < 0.5}
    vision["timm_model_name"] = name_with_fields("vmamba", random_vmamba(rng))
    tiny_config["model_cfg"] = dict(
        embed_dim=rng.randint(3, 70), vision_cfg=vision, text_cfg=dict(mamba=mamba, proj_bias=rng.random() < 0.5)
    )
    model = perturbed(create_clip(tiny_config), rng)
    state = {}
    for key, value in model.state_dict().items():
        own = next((own for own in CLIMP if key.startswith(own)), "")
        state[CLIMP.get(own, "") + key.removeprefix(own)] = value.contiguous()
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    image = torch.randn(2, 3, rng.randint(33, 50), rng.randint(33, 50))
    text = torch.randint(1, mamba["vocab_size"], (3, rng.randint(1, 20)))
    groups = mamba.get("n_groups", 1)
    ssmclip.convert(tmp_path, tmp_path / "folder", n_groups=groups)
    for read in (ssmclip.load_published(tmp_path, n_groups=groups), ssmclip.load(tmp_path / "folder").model):
        assert torch.equal(read.encode_image(image), model.encode_image(image)), tiny_config
        assert torch.equal(read.encode_text(text), model.encode_text(text)), tiny_config
