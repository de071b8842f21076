"""Models that differ in how positions are mixed: causal or full attention, what is read, directions of the scan."""

import pytest
import timm
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn

from ssmclip.analyze.cost.macs import count_macs
from ssmclip.models import clip_config, create_clip
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.networks.vit import CausalAttention, ViT
from ssmclip.models.networks.vmamba import SS2D

SMALL = dict(img_size=48, embed_dim=32, depth=2, num_heads=2, num_classes=5)
READOUTS = ("mean", "first", "last")

# Shape checks exist in tests only; compilers cannot see through them, and they refuse bad input before we do.
pytestmark = pytest.mark.usefixtures("untyped")


def perturbed(model: nn.Module) -> nn.Module:
    """In evaluation mode and float64, no weight or bias at its neutral start."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.double().eval()


def build(readout: str, mixing: str = "causal", **fields) -> nn.Module:
    torch.manual_seed(1)
    return perturbed(timm.create_model("vit_nano_patch16", mixing=mixing, readout=readout, **SMALL, **fields))


def images(*size: int) -> torch.Tensor:
    return torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def tokens_by_timm(model: nn.Module, image: torch.Tensor) -> list[torch.Tensor]:
    """What timm's own transformer makes of the same weights when it is called with is_causal: the blocks' outputs.

    The tokens stand in the order in which they are mixed.
    """
    theirs = VisionTransformer(**SMALL, class_token=True, global_pool=model.global_pool).double().eval()
    theirs.load_state_dict(model.state_dict())
    x = theirs._pos_embed(theirs.patch_embed(image))
    if model.readout == "last":
        x = torch.cat([x[:, 1:], x[:, :1]], 1)
    outputs = []
    for block in theirs.blocks:
        x = block(x, is_causal=True)
        outputs.append(x)
    if model.readout == "mean":
        whole = theirs(image, is_causal=True)
        torch.testing.assert_close(theirs.head(theirs.fc_norm(x[:, 1:].mean(1))), whole, rtol=1e-12, atol=1e-12)
    return outputs


def features_by_timm(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    last = tokens_by_timm(model, image)[-1]
    if model.readout == "mean":
        return model.fc_norm(last[:, 1:].mean(1))
    return model.norm(last[:, 0 if model.readout == "first" else -1])


# ---- causal attention, however the model is called


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_every_way_to_call_a_causal_vit_is_causal(readout):
    model, image = build(readout), images(48, 48)
    wanted = features_by_timm(model, image)

    def same(features):
        torch.testing.assert_close(features, wanted, rtol=1e-10, atol=1e-10)

    same(model.forward_head(model.forward_features(image), pre_logits=True))
    torch.testing.assert_close(model(image), model.head(wanted), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model(image, is_causal=True), model.head(wanted), rtol=1e-10, atol=1e-10)
    same(model.forward_head(model.forward_intermediates(image)[0], pre_logits=True))
    for block in model.blocks:
        block.attn.fused_attn = False
    same(model.forward_head(model.forward_features(image), pre_logits=True))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(image), model.head(wanted), rtol=1e-10, atol=1e-10)
    clip = tower_of(readout)
    clip.visual.trunk.load_state_dict({k: v for k, v in model.state_dict().items() if not k.startswith("head.")})
    torch.testing.assert_close(clip.encode_image(image), clip.visual.head(wanted), rtol=1e-10, atol=1e-10)


def tower_of(readout: str) -> nn.Module:
    """A CLIP whose image tower is the causal ViT, by one changed name."""
    config = clip_config("CLIP-ViT-Nano", image_size=48)
    fields = {key: value for key, value in SMALL.items() if key != "num_classes"}
    name = name_with_fields("vit_nano_patch16", fields | {"mixing": "causal", "readout": readout})
    config["model_cfg"]["vision_cfg"]["timm_model_name"] = name
    config["model_cfg"]["text_cfg"] |= {"layers": 1, "vocab_size": 50}
    return perturbed(create_clip(config))


@pytest.mark.parametrize("readout", READOUTS)
@torch.no_grad()
def test_intermediate_maps_are_of_causal_blocks(readout):
    model, image = build(readout), images(48, 48)
    patches = slice(0, -1) if readout == "last" else slice(1, None)
    wanted = [x[:, patches].unflatten(1, (3, 3)).permute(0, 3, 1, 2) for x in tokens_by_timm(model, image)]
    extractor = build(readout, features_only=True, out_indices=(0, 1))
    extractor.model.load_state_dict({k: v for k, v in model.state_dict().items() if k in extractor.model.state_dict()})
    found = [
        model.forward_intermediates(image, intermediates_only=True),
        model.get_intermediate_layers(image, n=[0, 1], reshape=True),
        extractor(image),
    ]
    for maps in found:
        for x, y in zip(maps, wanted, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("readout", ["mean", "last"])
def test_gradient_checkpointing_keeps_the_order(readout):
    model, image = build(readout), images(48, 48)
    plain = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    model.set_grad_checkpointing()
    again = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
    torch.testing.assert_close(again, plain)


@torch.no_grad()
def test_a_patch_depends_on_nothing_after_it():
    model, image = build("last"), images(48, 64)  # 3 x 4 patches, positions resampled
    changed = image.clone()
    changed[:, :, 16:32, 16:32] += 1  # the sixth
    before, after = model.forward_features(image), model.forward_features(changed)
    same = (before == after).all(-1)[0].tolist()
    assert same == [False, *[True] * 5, *[False] * 7]  # the class token, stored first, stands last


def test_dropped_patches_leave_the_others_in_their_order():
    position = torch.arange(1.0, 37).expand(4, 36)[..., None]
    tokens = torch.cat([torch.zeros(4, 1, 1), position], 1)
    for mixing, in_order in (("causal", True), ("full", False)):
        model = build("last", mixing, patch_drop_rate=0.5).train()
        kept = model.patch_drop(tokens)[..., 0]
        assert (kept.diff() > 0).all().item() is in_order
        assert (kept[:, 0] == 0).all()


# ---- what is read


def pixels_seen(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """Whether the features of the first picture depend on each of its patches, (rows, columns)."""
    image = image.clone().requires_grad_()
    logits = model(image)[0]
    (gradient,) = torch.autograd.grad((logits * torch.arange(1, 6)).sum(), image)
    return gradient[0].abs().sum(0).unfold(0, 16, 16).unfold(1, 16, 16).sum((2, 3)) > 0


def test_a_causal_class_token_is_blind_where_it_stands_first():
    image = images(48, 64)
    for readout in ("mean", "last"):
        assert pixels_seen(build(readout), image).all()
    blind = build("first")
    assert not pixels_seen(blind, image).any()
    with torch.no_grad():
        assert torch.equal(*blind(image))  # two pictures
    assert pixels_seen(build("first", "full"), image).all()


@pytest.mark.parametrize("fields", [{}, {"reg_tokens": 2}])
@torch.no_grad()
def test_the_place_of_the_class_token_makes_no_difference_to_full_attention(fields):
    first, last = build("first", "full", **fields), build("last", "full", **fields)
    assert torch.equal(first(images(48, 48)), last(images(48, 48)))


@pytest.mark.parametrize("size", ["small", "base"])
def test_the_larger_ones_are_deits(size):
    with torch.device("meta"):
        ours, theirs = timm.create_model(f"vit_{size}_patch16"), timm.create_model(f"deit_{size}_patch16_224")
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}
    assert (ours.mixing, ours.readout) == ("full", "last")
    for key in ("mean", "std", "interpolation", "crop_pct", "input_size"):
        assert timm.data.resolve_data_config(model=ours)[key] == timm.data.resolve_data_config(model=theirs)[key]


@torch.no_grad()
def test_a_deit_of_timm_computes_the_same():
    theirs = perturbed(timm.create_model("deit_small_patch16_224", depth=2))
    ours = timm.create_model("vit_small_patch16", depth=2).double().eval()
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours(images(224, 224)), theirs(images(224, 224)))
    twin = timm.create_model('vit_small_patch16.mixing="causal"', depth=2).double().eval()
    twin.load_state_dict(theirs.state_dict())
    assert not torch.allclose(twin(images(224, 224)), theirs(images(224, 224)))


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (dict(mixing="causl"), "mixing must be 'full' or 'causal' .got 'causl'"),
        (dict(readout="end"), "readout must be one of mean, first, last .got 'end'"),
        (dict(readout="last", class_token=False), "'mean' without a class token .got 'last'"),
        (dict(mixing="causal", attn_layer="diff"), "attn_layer must be left out with mixing='causal' .got 'diff'"),
        (dict(mixing="causal", block_fn=ParallelScalingBlock), "'full' with blocks of ParallelScalingBlock"),
    ],
)
def test_what_cannot_be_is_named(fields, says):
    with pytest.raises(ValueError, match=says):
        ViT(**{**SMALL, **fields})


def test_a_mask_of_ones_own_is_refused():
    with pytest.raises(ValueError, match="attn_mask must be left out"):
        build("mean")(images(48, 48), attn_mask=torch.ones(10, 10, dtype=torch.bool))
    assert all(isinstance(block.attn, CausalAttention) for block in build("mean").blocks)


# ---- directions of the scan


@pytest.mark.parametrize(("directions", "sees"), [(4, "all"), (2, "all"), (1, "before")])
def test_one_direction_sees_what_comes_before(directions, sees):
    op = perturbed(SS2D(8, directions=directions))
    x = torch.randn(1, 4, 5, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op.scan(x)[0, 1, 2].sum(), x)
    seen = gradient[0].abs().sum(-1).flatten() > 0
    assert seen.tolist() == [True] * 20 if sees == "all" else [True] * 8 + [False] * 12


@pytest.mark.parametrize("directions", [2, 1])
def test_fewer_directions_have_fewer_parameters_and_nothing_else_changes(directions):
    fields = dict(dims=(8, 16), depths=(1, 1), d_state=3)
    fewer = timm.create_model(f"vmamba.directions={directions}", **fields).state_dict()
    for key, value in timm.create_model("vmamba", **fields).state_dict().items():
        shape = list(value.shape)
        if key.endswith(("x_proj_weight", "dt_projs_weight", "dt_projs_bias", "A_logs", "Ds")):
            shape[0] = shape[0] * directions // 4
        assert list(fewer[key].shape) == shape, key


@pytest.mark.parametrize("directions", [0, 3, "4"])
def test_other_numbers_of_directions_are_refused(directions):
    with pytest.raises(ValueError, match=rf"directions must be 4, 2, 1 \(got {directions}\)"):
        timm.create_model("test_vmamba", directions=directions)


# ---- models of one budget

BUDGET = {
    "vmamba_nano": 0.0,
    "vmamba_nano.directions=2": 0.04,
    "vmamba_nano.directions=1": 0.06,
    'vmamba_nano.mixer="gated_conv"': 0.03,
    "mambaout_nano_linear_head": 0.01,
}


@pytest.mark.parametrize("name", BUDGET)
def test_the_nano_models_have_one_budget(name):
    """Parameters of the tower, and MACs at 32 to 128 pixels, relative to VMamba-Nano."""
    tag = f"{name};num_classes=0" if "=" in name else f"{name}.num_classes=0"
    for size in (32, 64, 96, 128):
        count, whole = count_macs(tag, size), count_macs("vmamba_nano.num_classes=0", size)
        assert count.total == pytest.approx(whole.total, rel=BUDGET[name] + 1e-9)
        assert count.parameters == pytest.approx(whole.parameters, rel=BUDGET[name] + 1e-9)
