"""Published weights become the right model from nothing but their names and shapes."""

import argparse
import json
import os
import re
import sys
import types
from pathlib import Path, PurePosixPath, PureWindowsPath

import numpy as np
import pytest
import safetensors.torch
import timm
import torch

import ssmclip
from ssmclip.models import CheckpointError, create_clip, load_state
from ssmclip.models.networks import simba, vmamba
from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.published.layout import Hints
from ssmclip.models.published.mambaout import MAMBAOUTS
from ssmclip.models.published.read import build, read_published
from ssmclip.models.published.shapes import common_ratio
from ssmclip.models.published.text import ClipText
from ssmclip.registry import UnknownName

TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4}


def relative(value, truth):
    return ((value.double() - truth.double()).norm() / truth.double().norm()).item()


def perturbed(model, seed=0):
    """The model in evaluation mode with every weight and statistic away from its initial value."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point():
                value.add_(0.2 * torch.rand_like(value))
            assert key
    return model.eval()


# ---- the original code's outputs


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    "name",
    [
        "vmamba_mc_small_v3noz",
        "vmamba_mc_t220_v2",
        "vmamba_up_s1_v05noz_ln2d",
        "vmamba_up_s2_v05noz_ln2d",
        "vmamba_up_v0",
        "simba_mlp",
        "simba_einfft",
    ],
)
@torch.no_grad()
def test_an_encoder_equals_the_original(shared, name, dtype):
    fixture = torch.load(shared / "parity" / f"{name}.pt")
    model = ssmclip.load_published({key: value.to(dtype) for key, value in fixture["state_dict"].items()})
    for image, output in (("input", "output"), ("input2", "output2")):
        assert relative(model(fixture[image].to(dtype)), fixture[output]) < TOLERANCE[dtype]


@pytest.mark.parametrize("name", ["s1", "s2"])
@torch.no_grad()
def test_the_single_file_layout_is_the_same_model(shared, name):
    fixture = torch.load(shared / "parity" / f"vmamba_up_{name}_v05noz_ln2d.pt")
    shapes = fixture["onefile_state_dict_shapes"]
    state = {
        key: fixture["state_dict"][re.sub(r"(x_proj|dt_projs)\.weight", r"\1_weight", key)].reshape(shape)
        for key, shape in shapes.items()
    }
    assert any(key.endswith("op.dt_projs.weight") for key in state)
    model = ssmclip.load_published({"model": state}).double()
    assert relative(model(fixture["input"].double()), fixture["output"]) < 1e-9


@pytest.mark.parametrize("weights", ["online", "ema", "ema_online_bn"])
@pytest.mark.parametrize("name", ["vmamba", "simba"])
@torch.no_grad()
def test_a_training_checkpoint_equals_the_original(shared, name, weights):
    path = shared / "parity" / f"clip_{name}_ckpt.pt"
    # This file of ours holds a configuration besides tensors.
    truth = torch.load(shared / "parity" / f"clip_{name}_expected.pt", weights_only=False)
    model = ssmclip.load_published(path, weights)
    image = truth[
        {"online": "image_online", "ema": "image_ema"}.get(weights)
        or ("image_ema_with_online_bn" if name == "simba" else "image_ema")
    ]
    text = truth["text_online" if weights == "online" else "text_ema"]
    assert model.logit_scale.exp().item() == pytest.approx(truth["logit_scale_exp"], rel=1e-6)
    for dtype, tolerance in TOLERANCE.items():
        model.to(dtype)
        assert relative(model.encode_image(truth["image"].to(dtype)), image) < tolerance
        assert relative(model.encode_text(truth["text"]), text) < tolerance


@pytest.mark.parametrize("name", ["climp_mamba1", "climp_mamba2"])
@torch.no_grad()
def test_climp_equals_the_original(shared, name):
    fixture = torch.load(shared / "parity" / f"{name}.pt")
    model = ssmclip.load_published(fixture["state_dict"])
    assert relative(model.encode_image(fixture["image"]), fixture["image_embed"]) < 1e-4
    assert relative(model.encode_text(fixture["input_ids"]), fixture["text_embed"]) < 1e-4


@torch.no_grad()
def test_the_text_tower_alone_equals_the_original(shared):
    fixture = torch.load(shared / "parity" / "text_clip.pt")
    model = ssmclip.load_published(fixture["state_dict"]).double()
    assert isinstance(model, ClipText)
    assert relative(model(fixture["input"]), fixture["output"]) < 1e-9
    assert relative(model.encode_text(fixture["input_no_eot"]), fixture["output_no_eot"]) < 1e-9


# ---- whatever dimensions: what was built is what is read

VMAMBAS = [
    {},
    dict(d_state=3, ssm_ratio=1.5, mlp_ratio=2.7, gated=True, num_classes=7),
    dict(ssm_ratio=1.0, mlp_ratio=1 / 3, in_chans=1),
    dict(d_state=16, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1", num_classes=3),
    dict(dt_rank=3, patch_embed="v1", depths=(2, 1, 1), dims=(10, 26, 34)),
    dict(mixer="gated_conv", gated=True, conv_norm="batch", conv_act=True, ssm_ratio=2.3, depths=(1, 2), dims=(14, 22)),
    dict(dims=(48, 96, 192, 384), depths=(1, 1, 11, 1), ssm_ratio=1.0),
    dict(directions=2, d_state=3, gated=True),
    dict(directions=1),
]
SIMBAS = [
    {},
    dict(d_state=5, d_conv=3, expand=3, num_classes=4, mlp_ratios=(1, 2.5, 3, 1.2)),
    dict(channel_mixer="einfft", dims=(8, 12, 16, 20), stem_dim=3, in_chans=2),
    dict(depths=(1, 11), dims=(10, 14), mlp_ratios=(0.7, 2), num_classes=2),
    dict(aux_head=True, num_classes=3),
]
TINY = dict(depths=(1, 2, 1, 1), dims=(8, 14, 20, 36), num_classes=0)
ENCODERS = [("vmamba", fields) for fields in VMAMBAS] + [("simba", fields) for fields in SIMBAS]


@pytest.mark.parametrize(("family", "fields"), ENCODERS)
@torch.no_grad()
def test_an_encoder_of_any_dimensions_is_read_back(family, fields):
    model = perturbed(timm.create_model(family, **{**TINY, **fields}))
    read = ssmclip.load_published(model.state_dict())
    image = torch.randn(2, fields.get("in_chans", 3), 40, 37)
    assert torch.equal(read(image), model(image))
    by_name = timm.create_model(name_with_fields(family, {**TINY, **fields})).eval()
    by_name.load_state_dict(model.state_dict())
    assert torch.equal(by_name(image), model(image))


def to_clip_mamba(model):
    """A CLIP of open_clip's in the names of CLIP-Mamba's checkpoints, as written by its training."""
    state = {f"module.{k.replace('visual.trunk.', 'visual.')}": v for k, v in model.state_dict().items()}
    state["module.image_projection"] = state.pop("module.visual.head.proj.weight").T
    return state


@pytest.mark.parametrize(
    ("family", "fields", "width", "heads"),
    [("vmamba", VMAMBAS[1], 48, 3), ("vmamba", VMAMBAS[3], 320, 5), ("simba", SIMBAS[1], 40, 5)],
)
@torch.no_grad()
def test_a_clip_of_any_dimensions_is_read_back(tiny_config, family, fields, width, heads):
    model_cfg = tiny_config["model_cfg"]
    fields = {key: value for key, value in fields.items() if key != "num_classes"}
    model_cfg |= dict(embed_dim=19, quick_gelu=True)
    model_cfg["vision_cfg"]["timm_model_name"] = name_with_fields(family, {**TINY, **fields})
    model_cfg["text_cfg"] = dict(
        context_length=21, vocab_size=77, width=width, heads=heads, layers=11 if heads == 3 else 1, mlp_ratio=2.5
    )
    model = perturbed(create_clip(tiny_config))
    told = {"text_heads": heads} if width == 40 else {}
    read = ssmclip.load_published({"epoch": 3, "state_dict": to_clip_mamba(model)}, **told)
    image, text = torch.randn(2, 3, 40, 40), torch.randint(0, 77, (3, 21))
    assert torch.equal(read.encode_image(image), model.encode_image(image))
    assert torch.equal(read.encode_text(text), model.encode_text(text))
    read = build(read_published(model.state_dict(), hints=Hints(**told)))  # open_clip's own names
    assert torch.equal(read.encode_text(text), model.encode_text(text))


@pytest.mark.parametrize("module", [vmamba, simba])
def test_every_registered_encoder_is_read_as_itself(module):
    for name in module.VARIANTS:
        with torch.device("meta"):
            state = timm.create_model(name, num_classes=11).state_dict()
        read = read_published(state).config
        if name not in ("vmamba", "simba"):
            assert read == {"architecture": name, "model_args": {"num_classes": 11}}


@pytest.mark.parametrize("name", ssmclip.list_clips())
def test_a_bare_clip_of_this_package_is_read_as_its_configuration(name, caplog):
    config = ssmclip.clip_config(name)
    with torch.device("meta"):
        state = create_clip(config).state_dict()
    config["model_cfg"]["vision_cfg"].pop("timm_drop_path", None)  # of training
    assert read_published(state).config == config
    guessed = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    if name == "CLIP-VMamba-Nano-GatedConv":  # no registered encoder has its weights, and no weight shows a GELU
        assert len(guessed) == 1
        assert guessed[0].startswith("guessing conv_act=True")
    else:
        assert not guessed


@pytest.mark.parametrize("dims", [(8, 16, 32, 64), (9, 17, 31, 70)])
@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.7, 8 / 3, 4.0, 1.1])
def test_a_ratio_is_found_for_all_dims_at_once(dims, ratio):
    pairs = [(dim, int(ratio * dim)) for dim in dims]
    assert [(dim, int(common_ratio(pairs) * dim)) for dim in dims] == pairs


# ---- other libraries' models


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mambaout_femto", dict(depths=(1, 2, 1, 1), dims=(9, 14, 20, 33), num_classes=6)),
        ("mambaout_femto", dict(depths=(1, 1), dims=(12, 16), num_classes=0, expansion_ratio=3.0, kernel_size=5)),
        ("mambaout_small_rw", dict(depths=(1, 1, 1), dims=(12, 16, 20), num_classes=3, conv_ratio=1.25)),
        ("test_mambaout", dict(num_classes=5)),  # SiLU, which its exact shapes tell
        # ... and those which differ in depths and widths alone
        *((name, dict(depths=(1, 1), dims=(12, 20), num_classes=3)) for name in timm.list_models("*mambaout*_rw")),
        ("test_mambaout", dict(depths=(1, 2), dims=(12, 20), num_classes=3)),
        ("mambaout_small_rw", dict(depths=(1, 1), dims=(16, 16), num_classes=3)),
        ("mambaout_femto_linear_head", dict(depths=(1, 1, 1, 1), dims=(9, 14, 20, 33), num_classes=0)),
    ],
)
@torch.no_grad()
def test_mambaout_is_read_as_timm_built_it(name, fields):
    model = perturbed(timm.create_model(name, **fields))
    image = torch.randn(2, 3, 48, 40)
    assert torch.equal(ssmclip.load_published(model.state_dict())(image), model(image))


def test_every_mambaout_of_timm_is_read_as_itself():
    for name in timm.list_models(MAMBAOUTS):
        with torch.device("meta"):
            state = timm.create_model(name, num_classes=3).state_dict()
        assert read_published(state).config["architecture"] == name


LANGUAGE_MODELS = [
    ("mamba", dict(vocab_size=90, hidden_size=40, num_hidden_layers=2)),
    ("mamba", dict(vocab_size=31, hidden_size=24, num_hidden_layers=11, state_size=5, expand=3, conv_kernel=3)),
    ("mamba", dict(vocab_size=9, hidden_size=24, num_hidden_layers=1, time_step_rank=7, use_bias=True)),
    ("mamba", dict(vocab_size=9, hidden_size=24, num_hidden_layers=1, use_conv_bias=False)),
    ("mamba2", dict(vocab_size=9, hidden_size=24, num_hidden_layers=2, state_size=6, num_heads=6, head_dim=8)),
    (
        "mamba2",
        dict(
            vocab_size=9,
            hidden_size=20,
            num_hidden_layers=1,
            state_size=6,
            num_heads=12,
            head_dim=5,
            expand=3,
            n_groups=4,
            conv_kernel=3,
        ),
    ),
]


@pytest.mark.parametrize("naming", ["model", "causal", "mamba_ssm"])
@pytest.mark.parametrize(("kind", "fields"), LANGUAGE_MODELS)
@torch.no_grad()
def test_a_language_model_is_read_as_it_was_built(kind, fields, naming):
    if kind == "mamba2":
        fields = {"n_groups": 1, **fields}
    model = perturbed(LanguageModel(read_config({"model_type": kind, **fields})))
    state = model.state_dict()
    if naming != "model":
        state = {f"backbone.{key}": value for key, value in state.items()} | {"lm_head.weight": torch.zeros(1)}
    if naming == "mamba_ssm":
        state = {key.replace("embeddings.", "embedding."): value for key, value in state.items()}
    tokens = torch.randint(0, fields["vocab_size"], (2, 9))
    read = ssmclip.load_published(state, n_groups=fields.get("n_groups", 1))
    assert torch.equal(read(tokens), model(tokens))
    if kind == "mamba2":
        with pytest.raises(ValueError, match=r"n_groups must divide .*got 7"):
            ssmclip.load_published(state, n_groups=7)


OF_TRANSFORMERS = [
    ("Mamba", {}),
    ("Mamba", dict(layer_norm_epsilon=1e-2)),
    ("Mamba2", dict(num_heads=8, head_dim=8, n_groups=1)),
    ("Mamba2", dict(num_heads=8, head_dim=8, n_groups=2, state_size=5, time_step_limit=(0.01, 0.05))),
]


@pytest.mark.parametrize(("kind", "more"), OF_TRANSFORMERS)
@torch.no_grad()
def test_a_language_model_of_transformers_is_read_from_its_folder(kind, more, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, residual_in_fp32=False, **more
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    theirs.save_pretrained(tmp_path / "whole")
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    ssmclip.convert(tmp_path / "shards", tmp_path / "again")
    tokens = torch.randint(0, 50, (2, 9))
    truth = theirs.backbone(tokens).last_hidden_state
    for folder in ("whole", "shards", "again"):
        assert relative(ssmclip.load_published(tmp_path / folder)(tokens), truth) < 1e-5


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (dict(model_type="mamba", hidden_act="relu"), r"hidden_act must be 'silu' \(got 'relu'"),
        (dict(model_type="falcon_mamba"), "unknown language model 'falcon_mamba'.*known: mamba, mamba2"),
        (dict(model_type="mamba2"), "is for mamba2, but the weights are for mamba"),
    ],
)
def test_a_configuration_of_another_model_is_refused(config, says, tmp_path):
    ssmclip.convert(
        LanguageModel(read_config(dict(model_type="mamba", **LANGUAGE_MODELS[0][1]))).state_dict(), tmp_path
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises((CheckpointError, UnknownName), match=says):
        ssmclip.load_published(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        "",
        "\ufeff{}",
        "[1]",
        '{"architecture": null}',
        '{"architecture": {"vision": "vmamba"}}',
        '{"architecture": "resnet50"}',
        '{"architecture": "test_vmamba", "num_classes": 1234}',
        '{"architecture": "test_vmamba", "model_args": null}',
        '{"model_cfg": null}',
    ],
)
def test_a_configuration_of_another_library_is_passed_over(config, tmp_path, tiny_state):
    safetensors.torch.save_file(tiny_state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config, encoding="utf-8")
    read = ssmclip.load_published(tmp_path).state_dict()
    assert read.keys() == tiny_state.keys()
    assert all(torch.equal(read[key], tiny_state[key]) for key in read)


# ---- what training and saving wrap around the weights


@pytest.fixture
def tiny_state():
    return perturbed(timm.create_model("test_vmamba", num_classes=0)).state_dict()


@pytest.mark.parametrize("key", ["model", "state_dict", "model_ema"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_a_state_dict_is_found_wherever_it_is(tiny_state, key, prefix):
    held = {key: {prefix + name: value for name, value in tiny_state.items()}, "epoch": 1}
    for name, value in ssmclip.load_published(held).state_dict().items():
        assert torch.equal(value, tiny_state[name])


def test_the_moving_average_is_another_state_dict_beside_the_online_one(tiny_state):
    averaged = {name: value + 1 for name, value in tiny_state.items()}
    held = {"model": tiny_state, "model_ema": averaged}
    for weights, truth in (("online", tiny_state), ("ema", averaged)):
        assert torch.equal(ssmclip.load_published(held, weights).layers[0].blocks[0].norm.weight, truth[FIRST_NORM])
    with pytest.raises(CheckpointError, match="contains no moving average"):
        ssmclip.load_published(tiny_state, "ema")
    with pytest.raises(ValueError, match="'online', 'ema', 'ema_online_bn'"):
        ssmclip.load_published(tiny_state, "best")


FIRST_NORM = "layers.0.blocks.0.norm.weight"


def test_an_older_vmamba_has_other_names_for_the_same(tiny_state):
    older = {
        ".norm.": ".ln_1.",
        "patch_embed.0.": "patch_embed.proj.",
        "patch_embed.2.": "patch_embed.norm.",
        ".op.": ".self_attention.",
        "classifier.ln_1.": "norm.",
        "classifier.head.": "head.",
    }
    fields = dict(d_state=4, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1")
    model = perturbed(timm.create_model("vmamba", **{**TINY, **fields, "num_classes": 3}))
    state = {}
    for key, value in model.state_dict().items():
        for new, old in older.items():
            key = key.replace(new, old) if "downsample" not in key else key
        state[key] = value
    assert {"patch_embed.proj.weight", "layers.0.blocks.0.ln_1.weight", "norm.bias", "head.bias"} <= set(state)
    for key, value in ssmclip.load_published(state).state_dict().items():
        assert torch.equal(value, model.state_dict()[key])


@pytest.mark.parametrize("downsample", ["v1", "v3"])
def test_matrices_kept_as_1x1_convolutions_are_matrices(downsample):
    matrices = perturbed(timm.create_model("test_vmamba", num_classes=0, downsample=downsample)).state_dict()
    state = {
        k: v[:, :, None, None] if re.search(r"(in|out)_proj|fc|reduction", k) and v.ndim == 2 else v
        for k, v in matrices.items()
    }
    assert state["layers.0.blocks.0.mlp.fc1.weight"].ndim == 4
    for key, value in ssmclip.load_published(state).state_dict().items():
        assert torch.equal(value, matrices[key])


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"patch_embed.0.weight": torch.zeros(8)}, r"shapes that match no architecture.*patch_embed\.0\.weight \(8,\)"),
        (
            {"layers.0.blocks.0.op.x_proj.weight": torch.zeros(7, 3)},
            r"shapes that match no architecture.*must stack the matrices of 4 directions",
        ),
        ({1: torch.zeros(2)}, "1 are no tensors with a name"),
    ],
)
def test_weights_of_other_shapes_than_their_names_say_are_refused(tiny_state, changed, says):
    with pytest.raises(CheckpointError, match=says):
        ssmclip.load_published(tiny_state | changed)


@pytest.mark.parametrize("key", ["token_embedding.weight", "positional_embedding", "text_projection"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 4)])
def test_a_text_tower_of_other_shapes_is_refused(key, shape):
    state = {
        "token_embedding.weight": torch.zeros(50, 16),
        "positional_embedding": torch.zeros(7, 16),
        "text_projection": torch.zeros(16, 8),
        "transformer.resblocks.0.mlp.c_fc.weight": torch.zeros(64, 16),
    }
    with pytest.raises(CheckpointError, match=r"match no architecture|does not fit|missing"):
        ssmclip.load_published(state | {key: torch.zeros(shape)})


def test_a_file_of_something_else_says_what_it_holds(tmp_path):
    torch.save([torch.zeros(2)], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match=r"must contain a state dict, or a dict around one \(got list"):
        ssmclip.load_published(tmp_path / "list.pt")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_model_has_the_type_of_its_weights_but_float32_at_least(tiny_state, dtype):
    model = ssmclip.load_published({key: value.to(dtype) for key, value in tiny_state.items()})
    assert {p.dtype for p in model.parameters()} == {torch.promote_types(dtype, torch.float32)}


class CfgNode(dict):
    """As in yacs: a dict whose entries are attributes too, and whose own attributes are pickled beside them."""

    def __init__(self, entries):
        super().__init__({key: CfgNode(value) if isinstance(value, dict) else value for key, value in entries.items()})
        self.__dict__.update({"__immutable__": True, "__deprecated_keys__": set(), "__renamed_keys__": {}})

    def __getattr__(self, name):
        return self[name] if name in self else super().__getattribute__(name)

    def __setattr__(self, name, value):
        raise AttributeError(f"{name} of a frozen config")


@pytest.fixture
def yacs(monkeypatch):
    """yacs as those have it who save with it; who reads does not."""
    config = types.ModuleType("yacs.config")
    config.CfgNode = CfgNode
    monkeypatch.setattr(CfgNode, "__module__", "yacs.config")
    with monkeypatch.context() as saving:
        saving.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
        saving.setitem(sys.modules, "yacs.config", config)
        yield saving


@pytest.mark.parametrize("numpy_module", ["numpy._core.multiarray", "numpy.core.multiarray"])
def test_what_training_scripts_save_beside_the_weights_is_read(tiny_state, tmp_path, yacs, numpy_module):
    scalars = (np.float64(5e-4), np.float32(0.9), np.float16(2), np.bool_(True), np.str_("ä"))
    integers = [np.dtype(f"{kind}{size}").type(3) for kind in "iu" for size in (1, 2, 4, 8)]
    held = {
        "model": tiny_state,
        "args": argparse.Namespace(model="x", lr=0.1, out=Path("runs") / "a", share=PureWindowsPath("D:/runs")),
        "optimizer": {"scalars": [*scalars, *integers]},
        "config": CfgNode({"MODEL": {"NAME": "vmamba", "DEPTHS": [2, 2], "VSSM": {"RATIO": 2.0}}, "TAG": None}),
    }
    path = tmp_path / "checkpoint.pth"
    # The older file format holds names as text, in which those of older NumPy can be written.
    torch.save(held, path, _use_new_zipfile_serialization=False)
    yacs.undo()
    path.write_bytes(path.read_bytes().replace(b"cnumpy._core.multiarray\n", f"c{numpy_module}\n".encode()))
    assert numpy_module.encode() in path.read_bytes()
    assert torch.equal(ssmclip.load_published(path).state_dict()[FIRST_NORM], tiny_state[FIRST_NORM])
    read = load_state(path)
    assert read["optimizer"] == held["optimizer"]
    assert read["config"] == held["config"]
    assert vars(read["args"]) == vars(held["args"]) | {"out": PurePosixPath("runs/a")}


class Command:
    def __reduce__(self):
        return os.system, ("echo code ran",)


def test_a_pickle_that_runs_code_is_refused(tiny_state, tmp_path, capfd):
    torch.save({"model": tiny_state, "args": Command()}, tmp_path / "bad.pt")
    with pytest.raises(CheckpointError, match="would run code"):
        ssmclip.load_published(tmp_path / "bad.pt")
    assert "code ran" not in capfd.readouterr().out


# ---- what is none of these


def test_what_does_not_fit_is_told_key_by_key(tiny_state):
    state = {key: value for key, value in tiny_state.items() if ".norm2." not in key}
    state["layers.1.blocks.0.op.Ds"] = torch.zeros(5)
    state |= {f"extra.{i}": torch.zeros(1) for i in range(6)}
    with pytest.raises(CheckpointError) as error:
        ssmclip.load_published(state)
    missing = [key for key in tiny_state if ".norm2." in key]
    assert len(missing) == 8
    for key in [*missing, *(f"extra.{i}" for i in range(6)), "layers.1.blocks.0.op.Ds (5,), the model's (128,)"]:
        assert key in str(error.value)


@pytest.mark.parametrize(
    ("held", "says"),
    [
        ({"conv1.weight": torch.zeros(3)}, "not a known checkpoint.*begin with: conv1.weight"),
        ({"model": {"layers.0.blocks.0.norm.bias": torch.zeros(3)}}, r"has no 'layers\.0\.blocks\.0\.norm\.weight'"),
        ({"epoch": 3, "net": {}}, "epoch, net are no tensors"),
        ({"state_dict": {}}, "it is empty"),
    ],
)
def test_what_is_no_known_checkpoint_says_so(held, says):
    with pytest.raises(CheckpointError, match=says):
        ssmclip.load_published(held)


def test_a_folder_must_hold_one_checkpoint(tmp_path, tiny_state):
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        ssmclip.load_published(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(tiny_state, tmp_path / name)
    with pytest.raises(CheckpointError, match=r"several checkpoints, a\.pt, b\.pt"):
        ssmclip.load_published(tmp_path)
    assert torch.equal(ssmclip.load_published(tmp_path / "a.pt").state_dict()[FIRST_NORM], tiny_state[FIRST_NORM])
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no 'weight_map'"):
        ssmclip.load_published(tmp_path)


@pytest.mark.parametrize("name", ["last.pt", "last.pth", "last.ckpt", "checkpoint.pth.tar", "pytorch_model.bin"])
def test_a_folder_is_read_whatever_its_checkpoint_is_called(tmp_path, tiny_state, name):
    torch.save(tiny_state, tmp_path / name)
    assert torch.equal(ssmclip.load_published(tmp_path).state_dict()[FIRST_NORM], tiny_state[FIRST_NORM])
