"""Layouts of published weights are a list, to which one can be added; what shapes cannot tell is hinted or logged."""

import logging
import re

import pytest
import timm
import torch

import ssmclip
from ssmclip.models import CheckpointError, clip_config, create_clip
from ssmclip.models.networks.mamba_text import LanguageModel, read_config
from ssmclip.models.networks.registration import name_with_fields
from ssmclip.models.published.layout import LAYOUTS, Architecture, Hints, Layout, find_layout
from ssmclip.models.published.read import read_published
from ssmclip.models.published.text import build_clip_text


def weights_of_clip(name: str, **text) -> dict:
    config = clip_config(name)
    config["model_cfg"]["text_cfg"] |= text
    with torch.device("meta"):
        return create_clip(config).state_dict()


def weights_of_encoder(name: str) -> dict:
    with torch.device("meta"):
        return timm.create_model(name).state_dict()


def weights_of_clip_mamba() -> dict:
    state = {key.replace("visual.trunk.", "visual."): v for key, v in weights_of_clip("CLIP-VMamba-Nano").items()}
    return state | {"image_projection": state.pop("visual.head.proj.weight").T}


def weights_of_climp() -> dict:
    names = {"visual.trunk": "vision_encoder", "visual.head.proj": "vision_projection"}
    names |= {"text.transformer": "text_encoder", "text.proj": "text_projection"}
    pattern = re.compile("|".join(names).replace(".", r"\."))
    return {pattern.sub(lambda m: names[m[0]], key): v for key, v in weights_of_clip("CLIMP-Nano").items()}


def weights_of_text() -> dict:
    fields = dict(context_length=9, vocab_size=30, width=32, heads=2, layers=1, output_dim=8, quick_gelu=True)
    return build_clip_text(fields).state_dict()


NORM = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")


def lite_state(name: str) -> dict:
    """The weights of timm's EfficientNet-Lite under the names of its first port, which has them in the same order."""
    weights = weights_of_encoder(name)
    blocks = len({tuple(key.split(".")[:3]) for key in weights if key.startswith("blocks.")})
    names = ["_conv_stem.weight", *(f"_bn0.{part}" for part in NORM)]
    for block in range(blocks):
        parts = ["_expand_conv.weight", *(f"_bn0.{part}" for part in NORM)] if block else []
        parts += ["_depthwise_conv.weight", *(f"_bn1.{part}" for part in NORM)]
        parts += ["_project_conv.weight", *(f"_bn2.{part}" for part in NORM)]
        names += [f"_blocks.{block}.{part}" for part in parts]
    names += ["_conv_head.weight", *(f"_bn1.{part}" for part in NORM), "_fc.weight", "_fc.bias"]
    return dict(zip(names, weights.values(), strict=True))


EXAMPLES = {
    "clip": lambda: weights_of_clip("CLIP-VMamba-Nano"),
    "clip_mamba": weights_of_clip_mamba,
    "clip_text": weights_of_text,
    "climp": weights_of_climp,
    "efficientnet_lite": lambda: lite_state("tf_efficientnet_lite0"),
    "language_model": lambda: LanguageModel(
        read_config(dict(vocab_size=9, hidden_size=24, num_hidden_layers=1))
    ).state_dict(),
    "mambaout": lambda: weights_of_encoder("test_mambaout"),
    "simba": lambda: weights_of_encoder("test_simba"),
    "vmamba": lambda: weights_of_encoder("test_vmamba"),
}


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_exactly_one_layout_fits_its_own_weights_and_reads_them(name):
    state = EXAMPLES[name]()
    assert [other for other, layout in LAYOUTS.items() if layout.fits(state)] == [name]
    architecture = LAYOUTS[name].read(state, Hints())
    assert architecture.kind == LAYOUTS[name].kind
    assert find_layout(state) is LAYOUTS[name]


def test_an_error_names_every_family_of_the_list():
    with pytest.raises(CheckpointError) as error:
        ssmclip.load_published({"conv1.weight": torch.zeros(3)})
    assert all(layout.title in str(error.value) for _, layout in LAYOUTS.items())


@pytest.fixture
def registered_layout():
    """A layout that this package does not have: timm's ResNets, in capitals."""

    def read(state, hints):
        classes = len(state["FC.WEIGHT"])
        arguments = {"num_classes": classes} | ({"act_layer": hints.act_layer} if hints.act_layer else {})
        lower = {key.lower(): value for key, value in state.items()}
        return Architecture("encoder", {"architecture": "test_resnet", "model_args": arguments}, lower)

    LAYOUTS.register("loud_resnet")(Layout("loud ResNets", "encoder", lambda state: "CONV1.0.WEIGHT" in state, read))
    yield
    del LAYOUTS._items["loud_resnet"]


@torch.no_grad()
def test_a_layout_from_outside_is_read_and_named(registered_layout, tmp_path):
    model = timm.create_model("test_resnet", num_classes=5, act_layer="silu").eval()
    state = {key.upper(): value for key, value in model.state_dict().items()}
    assert "CONV1.0.WEIGHT" in state
    image = torch.randn(1, 3, 64, 64)
    torch.save({"state_dict": state}, tmp_path / "resnet.pt")
    read = ssmclip.load_published(tmp_path / "resnet.pt", act_layer="silu")
    assert torch.equal(read(image), model(image))
    with pytest.raises(CheckpointError, match="loud ResNets"):
        ssmclip.load_published({"conv1.weight": torch.zeros(3)})


# ---- what shapes cannot tell


@pytest.mark.parametrize("name", ["CLIP-VMamba-Nano", "CLIP-ViT-Nano"])
@pytest.mark.parametrize("prefix", ["", "module."])
@torch.no_grad()
def test_the_packages_own_small_clip_keeps_heads_activation_and_image_size(name, prefix):
    """4 heads of 32 channels, GELU and 96 pixels, where CLIP-Mamba's have 64 channels, QuickGELU and 224."""
    torch.manual_seed(0)
    model = create_clip(name).eval()
    held = {"epoch": 1, "state_dict": {prefix + key: value for key, value in model.state_dict().items()}}
    read = ssmclip.load_published(held)
    tokens = torch.randint(1, model.vocab_size, (3, model.context_length))
    image = torch.randn(2, 3, 96, 96)
    assert torch.equal(read.encode_text(tokens), model.encode_text(tokens))
    assert torch.equal(read.encode_image(image), model.encode_image(image))
    assert read_published(held).config["model_cfg"]["vision_cfg"]["image_size"] == 96


MAMBA2 = dict(
    model_type="mamba2",
    vocab_size=9,
    hidden_size=24,
    num_hidden_layers=1,
    num_heads=6,
    head_dim=8,
    n_groups=2,
    state_size=6,
)


def unlike_any(name: str) -> dict:
    """A CLIP with a text tower of 3 layers, which none of the package's has."""
    return weights_of_clip(name, layers=3)


@pytest.mark.parametrize(
    ("state", "hints"),
    [
        (lambda: unlike_any("CLIP-VMamba-Nano"), dict(text_heads=4, quick_gelu=False, image_size=96)),
        (weights_of_text, dict(text_heads=4, quick_gelu=False)),
        (lambda: LanguageModel(read_config(MAMBA2)).state_dict(), dict(n_groups=2, layer_norm_epsilon=1e-3)),
        (
            lambda: weights_of_encoder(
                name_with_fields("vmamba", dict(depths=[1, 1], dims=[16, 32], conv_norm="layer", conv_act=True))
            ),
            dict(conv_act=True),
        ),
        (
            lambda: timm.create_model("mambaout_femto", depths=(1, 1), dims=(12, 20), num_classes=3).state_dict(),
            dict(act_layer="silu"),
        ),
    ],
    ids=["clip", "text", "language_model", "vmamba", "mambaout"],
)
def test_a_guess_is_logged_with_the_hint_that_replaces_it(state, hints, caplog):
    caplog.set_level(logging.WARNING)
    state = state()
    read_published(state)
    guesses = [record.getMessage() for record in caplog.records]
    assert all(any(message.startswith(f"guessing {name}=") for message in guesses) for name in hints)
    caplog.clear()
    config = str(read_published(state, hints=Hints(**hints)).config)
    assert not caplog.records
    written = {"text_heads": "heads"}  # open_clip's word for it
    for name, value in hints.items():
        text = f"'{written.get(name, name)}': {value!r}"
        assert text in config or f"{name}={str(value).lower()}" in config


def test_a_hint_goes_before_a_configuration(tiny_config, tmp_path):
    ssmclip.save_model(create_clip(tiny_config), tiny_config, tmp_path)
    hints = Hints(quick_gelu=True, image_size=64)
    config = read_published(tmp_path, hints=hints).config["model_cfg"]
    assert (config["quick_gelu"], config["vision_cfg"]["image_size"]) == (True, 64)
    with pytest.raises(TypeError, match="heads"):
        ssmclip.load_published(tmp_path, heads=3)


@pytest.mark.parametrize("size", range(5))
def test_the_first_port_of_efficientnet_lite_is_timms_in_other_names(size):
    name = f"tf_efficientnet_lite{size}"
    state = lite_state(name)
    read = read_published(state)
    assert read.config == {"architecture": name, "model_args": {"num_classes": 1000}}
    assert list(read.weights) == list(weights_of_encoder(name))
    assert all(read.weights[ours] is value for ours, value in zip(read.weights, state.values(), strict=True))


def test_an_efficientnet_lite_of_other_widths_is_refused():
    state = lite_state("tf_efficientnet_lite0")
    state["_blocks.3._project_conv.weight"] = torch.empty(9, 144, 1, 1, device="meta")
    with pytest.raises(
        CheckpointError, match=r"shapes that match no architecture .*has 16 blocks of widths 16, 24, 24, 9"
    ):
        read_published(state)
    with pytest.raises(CheckpointError, match=r"_squeeze\.weight belongs to no layer of EfficientNet-Lite"):
        read_published(lite_state("tf_efficientnet_lite0") | {"_squeeze.weight": torch.zeros(1)})
