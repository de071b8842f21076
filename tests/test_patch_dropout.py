"""Patch dropout: which tokens the blocks see, against the tokens of the whole image."""

import pytest
import torch

from ssmclip import models
from ssmclip.models.towers import image_tower
from ssmclip.train import loop, train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_model
from test_train import EightPairs, series, tiny

SMALL = 'changes={"vision_cfg": {"layers": 1}, "text_cfg": {"layers": 1}}'
TOWERS = {
    "timm": ["name=CLIP-ViT-Nano", "image_sizes=[[0, 64]]", "changes={}"],
    "open_clip": ["name=open_clip:ViT-B-32", "image_sizes=[[0, 224]]", SMALL],
}


def built(*overrides):
    config = tiny(*overrides)
    return build_model(config, blueprint(config))


def tokens(model, images):
    """What the first block of the image tower is given, (B, tokens, width)."""
    tower, given = image_tower(model), []
    block = tower.blocks[0] if hasattr(tower, "blocks") else tower.transformer.resblocks[0]
    handle = block.register_forward_pre_hook(lambda _, inputs: given.append(inputs[0]))
    with torch.no_grad():
        model.encode_image(images)
    handle.remove()
    return given[0]


@pytest.mark.parametrize("tower", TOWERS)
def test_blocks_see_a_random_quarter_of_the_patches_with_their_positions(tower):
    model = built(*TOWERS[tower], "patch_drop_rate=0.75")
    size = 64 if tower == "timm" else 224
    images = torch.randn(8, 3, size, size, generator=torch.Generator().manual_seed(0))
    whole, part = tokens(model.eval(), images), tokens(model.train(), images)
    class_tokens = getattr(image_tower(model), "num_prefix_tokens", 1)
    patches = whole.shape[1] - class_tokens
    assert part.shape[1] == class_tokens + patches // 4
    equal = (part[:, :, None] == whole[:, None]).all(-1)  # (B, kept, tokens)
    assert (equal.sum(-1) == 1).all()  # each is one of the whole image's, which differ
    places = equal.int().argmax(-1)
    assert (places[:, :class_tokens] == torch.arange(class_tokens)).all()
    chosen = [frozenset(row.tolist()) for row in places]
    assert all(len(row) == part.shape[1] for row in chosen)
    assert len(set(chosen)) == len(chosen)


def test_rate_zero_and_none_keep_all_patches():
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    counts = {tokens(built(*TOWERS["timm"], f"patch_drop_rate={x}"), images).shape[1] for x in ("0", "none")}
    assert counts == {tokens(built(*TOWERS["timm"]).eval(), images).shape[1]}


@pytest.mark.parametrize("name", ["CLIP-VMamba-Nano", "CLIP-MambaOut-Nano", "open_clip:RN50"])
def test_an_encoder_of_maps_refuses(name):
    with pytest.raises(ValueError, match=r"patch_drop_rate must be none for .*needs every patch \(got 0.5\): choose"):
        built(f"name={name}", "image_sizes=[[0, 224]]", "changes={}", "patch_drop_rate=0.5")


def test_a_run_trains_with_it_and_its_saved_model_sees_all(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "open_stream", EightPairs)
    for rate in ("none", "0.5"):
        train(tiny(*TOWERS["timm"], "steps=3", f"patch_drop_rate={rate}"), tmp_path / rate)
    losses = [series(tmp_path / rate, "loss") for rate in ("none", "0.5")]
    assert losses[0][1] != losses[1][1]
    network = models.load(str(tmp_path / "0.5")).network
    images = torch.randn(2, 3, 64, 64)
    assert tokens(network.train(), images).shape == tokens(network.eval(), images).shape
