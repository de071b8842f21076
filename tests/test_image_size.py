"""Any image size: what encoders compute at it, and what preprocessing makes of a picture."""

import inspect

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from timm.layers import resample_abs_pos_embed
from timm.models.vision_transformer import VisionTransformer

import ssmclip
from ssmclip import ops
from ssmclip.evaluate.protocols import PROTOCOLS
from ssmclip.models import build_preprocess, clip_config, create_clip
from ssmclip.models.clip import image_transform
from ssmclip.models.networks.registration import name_with_fields

SIZES = [(64, 64), (97, 160), (224, 224), (1024, 1024)]
STAGES = dict(depths=(1, 1), dims=(4, 8))
FIELDS = {
    "vmamba": ("vmamba", STAGES),
    "vmamba, first version": (
        "vmamba",
        STAGES | dict(d_state=2, gated=True, conv_bias=True, mlp_ratio=0.0, patch_embed="v1", downsample="v1"),
    ),
    "vmamba, gated_conv": ("vmamba", STAGES | dict(mixer="gated_conv", conv_norm="batch")),
    "simba": ("simba", STAGES | dict(mlp_ratios=(1, 1), stem_dim=2, d_state=2)),
    "simba, einfft": ("simba", STAGES | dict(mlp_ratios=(1, 1), stem_dim=2, d_state=2, channel_mixer="einfft")),
}


def perturbed(model, seed=0):
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return model.eval()


def picture(height, width):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FIELDS)
@torch.no_grad()
def test_kernels_and_plain_pytorch_agree_at_every_size(tiny_config, family, size):
    tiny_config["model_cfg"]["vision_cfg"]["timm_model_name"] = name_with_fields(*FIELDS[family])
    model = perturbed(create_clip(tiny_config)).double()
    image = build_preprocess(tiny_config, size)(picture(240, 200))[None].double()
    assert image.shape[2:] == size
    features = model.encode_image(image)
    with ops.using("chunked"):
        torch.testing.assert_close(model.encode_image(image), features, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_mambaout_takes_every_size(size):
    fields = dict(depths=(1, 1, 1, 1), dims=(8, 8, 8, 8), num_classes=0)
    model = perturbed(timm.create_model("mambaout_femto_linear_head", **fields))
    theirs = timm.create_model("mambaout_femto", **fields).eval()
    theirs.load_state_dict(model.state_dict(), strict=False)
    image = torch.randn(1, 3, *size)
    maps = theirs.forward_features(image)
    assert maps.shape[1:3] == tuple(-(-side // 32) for side in size)
    torch.testing.assert_close(model(image), model.head.norm(maps.mean((1, 2))))


SMALL = {"depth": 1, "embed_dim": 24, "num_heads": 2}


class SmallViT(VisionTransformer):
    def __init__(self, **settings):
        super().__init__(**{**settings, **SMALL})


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ["vit_nano_patch16", "vit_base_patch16_224"])
@torch.no_grad()
def test_positions_are_resampled_as_timm_does(tiny_config, tmp_path, name, size, monkeypatch):
    """Against timm's own model of that size. An image is filled up to whole patches, or loses what is left over."""
    monkeypatch.setattr(timm.models.vision_transformer, "VisionTransformer", SmallViT)
    filled = name == "vit_nano_patch16"
    small_name = name_with_fields(name, SMALL) if filled else name
    tiny_config["model_cfg"]["vision_cfg"] |= {"timm_model_name": small_name, "image_size": 224}
    small = perturbed(create_clip(tiny_config))
    ssmclip.save_model(small, tiny_config, tmp_path)
    state = small.visual.trunk.state_dict()
    grid = [-(-side // 16) if filled else side // 16 for side in size]
    theirs = SmallViT(
        img_size=[16 * side for side in grid], num_classes=0, global_pool="avg" if filled else "token"
    ).eval()
    theirs.load_state_dict(state | {"pos_embed": resample_abs_pos_embed(state["pos_embed"], grid)})
    loaded, preprocess, _ = ssmclip.load(tmp_path, image_size=size)
    assert loaded.visual.image_size == size
    image = preprocess(picture(240, 200))[None]
    whole = torch.zeros(1, 3, *(16 * side for side in grid))
    height, width = (min(pair) for pair in zip(size, whole.shape[2:], strict=True))
    whole[..., :height, :width] = image[..., :height, :width]
    torch.testing.assert_close(loaded.visual.trunk(image), theirs(whole))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [64, (64, 64), (97, 160), (160, 97), (50, 300)])
@pytest.mark.parametrize("resize_mode", ["shortest", "longest", "squash"])
def test_pictures_are_resized_by_the_models_rule(resize_mode, size, interpolation):
    transform = image_transform(size, interpolation, mean=(0, 0, 0), std=(1, 1, 1), resize_mode=resize_mode)
    height, width = (size, size) if isinstance(size, int) else size
    for source in (picture(120, 90), picture(31, 400)):
        shares = (height / source.height, width / source.width)
        scale = min(shares) if resize_mode == "longest" else max(shares)
        # torchvision, which resizes to squares, rounds down
        whole = int if resize_mode == "shortest" and height == width else round
        sides = [whole(scale * source.height + 1e-9), whole(scale * source.width + 1e-9)]
        if resize_mode == "squash":
            sides = [height, width]
        resized = source.resize(sides[::-1], getattr(Image.Resampling, interpolation.upper()))
        if resize_mode == "shortest":
            top, left = round((sides[0] - height) / 2), round((sides[1] - width) / 2)
            truth = resized.crop((left, top, left + width, top + height))
        else:
            truth = Image.new("RGB", (width, height))
            truth.paste(resized, ((width - sides[1]) // 2, (height - sides[0]) // 2))
        pixels = torch.from_numpy(np.array(truth)).permute(2, 0, 1) / 255
        torch.testing.assert_close(transform(source), pixels)


def test_every_loader_keeps_the_interpolation_at_other_sizes():
    source, size = picture(80, 90), (40, 64)
    wanted = np.array(source.resize((64, round(80 * 64 / 90)), Image.Resampling.BILINEAR))[8:48]
    mean, std = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    wanted = torch.from_numpy((wanted / 255 - mean) / std).permute(2, 0, 1).float()
    model, preprocess, _ = ssmclip.load("CLIP-VMamba-Nano", image_size=size)
    paper = PROTOCOLS["clip-mamba"].preprocess(model, preprocess, "zeroshot", size)
    for transform in (preprocess, paper, build_preprocess(clip_config("CLIP-VMamba-Nano", image_size=size))):
        torch.testing.assert_close(transform(source), wanted)
    theirs = ssmclip.load("open_clip:ViT-S-32-alt", image_size=(64, 96))
    assert theirs.preprocess(source).shape == (3, 64, 96)
    assert open_clip.get_model_preprocess_cfg(theirs.model)["size"] == (64, 96)
    assert theirs.model.encode_image(theirs.preprocess(source)[None]).isfinite().all()


@pytest.mark.parametrize("size", [0, (3,), (64, 0), (64.0, 64), (1, 2, 3)])
def test_what_is_no_size_is_told(size):
    with pytest.raises(ValueError, match=r"the image size must be pixels, or \(height, width\) \(got "):
        inspect.unwrap(image_transform)(size)  # without the tests' type checks, which a configuration file never meets
