"""Maps against closed forms, hand-written formulas, float64 scans, timm's and open_clip's own outputs."""

import copy
import json
import math

import numpy as np
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.nn.functional import normalize

import ssmclip
from ssmclip import ops
from ssmclip.__main__ import main
from ssmclip.analyze.saliency import curves, scans
from ssmclip.analyze.saliency.explanation import METHODS, as_seen, resized
from ssmclip.analyze.saliency.gradcam import gradcam, usual_layer
from ssmclip.analyze.saliency.methods import mean_distance
from ssmclip.analyze.saliency.positions import embed_positions, grid_of
from ssmclip.analyze.saliency.receptive_field import logarithmic, receptive_field, share_of_area
from ssmclip.analyze.saliency.scans import Scan, recorded_scans, scans_of_call
from ssmclip.analyze.saliency.target import Target, target_of
from ssmclip.cli import explain as explain_command
from ssmclip.models import create_clip, save_model
from ssmclip.models.names import Model
from ssmclip.models.towers import encode_image
from ssmclip.ops import BACKENDS
from ssmclip.registry import UnknownName
from ssmclip.report import drawings, read_store, write_report
from ssmclip.report.figures.saliency import Saliency
from ssmclip.rows import Result, read_rows, write_rows


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=dtype)


def picture(height: int = 40, width: int = 36) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8))


def encoder(name: str, **how) -> nn.Module:
    """A timm model with random weights that are not those of its initialisation: no constants that hide mistakes."""
    torch.manual_seed(0)
    model = timm.create_model(name, **how).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


# ---- positions


def test_a_picture_is_the_mean_of_its_positions_behind_a_mean_and_a_linear_layer(tiny_clip):
    """VMamba's tower (norm, mean, linear) as a CLIP; a ResNet's class activation maps (Zhou et al. 2016, section 2)."""
    for network, images in (
        (tiny_clip[0], noise(2, 3, 64, 96)),
        (encoder("resnet18", num_classes=7), noise(2, 3, 96, 64)),
    ):
        with torch.no_grad():
            positions = embed_positions(network, images)
            assert positions.shape[1:3] == (images.shape[2] // 32, images.shape[3] // 32)
            torch.testing.assert_close(positions.mean((1, 2)), encode_image(network, images), rtol=1e-4, atol=1e-5)


ONE_POSITION = {
    "test_vmamba": dict(),
    "test_simba": dict(),
    "mambaout_femto": dict(),
    "convnext_atto": dict(),
    "swin_tiny_patch4_window7_224": dict(img_size=32, window_size=1),
    "vit_tiny_patch16_224": dict(img_size=16, class_token=False, global_pool="avg"),
    "vit_small_patch16_18x2_224": dict(img_size=16, class_token=False, global_pool="map", depth=2, embed_dim=48),
}


@pytest.mark.parametrize("name", ONE_POSITION)
def test_a_picture_of_one_position_is_that_position(name):
    """Whatever comes after the map, norms behind the mean and attention included, is applied as the tower does."""
    model = encoder(name, num_classes=9, **ONE_POSITION[name])
    side = ONE_POSITION[name].get("img_size", 32)
    images = noise(2, 3, side, side)
    with torch.no_grad():
        positions = embed_positions(model, images)
        assert positions.shape == (2, 1, 1, 9)
        torch.testing.assert_close(positions[:, 0, 0], model(images), rtol=1e-4, atol=1e-5)


def test_positions_of_a_timm_transformer_with_a_class_token_pass_its_head():
    model = encoder("vit_tiny_patch16_224", num_classes=9, img_size=(32, 48), depth=2)
    images = noise(2, 3, 32, 48)
    with torch.no_grad():
        tokens = model.forward_features(images)[:, 1:]
        expected = model.head(model.fc_norm(tokens)).reshape(2, 2, 3, 9)
        torch.testing.assert_close(embed_positions(model, images), expected)


@pytest.mark.parametrize("how", [{}, {"pool_type": "avg", "final_ln_after_pool": True}])
def test_positions_of_open_clips_transformer_are_its_own_tokens_projected(how):
    torch.manual_seed(0)
    visual = open_clip.transformer.VisionTransformer(
        image_size=32,
        patch_size=8,
        width=32,
        layers=2,
        heads=2,
        mlp_ratio=2.0,
        output_dim=16,
        output_tokens=True,
        **how,
    ).eval()
    network = nn.Module()
    network.visual = visual
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        _, tokens = visual(images)
        if how:
            tokens = visual.ln_post(tokens)
        expected = (tokens @ visual.proj).reshape(2, 4, 4, 16)
        torch.testing.assert_close(embed_positions(network, images), expected)


def test_a_position_of_clips_resnet_is_what_its_attention_gives_for_a_picture_of_one():
    torch.manual_seed(0)
    network = nn.Module()
    network.visual = open_clip.modified_resnet.ModifiedResNet([1, 1, 1, 1], 16, heads=4, image_size=32, width=8).eval()
    network.visual.attnpool.positional_embedding.data.zero_()  # then the mean and the position are the same token
    images = noise(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(embed_positions(network, images)[:, 0, 0], network.visual(images))


def test_towers_without_positions_are_refused():
    with pytest.raises(ValueError, match="has no map of positions"):
        embed_positions(nn.Linear(3, 3), noise(1, 3, 8, 8))
    with pytest.raises(ValueError, match="not take one position alone"):
        embed_positions(encoder("deit_tiny_distilled_patch16_224", img_size=32, depth=1), noise(1, 3, 32, 32))
    with pytest.raises(ValueError, match="5 positions do not form a map"):
        grid_of(5, (224, 224))


# ---- Grad-CAM


def stretched(values: torch.Tensor) -> torch.Tensor:
    """To [0, 1]."""
    return (values - values.min()) / (values.max() - values.min())


def test_gradcam_is_the_papers_formula():
    """Selvaraju et al. 2017, equations 1 and 2, from gradients taken here; then scaled as the library does."""
    model = encoder("test_vmamba", num_classes=5)
    images = noise(1, 3, 96, 64)
    features = []
    handle = model.layers[3].register_forward_hook(lambda *given: features.append(given[-1]))
    model(images)[0, 2].backward(inputs=list(model.parameters()))
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    features.clear()
    score = model(images)[0, 2]
    (gradient,) = torch.autograd.grad(score, features[0])
    handle.remove()
    weights = gradient.mean((1, 2))
    cam = F.relu((weights[:, None, None] * features[0]).sum(-1)).detach()
    assert 0 < (cam > 0).float().mean() < 1
    expected = stretched(F.interpolate(cam[None], (96, 64), mode="bilinear", align_corners=False)[0])
    model.train()
    found = gradcam(Target("2", model, place=2), images, "layers.3")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(p.grad, before[name]) for name, p in model.named_parameters() if name in before)
    assert not any(module._forward_hooks for module in model.modules())


def test_gradcam_of_a_mean_and_a_linear_layer_is_the_class_activation_map():
    """Behind the last map of a ResNet the two papers agree: the gradient is the weight of the class."""
    model = encoder("resnet18", num_classes=5)
    images = noise(1, 3, 96, 96)
    with torch.no_grad():
        cam = F.relu(torch.einsum("chw,c->hw", model.forward_features(images)[0], model.fc.weight[3]))
    expected = stretched(F.interpolate(cam[None, None], (96, 96), mode="bilinear", align_corners=False)[0])
    torch.testing.assert_close(gradcam(Target("", model, place=3), images, "layer4"), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("vit_tiny_patch16_224", "blocks.11.norm1"),
        ("swin_tiny_patch4_window7_224", "layers.3"),
        ("test_simba", "block4.0"),
        ("mambaout_femto", "stages.3"),
        ("resnet18", "layer4"),
    ],
)
def test_the_usual_layer_is_one_that_the_score_depends_on(name, layer):
    how = dict(img_size=64) if "patch" in name else {}
    model = encoder(name, num_classes=5, **how)
    assert usual_layer(model) == layer
    found = gradcam(Target("", model, place=1), noise(1, 3, 64, 64), layer)
    assert found.shape == (1, 64, 64)
    assert found.max() == pytest.approx(1, abs=1e-3)


def test_gradcam_of_open_clips_transformer(vit):
    layer = usual_layer(vit.network)
    assert layer == "visual.transformer.resblocks.1.ln_1"
    found = gradcam(target_of(vit, "a dog"), noise(2, 3, 32, 32), layer)
    assert found.shape == (2, 32, 32)
    assert found.amax((1, 2)).tolist() == pytest.approx([1, 1], abs=1e-3)


def test_gradcam_says_what_is_wrong_with_a_layer(vit, monkeypatch):
    target, images = target_of(vit, "a dog"), noise(1, 3, 32, 32)
    with pytest.raises(UnknownName, match=r"unknown layer 'visual\.conv'; did you mean 'visual\.conv1'"):
        gradcam(target, images, "visual.conv")
    with pytest.raises(ValueError, match="no map that the score depends on"):
        gradcam(target, images, "transformer.resblocks.0.ln_1")  # of the text tower
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    with pytest.raises(ValueError, match=r"pip install 'ssmclip\[explain\]'"):
        gradcam(target, images, "visual.conv1")


# ---- receptive fields


class Stack(nn.Module):
    """Two 3x3 convolutions of ones, without a nonlinearity."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Conv2d(n, 1, 3, padding=1, bias=False) for n in (3, 1)))
        for parameter in self.parameters():
            nn.init.ones_(parameter)

    def forward_features(self, x):
        return self.layers(x)

    def forward_head(self, x):
        return x.mean((2, 3))


def test_the_receptive_field_of_linear_convolutions_is_their_product():
    """Luo et al. 2016, section 2.1: uniform kernels give the coefficients of (1 + x + x^2)^2 along each axis."""
    field = receptive_field(Stack().double(), torch.rand(2, 3, 15, 13, generator=seeded(), dtype=torch.float64))
    line = np.convolve([1, 1, 1], [1, 1, 1])
    expected = np.zeros((15, 13))
    expected[5:10, 4:9] = 3 * np.outer(line, line)  # three colours
    np.testing.assert_allclose(field, expected)
    assert share_of_area(field, 1.0) == 25 / (15 * 13)
    assert share_of_area(field, (3 + 2 + 2) ** 2 / 81) == 9 / (15 * 13)
    assert share_of_area(torch.ones(11, 11), 0.5) == 81 / 121
    assert share_of_area(torch.ones(8, 8), 1.0) == 1


def test_receptive_fields_are_drawn_on_a_logarithmic_scale():
    field = torch.tensor([[1.0, 10.0, 1000.0], [0.0, 1e-3, 0.1]])
    torch.testing.assert_close(logarithmic(field), torch.tensor([[0.25, 0.5, 1.0], [0.0, 0.0, 0.0]]))


@pytest.mark.parametrize("name", ["test_vmamba", "test_simba", "mambaout_femto", "vit_nano_patch16"])
def test_receptive_fields_are_found_before_training(name):
    """Behind a LayerNorm with weights of 1 features add up to a constant, whose derivative is zero."""
    torch.manual_seed(0)
    model = timm.create_model(name)
    field = receptive_field(model, noise(1, 3, 64, 64))
    assert 0 < share_of_area(field, 0.5) <= share_of_area(field, 0.99) <= 1
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="no images"):
        receptive_field(model, noise(0, 3, 64, 64))


def test_features_that_see_nothing_are_said_to():
    network = Stack()
    nn.init.zeros_(network.layers[0].weight)
    with pytest.raises(ValueError, match="do not depend on the image"):
        receptive_field(network, noise(1, 3, 8, 8))


# ---- the scan's own attention


D64 = torch.float64


def applied(directions, outputs_by_position: bool = True) -> torch.Tensor:
    """Return what the matrices make of the inputs, (d, l), and the inputs' own part."""
    total = 0
    for scan in directions:
        total = total + torch.einsum("dij,dj->di", scan.matrices(), scan.inputs)
        if scan.D is not None:
            total = total + scan.D[:, None] * scan.inputs
    return total


def heard(run) -> ops.Call:
    calls: list[ops.Call] = []
    with ops.hearing(calls.append):
        run()
    (call,) = calls
    return call


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("softplus", [False, True])
def test_matrix_times_inputs_is_the_selective_scan(groups, softplus):
    u, delta = noise(2, 4, 9, dtype=D64), noise(2, 4, 9, seed=1, dtype=D64)
    delta = delta if softplus else delta.abs()
    A, B, C = -noise(4, 3, seed=2, dtype=D64).exp(), *(noise(2, groups, 3, 9, seed=s, dtype=D64) for s in (3, 4))
    D, bias = noise(4, seed=5, dtype=D64), noise(4, seed=6, dtype=D64) if softplus else None
    arguments = dict(D=D, delta_bias=bias, delta_softplus=softplus)
    call = heard(lambda: ops.selective_scan(u, delta, A, B, C, **arguments, backend="reference"))
    expected = ops.selective_scan(u, delta, A, B, C, **arguments, backend="reference")
    for item in range(2):
        directions, grid = scans_of_call(call, item)
        assert grid is None
        torch.testing.assert_close(applied(directions), expected[item], rtol=1e-12, atol=1e-12)


def test_the_matrix_is_the_papers_equation():
    """Ali et al. 2024, equation 11, one number at a time."""
    u, delta = noise(1, 1, 5, dtype=D64), noise(1, 1, 5, seed=1, dtype=D64).abs()
    A, B, C = (
        -noise(1, 2, seed=2, dtype=D64).exp(),
        noise(1, 1, 2, 5, seed=3, dtype=D64),
        noise(1, 1, 2, 5, seed=4, dtype=D64),
    )
    (scan,), _ = scans_of_call(heard(lambda: ops.selective_scan(u, delta, A, B, C)))
    found = scan.matrices()[0]
    for i in range(5):
        for j in range(5):
            product = [math.prod(math.exp(delta[0, 0, k] * A[0, n]) for k in range(j + 1, i + 1)) for n in range(2)]
            alpha = (
                sum(C[0, 0, n, i] * product[n] * delta[0, 0, j] * B[0, 0, n, j] for n in range(2)) if j <= i else 0.0
            )
            assert float(found[i, j]) == pytest.approx(float(alpha), abs=1e-12)
    torch.testing.assert_close(scan.attention(), found.abs())


@pytest.mark.parametrize("projected", [False, True])
@pytest.mark.parametrize(("k", "state"), [(4, 1), (4, 3), (2, 1), (1, 1)])
def test_matrices_of_all_directions_times_the_map_are_the_cross_scan(projected, k, state):
    b, h, w, d, r = 2, 3, 4, 5, 2
    x = noise(b, h, w, d, dtype=D64)
    delta, weight = noise(b, k, h, w, r if projected else d, seed=1, dtype=D64), noise(k, d, r, seed=7, dtype=D64)
    A = -noise(k, d, state, seed=2, dtype=D64).exp()
    B, C = (noise(b, k, h, w, state, seed=s, dtype=D64) for s in (3, 4))
    D, bias = noise(k, d, seed=5, dtype=D64), noise(k, d, seed=6, dtype=D64)
    how = dict(D=D, delta_bias=bias, delta_weight=weight if projected else None, backend="reference")
    call = heard(lambda: ops.cross_selective_scan(x, delta, A, B, C, **how))
    expected = ops.cross_selective_scan(x, delta, A, B, C, **how)
    for item in range(b):
        directions, grid = scans_of_call(call, item)
        assert grid == (h, w)
        assert len(directions) == k == len(scans.DIRECTIONS[k])
        torch.testing.assert_close(applied(directions).T.reshape(h, w, d), expected[item], rtol=1e-11, atol=1e-11)


def test_each_direction_reads_what_comes_before_it_on_the_map():
    """Row by row from the top left, column by column, and the two backwards: by hand on a map of 2 x 3."""
    ones = lambda *shape: torch.ones(*shape, dtype=D64)  # noqa: E731
    call = heard(
        lambda: ops.cross_selective_scan(
            ones(1, 2, 3, 1), ones(1, 4, 2, 3, 1), -ones(4, 1, 1), ones(1, 4, 2, 3, 1), ones(1, 4, 2, 3, 1)
        )
    )
    rows, columns, rows_back, columns_back = (scan.matrices()[0] > 0 for scan in scans_of_call(call)[0])
    place = 1 * 3 + 1  # row 1, column 1
    assert rows[place].reshape(2, 3).tolist() == [[True, True, True], [True, True, False]]
    assert columns[place].reshape(2, 3).tolist() == [[True, True, False], [True, True, False]]
    assert rows_back[place].reshape(2, 3).tolist() == [[False, False, False], [False, True, True]]
    assert columns_back[place].reshape(2, 3).tolist() == [[False, False, True], [False, True, True]]


def test_matrix_times_inputs_is_mamba_2s_scan():
    b, length, h, p, g, n = 2, 7, 4, 3, 2, 5
    x, dt = noise(b, length, h, p, dtype=D64), noise(b, length, h, seed=1, dtype=D64)
    A, B, C = -noise(h, seed=2, dtype=D64).exp(), *(noise(b, length, g, n, seed=s, dtype=D64) for s in (3, 4))
    how = dict(
        D=noise(h, seed=5, dtype=D64), dt_bias=noise(h, seed=6, dtype=D64), dt_softplus=True, dt_limit=(0.2, 1.0)
    )
    call = heard(lambda: ops.ssd(x, dt, A, B, C, **how, backend="reference"))
    expected = ops.ssd(x, dt, A, B, C, **how, backend="reference")
    for item in range(b):
        (scan,), _ = scans_of_call(call, item)
        found = torch.einsum("hij,jhp->ihp", scan.matrices(), x[item]) + how["D"][:, None] * x[item]
        torch.testing.assert_close(found, expected[item], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(applied([scan]), expected[item].mean(-1).T, rtol=1e-12, atol=1e-12)


def test_attention_does_not_depend_on_the_size_of_its_parts(monkeypatch):
    scan = Scan(
        *(noise(6, 8, seed=s).abs() for s in (0, 1)),
        -noise(6, 2).exp(),
        noise(3, 2, 8),
        noise(3, 2, 8),
        torch.arange(8),
    )
    whole = scan.attention()
    torch.testing.assert_close(whole, scan.matrices().abs().mean(0))
    monkeypatch.setattr(scans, "PART", 2 * 64)
    torch.testing.assert_close(scan.attention(), whole)
    monkeypatch.setattr(scans, "MAX_POSITIONS", 7)
    with pytest.raises(ValueError, match="at most 7 positions for its matrix"):
        scan.attention()


MAMBA = {"hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "vocab_size": 49408}
MAMBA_2 = {**MAMBA, "model_type": "mamba2", "num_heads": 4, "head_dim": 8, "n_groups": 2}


def with_text(tiny_config: dict, fields: dict) -> dict:
    config = copy.deepcopy(tiny_config)
    config["model_cfg"]["text_cfg"] = {"mamba": fields, "context_length": 12}
    return config


def recorded_equals_reference(network, forward, layers: list[str]) -> None:
    """Each recorded scan's matrices give what the reference computes from the recorded arguments, in float64."""
    calls: list[ops.Call] = []
    with torch.no_grad(), ops.hearing(calls.append):
        plain = forward()
    calls = [call for call in calls if call.backends is not BACKENDS["causal_conv1d"]]
    found = recorded_scans(network, lambda: torch.testing.assert_close(forward(), plain, rtol=0, atol=0))
    assert [scanned.layer for scanned in found] == layers
    for call, scanned in zip(calls, found, strict=True):
        arguments = list(call.arguments)
        if call.backends is not BACKENDS["cross_selective_scan"]:
            arguments[6] = None  # z, the gate, which comes after the scan
        expected = call.backends["reference"].run(*arguments)[0]
        if call.backends is BACKENDS["ssd"]:
            expected = expected.mean(-1).T
        elif call.backends is BACKENDS["cross_selective_scan"]:
            expected = expected.flatten(0, 1).T
        torch.testing.assert_close(applied(scanned.directions), expected, rtol=1e-8, atol=1e-10)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in network.modules())


def test_the_scans_of_image_towers_are_recorded_with_their_layers():
    of_vmamba = [f"layers.{i}.blocks.0.op" for i in range(4)]
    for name, how, layers in (
        ("test_vmamba", {}, of_vmamba),
        ("test_vmamba", {"directions": 2}, of_vmamba),
        ("test_simba", {}, [*(f"block{i}.0.attn.mamba" for i in range(1, 5)), "post_network.0.attn.mamba"]),
    ):
        model = encoder(name, **how).double()
        images = noise(2, 3, 64, 96, dtype=D64)
        recorded_equals_reference(model, lambda model=model, images=images: model(images), layers)


@pytest.mark.parametrize("fields", [MAMBA, MAMBA_2], ids=["mamba", "mamba2"])
def test_the_scans_of_text_towers_are_recorded_with_their_layers(tiny_config, fields):
    torch.manual_seed(0)
    model = create_clip(with_text(tiny_config, fields)).eval().double()
    tokens = torch.randint(1, 49000, (1, 9), generator=seeded())
    layers = [f"text.transformer.layers.{i}.mixer" for i in range(2)]
    recorded_equals_reference(model, lambda: model.encode_text(tokens), layers)


def test_a_block_that_scans_after_its_own_parts_is_named():
    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.before = nn.Sequential(nn.Linear(4, 4))

        def forward(self, x):
            x = self.before(x)
            return ops.selective_scan(x, x.abs(), -torch.ones(4, 1), x[:, :1], x[:, 1:2])

    network = nn.Sequential(Mixer(), Mixer())
    assert [found.layer for found in recorded_scans(network, lambda: network(noise(1, 4, 4)))] == ["0", "1"]


def test_a_model_without_scans_has_none(vit):
    assert recorded_scans(vit.network, lambda: vit.network.encode_image(noise(1, 3, 32, 32))) == []


def test_mean_distance_of_known_attention():
    assert mean_distance(torch.eye(6), (2, 3), (8.0, 8.0)) == 0
    one = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert mean_distance(one, (1, 2), (5.0, 3.0)) == pytest.approx(3)
    assert mean_distance(torch.ones(2, 2), (2, 1), (5.0, 3.0)) == pytest.approx(2.5)


# ---- deletion and insertion


def test_curves_of_a_known_score():
    """The score is the share of a set's pixels that are there; a map that knows the set removes them first."""
    image = torch.ones(1, 20, 20)
    inside = torch.zeros(20, 20)
    inside[:5] = 1  # a quarter

    def score(images):
        return (images[:, 0] * inside).sum((1, 2)) / inside.sum()

    best, worst = curves.deletion(score, image, inside, 20), curves.deletion(score, image, 1 - inside, 20)
    torch.testing.assert_close(best, (1 - torch.arange(21) / 5).clamp(min=0))
    assert curves.area(best) == pytest.approx(0.25 / 2)
    assert curves.area(worst) == pytest.approx(1 - 0.25 / 2)
    image = image * 0
    image[:, :5] = 1
    sharp = curves.insertion(lambda x: (x[:, 0] == image[0]).float().mean((1, 2)), image, inside, 4, batch_size=2)
    blurry = curves.blurred(image)
    assert sharp[-1] == 1
    assert sharp[0] == (blurry == image).float().mean()


def test_curves_begin_and_end_with_the_pictures_themselves():
    image, seen = noise(3, 16, 12), []
    curves.insertion(lambda x: seen.extend(x) or x.sum((1, 2, 3)), image, noise(16, 12), 7, batch_size=3)
    assert len(seen) == 8
    assert torch.equal(seen[-1], image)
    assert torch.equal(seen[0], curves.blurred(image))
    curves.deletion(lambda x: seen.extend(x) or x.sum((1, 2, 3)), image, noise(16, 12), 2)
    assert torch.equal(seen[8], image)
    assert (seen[9] == 0).sum() == image.numel() // 2
    assert not seen[10].any()
    with pytest.raises(ValueError, match="at least 1 step"):
        curves.deletion(lambda x: x, image, noise(16, 12), 0)


def test_a_map_of_another_size_is_refused(untyped):
    with pytest.raises(ValueError, match=r"the map must have the image's \(16, 12\) pixels"):
        curves.deletion(lambda x: x, noise(3, 16, 12), noise(4, 4), 2)


# ---- explanations


class Colours(nn.Module):
    """A classifier whose map is the picture, eight times smaller, and whose classes are the three colours."""

    num_classes = 3
    feature_info = ({"module": "pool"},)

    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(8)
        self.weight = nn.Parameter(torch.ones(1))

    def forward_features(self, x):
        return self.pool(self.weight * x)

    def forward_head(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        return self.forward_head(self.forward_features(x))


@pytest.fixture
def colours() -> tuple[Model, Image.Image]:
    """A picture with a red square below on the left, on green."""
    seen = Image.new("RGB", (64, 64), (0, 255, 0))
    seen.paste((255, 0, 0), (8, 40, 24, 56))
    preprocess = open_clip.image_transform(64, is_train=False, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    return Model(Colours().eval(), preprocess, None, "colours", classes=("red", "green, lime", "blue")), seen


@pytest.mark.parametrize("method", ["similarity", "gradcam"])
def test_a_square_is_found_where_it_is(colours, method):
    model, seen = colours
    (found,) = ssmclip.explain(model, {"square": seen}, "red", [method], steps=8)
    assert (found.query, found.picture, found.method, found.model) == ("red", "square", method, "colours")
    assert np.array_equal(found.seen, seen)
    values = resized(found.maps["red"], (8, 8))
    marked = torch.zeros(8, 8, dtype=torch.bool)
    marked[5:7, 1:3] = True
    assert values[marked].min() > values[~marked].max()
    numbers = {number.metric: number.value for number in found.numbers}
    assert numbers["target_score"] == pytest.approx((16 * 16 - (64 * 64 - 16 * 16)) / 64**2)  # red is 1, green -1
    # Nothing but the square is red: without it (grey is 0) the probability grows no further, with it first it rises.
    reverse = ssmclip.explain(model, seen, "green, lime", [method], steps=8)[0]
    assert reverse.numbers[1].value != numbers["deletion"]
    assert numbers["deletion"] < numbers["insertion"] + 1


def test_the_most_probable_class_is_meant_where_none_is_given(colours):
    model, seen = colours
    assert ssmclip.explain(model, seen, steps=0)[0].query == "green, lime"
    for text in ("lime", "1", " GREEN, lime"):
        assert ssmclip.explain(model, seen, text, steps=0)[0].query == "green, lime"
    with pytest.raises(UnknownName, match="unknown class of colours 'rde'; did you mean 'red'"):
        ssmclip.explain(model, seen, "rde")


def test_a_target_is_the_models_own_similarity_and_probability(tiny_clip):
    model = Model(*tiny_clip, label="tiny")
    network, _, tokenizer = tiny_clip
    images = noise(3, 3, 32, 32)
    with torch.no_grad():
        features = normalize(network.encode_image(images), dim=-1)
        texts = normalize(network.encode_text(tokenizer(["a dog", "a cat"])), dim=-1)
        one, two = target_of(model, "a dog"), target_of(model, "a dog", ["a cat"])
        torch.testing.assert_close(one.score(images), features @ texts[0])
        torch.testing.assert_close(one.probability(images), features @ texts[0])
        expected = (network.logit_scale.exp() * features @ texts.T).softmax(-1)[:, 0]
        torch.testing.assert_close(two.probability(images), expected)
    assert (one.unit, two.unit) == ("cosine similarity", "probability")
    with pytest.raises(ValueError, match="needs a text to look for"):
        target_of(model, None)
    with pytest.raises(ValueError, match="must differ"):
        target_of(model, "a dog", ["a dog"])


def test_pictures_are_shown_as_the_model_sees_them(tiny_clip):
    preprocess = tiny_clip[1]
    seen = as_seen(preprocess, preprocess(picture()))
    resize, crop, *_ = preprocess.transforms
    expected = crop(resize(picture()))
    assert np.abs(np.asarray(seen, int) - np.asarray(expected, int)).max() <= 1
    grey = as_seen(None, torch.stack([torch.linspace(-2, 3, 4)[None].expand(1, 4)] * 3))
    assert np.asarray(grey).min() == 0
    assert np.asarray(grey).max() == 255


def test_the_maps_of_a_scan_are_rows_of_its_matrix(tiny_clip):
    model = Model(*tiny_clip, label="tiny")
    image = tiny_clip[1](picture())[None]
    layer = "visual.trunk.layers.1.blocks.0.op"
    (found,) = ssmclip.explain(model, picture(), methods=["scan"], layer=layer, position=(0.99, 0.0))
    directions = next(
        s for s in recorded_scans(model.network, lambda: model.network.encode_image(image)) if s.layer == layer
    ).directions
    attention = [scan.matrices().abs().mean(0) for scan in directions]
    assert list(found.maps) == [*scans.DIRECTIONS[4], "all directions", "read by all"]
    for matrix, values in zip([*attention, sum(attention)], list(found.maps.values())[:5], strict=True):
        torch.testing.assert_close(values, matrix[3].reshape(4, 4), rtol=1e-5, atol=0)
    torch.testing.assert_close(found.maps["read by all"], sum(attention).mean(0).reshape(4, 4), rtol=1e-5, atol=0)
    assert found.layer == layer
    assert [number.metric for number in found.numbers] == ["attention_distance"]  # no text, so nothing to judge by


def test_every_method_leaves_the_model_as_it_was(tiny_config):
    torch.manual_seed(0)
    network = create_clip(with_text(tiny_config, MAMBA)).train()
    tokenizer = open_clip.SimpleTokenizer(context_length=12)
    preprocess = open_clip.image_transform(64, is_train=False)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    model = Model(network, preprocess, tokenizer, "tiny")
    fresh = create_clip(with_text(tiny_config, MAMBA))
    found = ssmclip.explain(model, [picture(), picture(80, 60)], "a dog", list(METHODS), steps=2, untrained=fresh)
    assert [one.method for one in found] == [
        *["similarity"] * 2,
        *["gradcam"] * 2,
        "receptive-field",
        *["scan"] * 2,
        "text-scan",
    ]
    assert all(values.isfinite().all() for one in found for values in one.maps.values())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert all(module.training for module in network.modules())
    assert all(p.requires_grad and p.grad is None for p in network.parameters())
    together = found[4]
    assert (together.picture, together.seen, list(together.maps)) == (
        "2 pictures",
        None,
        ["trained", "before training"],
    )
    rows = [row for one in found for row in one.rows()]
    assert len({row.key for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ({"methods": ["similarities"]}, "unknown method of explanation 'similarities'; did you mean 'similarity'"),
        ({"methods": ["scan"], "layer": "visual"}, "unknown layer with a scan 'visual'"),
        ({"methods": ["text-scan"]}, "the text tower of tiny has no state-space scan"),
        ({"position": (0.5, 1.5)}, "position must be shares of width and height"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"text": None}, "tiny needs a text to look for"),
        ({"pictures": []}, "no pictures given"),
        ({"pictures": [b"none"]}, "broken image"),
    ],
)
def test_what_cannot_be_explained_is_said(tiny_clip, how, told):
    arguments = {"pictures": picture(), "text": "a dog", "steps": 1} | how
    with pytest.raises((ValueError, UnknownName)) as error:
        ssmclip.explain(Model(*tiny_clip, label="tiny"), **arguments)
    assert told in str(error.value)


# ---- the command, rows and figures


@pytest.fixture
def run(tiny_config, tmp_path):
    config = with_text(tiny_config, MAMBA)
    config["model_cfg"]["vision_cfg"]["image_size"] = 64
    torch.manual_seed(0)
    save_model(create_clip(config), config, tmp_path / "run")
    return tmp_path / "run"


def test_the_command_writes_rows_and_figures_that_the_report_shows(run, tmp_path, capsys):
    for name in ("a", "b"):
        picture().save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes(b"none")
    text = "<b>a dog</b> & $\\frac{$"
    out = tmp_path / "out"
    files = [str(tmp_path / f"{name}.png") for name in ("a", "broken", "b")]
    how = [
        "--text",
        text,
        "--against",
        "a cat,a bird",
        "--model",
        str(run),
        "--method",
        ",".join(METHODS),
        "--steps",
        "3",
    ]
    assert main(["explain", *files, *how, "--out", str(out)]) == 1
    printed, err = capsys.readouterr()
    assert "1 of 3 pictures could not be read" in err
    assert f"{files[1]}: broken image" in err
    _, rows = read_rows(out / "rows.jsonl")
    shown = [row for row in rows if "saliency" in row.extra]
    assert [row.where["method"] for row in shown] == [
        *["similarity"] * 2,
        *["gradcam"] * 2,
        "receptive-field",
        *["scan"] * 2,
        "text-scan",
    ]
    assert {row.metric for row in rows if row.where["method"] == "similarity"} == {
        "target_score",
        "deletion",
        "insertion",
    }
    assert {row.where.get("case") for row in rows if row.where["method"] == "receptive-field"} == {
        "trained",
        "before training",
    }
    assert shown[0].extra["score"] == "probability"
    assert len((out / "rows.jsonl").read_bytes()) < 200_000
    assert "largest at 0." in printed
    figures = sorted(out.glob("*.png"))
    assert len(figures) == 8
    for path in figures:
        with Image.open(path) as drawn:
            assert min(drawn.size) > 250
    (found,) = ssmclip.explain(ssmclip.load(run), files[0], text, against=["a cat", "a bird"], steps=3)
    assert [row.value for row in found.rows()] == pytest.approx([row.value for row in rows[:3]])
    page = write_report([out / "rows.jsonl"], tmp_path / "page").read_text(encoding="utf-8")
    assert text not in page
    assert page.count("What run looks at") >= 8


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--method", "similar", "--text", "a"], "unknown method of explanation 'similar'"),
        ([], "needs a text to look for"),
        (["--method", "gradcam", "--text", "a", "--layer", "visual.trunk.layer"], "unknown layer"),
    ],
)
def test_the_command_says_what_is_wrong_in_one_line(run, tmp_path, words, told, capsys):
    picture().save(tmp_path / "a.png")
    assert main(["explain", str(tmp_path / "a.png"), "--model", str(run), *words]) == 1
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 1
    assert told in err[0]


def test_the_figure_shows_the_values_of_the_row(colours, tmp_path):
    model, seen = colours
    (found,) = ssmclip.explain(model, {"square": seen}, "red", steps=0)
    write_rows(tmp_path / "rows.jsonl", found.rows())
    (drawn,) = [drawn for drawn in drawings(read_store([tmp_path / "rows.jsonl"])) if isinstance(drawn, Saliency)]
    values = {(entry["row"], entry["column"]): entry["value"] for entry in drawn.frame()}
    assert values == {
        (i, j): pytest.approx(v, rel=1e-3)
        for i, line in enumerate(found.maps["red"].tolist())
        for j, v in enumerate(line)
    }
    left, right = drawn.plot().axes
    np.testing.assert_allclose(right.images[-1].get_array(), found.maps["red"], rtol=1e-3)
    assert (left.get_title("left"), right.get_title("left")) == ("square", "red")


def test_rows_that_hold_something_else_are_refused(tmp_path):
    for number, bad in enumerate(
        (
            {"maps": []},
            {
                "query": "",
                "name": "",
                "method": "x",
                "picture": "no",
                "span": None,
                "maps": [{"title": "", "values": [[1]]}],
            },
        )
    ):
        file = tmp_path / f"{number}.jsonl"
        write_rows(file, [Result("A", "saliency", "target_score", 0.5, extra={"saliency": bad})])
        with pytest.raises(ValueError, match=r"does not contain|a row's thumbnail must be"):
            write_report([file], tmp_path / "page")


def test_the_help_names_every_method():
    assert explain_command.METHODS.split(", ") == list(METHODS)


def test_rows_are_json(tiny_clip):
    rows = ssmclip.explain(Model(*tiny_clip, label="tiny"), picture(), "a dog", steps=2)[0].rows()
    assert json.loads(json.dumps(rows[0].extra)) == rows[0].extra
