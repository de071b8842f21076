"""MambaOut as a CLIP tower: timm's weights, timm's map, timm's pooled and normalised features."""

import open_clip
import pytest
import timm
import torch
from timm.models.mambaout import MambaOut
from torch.nn import functional as F

from ssmclip.models import clip_config, create_clip, list_clips
from ssmclip.models.networks import mambaout

TINY_FIELDS = dict(dims=(8, 16, 24, 32), depths=(1, 1, 1, 1))
CLIPS = {
    "CLIP-MambaOut-Femto": "mambaout_femto",
    "CLIP-MambaOut-Kobe": "mambaout_kobe",
    "CLIP-MambaOut-T": "mambaout_tiny",
    "CLIP-MambaOut-S": "mambaout_small",
    "CLIP-MambaOut-B": "mambaout_base",
}
TEXT_AND_SCALE = 63_428_096 + 1


def parameters(module):
    return sum(p.numel() for p in module.parameters())


def test_every_size_has_a_clip():
    assert {f"mambaout_{size}" for size, fields in mambaout.SIZES.items() if not fields} == set(CLIPS.values())
    assert {name for name in list_clips() if "MambaOut" in name} == {*CLIPS, "CLIP-MambaOut-Nano"}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_tower_is_timms_without_the_hidden_layer(name):
    with torch.device("meta"):
        clip, original = create_clip(name), timm.create_model(CLIPS[name], num_classes=0)
    wanted = {key: value.shape for key, value in original.state_dict().items() if "pre_logits" not in key}
    assert {key: value.shape for key, value in clip.visual.trunk.state_dict().items()} == wanted
    assert clip.visual.head.proj.weight.shape == (512, original.num_features)
    hidden = parameters(original.head.pre_logits)
    assert parameters(clip) == parameters(original) - hidden + 512 * original.num_features + TEXT_AND_SCALE


@pytest.mark.parametrize("size", [(64, 64), (75, 49)])
@torch.no_grad()
def test_clip_image_features_are_timms_map_pooled_and_normalised(size):
    torch.manual_seed(0)
    config = open_clip.get_model_config("CLIP-MambaOut-Femto")
    tower = open_clip.timm_model.TimmModel(
        config["vision_cfg"]["timm_model_name"], embed_dim=16, pool=config["vision_cfg"]["timm_pool"]
    ).eval()
    original = timm.create_model("mambaout_femto").eval()
    for p in original.parameters():  # away from biases of 0 and norms of 1
        p.add_(0.02 * torch.randn_like(p))
    kept = {key: value for key, value in original.state_dict().items() if not key.startswith(("head.pre", "head.fc"))}
    tower.trunk.load_state_dict(kept)
    image = torch.randn(2, 3, *size)
    pooled = original.forward_features(image).mean(dim=(1, 2))
    normed = F.layer_norm(pooled, pooled.shape[1:], original.head.norm.weight, original.head.norm.bias, 1e-6)
    torch.testing.assert_close(tower(image), normed @ tower.head.proj.weight.T)
    torch.testing.assert_close(tower.trunk.forward_features(image), original.forward_features(image))
    # What timm's own head makes of the same features.
    torch.testing.assert_close(original.head.fc(original.head.pre_logits(normed)), original(image))


@torch.no_grad()
def test_timms_arguments_go_through():
    model = timm.create_model("mambaout_femto_linear_head", num_classes=5, drop_path_rate=0.1, **TINY_FIELDS).eval()
    image = torch.randn(1, 3, 40, 56)
    head = model.get_classifier()
    features = model.forward_head(model.forward_features(image), pre_logits=True)
    torch.testing.assert_close(model(image), features @ head.weight.T + head.bias)
    model.reset_classifier(0)
    torch.testing.assert_close(model(image), features)
    assert features.shape == (1, model.num_features)
    extractor = timm.create_model("mambaout_femto_linear_head", features_only=True, **TINY_FIELDS).eval()
    original = timm.create_model("mambaout_femto", features_only=True, **TINY_FIELDS).eval()
    extractor.load_state_dict(original.state_dict())
    assert extractor.feature_info.channels() == original.feature_info.channels()
    for ours, truth in zip(extractor(image), original(image), strict=True):
        torch.testing.assert_close(ours, truth)


def test_pretrained_weights_are_timms(tmp_path):
    original = timm.create_model("mambaout_femto", **TINY_FIELDS)
    torch.save(original.state_dict(), tmp_path / "weights.pth")
    ours = timm.create_model(
        "mambaout_femto_linear_head",
        pretrained=True,
        pretrained_cfg_overlay=dict(file=str(tmp_path / "weights.pth")),
        **TINY_FIELDS,
    )
    for key, value in ours.state_dict().items():
        if not key.startswith("head.fc"):
            torch.testing.assert_close(value, original.state_dict()[key])


@pytest.mark.parametrize("size", [(32, 32), (75, 49)])
@torch.no_grad()
def test_nano_is_timms_network_with_other_fields(size):
    torch.manual_seed(0)
    ours = timm.create_model("mambaout_nano_linear_head", num_classes=0).eval()
    theirs = MambaOut(depths=(1, 1, 6, 1), dims=(40, 80, 160, 336)).eval()
    for p in theirs.parameters():
        p.add_(0.02 * torch.randn_like(p))
    kept = {key: value for key, value in theirs.state_dict().items() if not key.startswith(("head.pre", "head.fc"))}
    ours.load_state_dict(kept)
    image = torch.randn(2, 3, *size)
    pooled = theirs.forward_features(image).mean(dim=(1, 2))
    normed = F.layer_norm(pooled, pooled.shape[1:], theirs.head.norm.weight, theirs.head.norm.bias, 1e-6)
    torch.testing.assert_close(ours(image), normed)
    assert theirs.forward_features(image).shape[1:3] == tuple(-(-side // 32) for side in size)


def test_nano_knows_nothing_of_timms_weights():
    model = timm.create_model("mambaout_nano_linear_head")
    assert (model.pretrained_cfg["architecture"], model.pretrained_cfg.get("hf_hub_id")) == (
        "mambaout_nano_linear_head",
        None,
    )
    for more in ({}, {"features_only": True}):
        with pytest.raises(RuntimeError, match="No pretrained weights exist for mambaout_nano_linear_head"):
            timm.create_model("mambaout_nano_linear_head", pretrained=True, **more)


def test_the_small_clips_differ_in_the_image_tower_alone():
    configs = [clip_config(f"CLIP-{name}-Nano") for name in ("VMamba", "MambaOut", "ViT")]
    names = [config["model_cfg"]["vision_cfg"].pop("timm_model_name") for config in configs]
    assert names == ["vmamba_nano", "mambaout_nano_linear_head", "vit_nano_patch16"]
    assert configs[0] == configs[1] == configs[2]


def test_vit_l_has_the_papers_size():
    """The paper's control: 303,301,632 parameters of the tower counted in its own code."""
    with torch.device("meta"):
        clip = create_clip("CLIP-ViT-L-16")
    assert parameters(clip.visual.trunk) == 303_301_632
    assert parameters(clip) == 303_301_632 + 1024 * 512 + TEXT_AND_SCALE
