"""What timm and the libraries that build on it take for granted of a model, for every family of encoders.

`make timm-tests` runs timm's own tests on every registered name; these hold the essence of them at small sizes.
"""

import math

import pytest
import timm
import torch
from timm.layers import get_channel_dim, get_spatial_dim
from torchvision.models.feature_extraction import create_feature_extractor

import ssmclip

STAGES = dict(depths=(1, 1, 1), dims=(8, 16, 24))
FIRST_VERSION = dict(d_state=4, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1")
SIMBA = STAGES | dict(mlp_ratios=(2, 2, 2), stem_dim=4, d_state=4)
MAPS = {
    "vmamba": ("vmamba", STAGES),
    "vmamba, first version": ("vmamba", STAGES | FIRST_VERSION),
    "vmamba, batch norm": ("vmamba", STAGES | dict(conv_norm="batch", conv_act=True)),
    "vmamba, gated_conv": ("vmamba", STAGES | dict(mixer="gated_conv", patch_embed="v1", conv_norm="batch")),
    "vmamba, one direction": ("vmamba", STAGES | dict(directions=1)),
    "simba": ("simba", SIMBA),
    "simba, einfft": ("simba", SIMBA | dict(channel_mixer="einfft", aux_head=True)),
    "mambaout": ("mambaout_femto_linear_head", dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32))),
}
VIT = dict(depth=1, embed_dim=48)
FAMILIES = MAPS | {
    "vit": ("vit_nano_patch16", dict(depth=1)),
    "vit, causal": ("vit_nano_patch16", VIT | dict(mixing="causal")),
    "vit, causal, token last": ("vit_small_patch16", VIT | dict(mixing="causal", num_heads=3)),
}
FIRST_STAGE = {"VMamba": "layers.0.blocks", "SiMBA": "block1", "MambaOut": "stages.0"}  # the last node under it
SIZE = (80, 112)  # of maps: 20 x 28, 10 x 14 and 5 x 7 positions

# Shape checks exist in tests only, and cannot be traced.
pytestmark = pytest.mark.usefixtures("untyped")


def build(family: str, **fields) -> torch.nn.Module:
    """In evaluation mode, no weight or bias at its neutral start."""
    torch.manual_seed(0)
    name, own = FAMILIES[family]
    model = timm.create_model(name, num_classes=5, **own, **fields)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def images(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, *SIZE, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_default_configuration_names_parameters_and_sizes(family):
    model = build(family)
    classifier = model.default_cfg["classifier"]
    names = [model.default_cfg["first_conv"], *([classifier] if isinstance(classifier, str) else classifier)]
    assert {f"{name}.weight" for name in names} <= dict(model.named_parameters()).keys()
    assert model.default_cfg["input_size"][0] == model.in_chans == 3
    assert model.head_hidden_size == model.forward_head(model.forward_features(images()), pre_logits=True).shape[1]


@pytest.mark.parametrize("name", ["test_vmamba", "test_simba", "vmamba_nano", "vmamba_tiny_v0"])
def test_a_model_without_memory_has_the_sizes_of_its_configuration(name):
    model = timm.create_model(name, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.bfloat16)}
    features = model.forward_features(torch.empty(1, *model.default_cfg["input_size"], device="meta").bfloat16())
    assert tuple(features.shape[i] for i in get_spatial_dim(model.output_fmt)) == model.default_cfg["pool_size"]


@pytest.mark.parametrize("family", MAPS)
@torch.no_grad()
def test_output_fmt_is_the_order_of_maps(family):
    model, image = build(family), images()
    features = model.forward_features(image)
    assert model.output_fmt == "NHWC"
    assert features.shape[get_channel_dim(model.output_fmt)] == model.num_features
    reduced = [math.ceil(side / model.feature_info[-1]["reduction"]) for side in SIZE]
    assert [features.shape[i] for i in get_spatial_dim(model.output_fmt)] == reduced


@pytest.mark.parametrize("family", MAPS)
@torch.no_grad()
def test_intermediates_are_the_same_maps_in_both_orders_and_from_features_only(family):
    model, image = build(family), images()
    final, first = model.forward_intermediates(image, output_fmt="NCHW")
    last = model.forward_intermediates(image, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(final, model.forward_features(image), rtol=0, atol=0)
    assert [x.shape[1] for x in first] == [x.shape[-1] for x in last] == [i["num_chs"] for i in model.feature_info]
    for x, y in zip(first, last, strict=True):
        torch.testing.assert_close(x, y.permute(0, 3, 1, 2), rtol=0, atol=0)
    # timm's extractors name the order of their maps themselves.
    extractor = build(family, features_only=True)
    extractor.load_state_dict(weights_of(model, extractor))
    for x, y in zip(extractor(image), first if extractor.output_fmt == "NCHW" else last, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def weights_of(model: torch.nn.Module, extractor: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's weights by the extractor's keys, which have "_" for "." and sometimes a prefix."""
    weights = {key.replace(".", "_"): value for key, value in model.state_dict().items()}
    return {key: weights[key.removeprefix("model.").replace(".", "_")] for key in extractor.state_dict()}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_gets_a_gradient(family):
    model = build(family).train()
    model(images()).square().sum().backward()
    # SiMBA's class block reads one position: nothing of its state is carried on, and A's gradient is zero.
    zero = {"post_network.0.attn.mamba.A_log"}
    assert not [
        name for name, p in model.named_parameters() if p.grad is None or (name not in zero and not p.grad.any())
    ]


@pytest.mark.parametrize("family", MAPS)
def test_torch_fx_computes_what_the_model_does_with_every_tracer(family):
    model, image = build(family), images()
    traced = torch.fx.symbolic_trace(model)
    extracted = create_feature_extractor(model, {FIRST_STAGE[type(model).__name__]: "map"})
    torch.testing.assert_close(traced(image), model(image), rtol=0, atol=0)
    torch.testing.assert_close(traced(image[:1, :, :48, :80]), model(image[:1, :, :48, :80]), rtol=0, atol=0)
    stages = model.forward_intermediates(image, output_fmt=model.output_fmt, intermediates_only=True)
    torch.testing.assert_close(extracted(image)["map"], stages[0], rtol=0, atol=0)
    parameters = [p for name, p in model.named_parameters() if name.startswith(("patch_embed", "stem"))]
    plain = torch.autograd.grad(model(image).square().sum(), parameters)
    torch.testing.assert_close(torch.autograd.grad(traced(image).square().sum(), parameters), plain, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning", "ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_a_torchscript_trace_computes_what_the_model_does(family):
    model, image = build(family), images()
    traced = torch.jit.trace(model, image, check_trace=False)
    torch.testing.assert_close(traced(image.flip(-1)), model(image.flip(-1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", MAPS)
def test_a_new_head_has_the_type_device_and_mode_of_its_model(family):
    model = build(family).to("meta", torch.float64)
    model.reset_classifier(0)
    model.reset_classifier(2)
    head = model.get_classifier()
    assert (head.out_features, head.weight.dtype, head.weight.device.type) == (2, torch.float64, "meta")
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("family", MAPS)
def test_what_no_chosen_stage_needs_is_pruned(family):
    model, image = build(family), images()
    maps = model.forward_intermediates(image, output_fmt="NHWC", intermediates_only=True)
    take = model.prune_intermediate_layers([1], prune_norm=True)
    short = model.forward_intermediates(image, indices=take, output_fmt="NHWC", intermediates_only=True)
    torch.testing.assert_close(short, [maps[1]], rtol=0, atol=0)
    torch.testing.assert_close(model.forward_features(image), maps[1], rtol=0, atol=0)
    assert model.num_features == maps[1].shape[-1]
    short[0].sum().backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None]


def test_the_families_above_are_all_there_are():
    registered = {n for n in timm.list_models() if timm.model_entrypoint(n).__module__.startswith(ssmclip.__name__)}
    kinds = {n.removeprefix("test_").split("_")[0] for n in registered}
    assert kinds == {name.split("_")[0] for name, _ in FAMILIES.values()}
