"""Second derivatives against dense Hessians, spectra that are known, and what is refused."""

import argparse
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import ssmclip
from ssmclip.analyze.curvature import park_kim
from ssmclip.analyze.curvature.batches import read_batches
from ssmclip.analyze.curvature.estimate import density, trace
from ssmclip.analyze.curvature.hessian import SpectrumSettings, batch_rows
from ssmclip.analyze.curvature.landscape import filter_normalised_direction, loss_at
from ssmclip.analyze.curvature.parameters import only_read_rows, tower_parameters
from ssmclip.analyze.curvature.product import Hessian, NotTwiceDifferentiable, OutOfMemory
from ssmclip.analyze.curvature.spectrum import extreme_eigenvalues, hessian_eigenvalues
from ssmclip.analyze.curvature.summary import summary_rows
from ssmclip.cli import analyze as command
from ssmclip.config import apply_overrides, load_recipe
from ssmclip.models import create_clip, load_config
from ssmclip.ops import using
from ssmclip.report.figures.curvature import Contour, EigenvaluesOverTraining
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.objective import OBJECTIVES, classification_loss, contrastive_loss
from ssmclip.train.state import seed_everything


def quadratic(eigenvalues, dtype=torch.float64):
    """A loss whose Hessian has these eigenvalues, in a random basis, and its variable."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(n)
    Q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    H = (Q * torch.tensor(eigenvalues, dtype=torch.float64)) @ Q.T
    H = ((H + H.T) / 2).to(dtype)
    x = torch.ones(n, dtype=dtype, requires_grad=True)
    return (lambda: 0.5 * x @ H @ x), x


def bulk(n, low=-1.0, high=1.0):
    return np.random.default_rng(n).uniform(low, high, n).tolist()


SPECTRA = {
    "one": ([3.0], 1),
    "one zero": ([0.0], 1),
    "all": ([3.0, -1.0, 2.0, 0.5], 4),
    "nearly all": (bulk(30), 29),
    "zero": ([0.0] * 50, 5),
    "identity": ([2.0] * 100, 5),
    "low rank": ([10.0, 9, 3] + [0.0] * 300, 5),
    "equal at both ends": ([10, 10, 10, 9.999, 9, *bulk(120), -5, -5], 5),
    "five equal": ([10] * 5 + bulk(150) + [-5] * 7, 5),
    "clustered": ([10, 9.999, 9.998, 9.99, 9.9, *bulk(120), -4, -4.001], 5),
    "outliers": ([128.0, 64, 58, 42, 33, *bulk(300, -8, 8), -28, -23, -20, -14, -12.6], 5),
    "no gap": (bulk(150), 3),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECTRA)
def test_eigenvalues_of_a_quadratic(name, dtype):
    eigenvalues, k = SPECTRA[name]
    loss, x = quadratic(eigenvalues, dtype)
    calls = []
    r = hessian_eigenvalues(loss, [x], k=k, progress=calls.append)
    rising = torch.tensor(sorted(eigenvalues), dtype=torch.float64)
    top = rising[rising.abs().argsort(descending=True)][:k]
    atol = 1e-5 * float(rising.abs().max())
    torch.testing.assert_close(r.largest, rising.flip(0)[:k], rtol=1e-3, atol=atol)
    torch.testing.assert_close(r.smallest, rising[:k], rtol=1e-3, atol=atol)
    torch.testing.assert_close(r.by_magnitude.abs(), top.abs(), rtol=1e-3, atol=atol)
    assert r.converged.largest.all()
    assert r.converged.smallest.all()
    assert r.products == len(calls) == calls[-1]
    assert r.products <= len(eigenvalues)


def test_products_are_counted_where_they_are_taken():
    loss, x = quadratic([5.0, 4, *bulk(60)])
    hessian = Hessian(loss, [x])
    taken, product = [], hessian.__class__.__call__

    class Counted(Hessian):
        def __call__(self, vector):
            taken.append(1)
            return product(self, vector)

    counted = Counted(loss, [x])
    assert extreme_eigenvalues(counted, 2).products == len(taken) == counted.products


def test_residuals_are_true_and_vectors_eigenvectors():
    loss, x = quadratic([128.0, 64, 58, *bulk(400, -8, 8), -28])
    hessian = Hessian(loss, [x])
    r = extreme_eigenvalues(hessian, 3, tol=1e-2, copies=False, vectors=True)
    for end in ("largest", "smallest"):
        columns = (getattr(part, end) for part in (r, r.residuals, r.vectors))
        for value, residual, vector in zip(*columns, strict=True):
            true = (hessian(vector) - value * vector).norm() / value.abs()
            torch.testing.assert_close(true, residual, rtol=1e-3, atol=1e-8)
            assert residual <= 1e-2
    assert r.residuals.smallest.max() > 1e-4  # stopped early enough for residuals to be compared


def test_a_restarted_basis_finds_the_same(monkeypatch):
    monkeypatch.setattr("ssmclip.analyze.curvature.spectrum.MAX_BASIS", 24)
    eigenvalues = [20.0, 15, 12, *bulk(600, -8, 8), -11]
    loss, x = quadratic(eigenvalues)
    r = hessian_eigenvalues(loss, [x], k=3, copies=False)
    assert r.products > 24
    torch.testing.assert_close(r.largest, torch.tensor([20.0, 15, 12], dtype=torch.float64), rtol=1e-5, atol=0)
    assert r.converged.smallest.all()


def test_what_is_not_converged_is_marked():
    loss, x = quadratic(bulk(500))
    r = hessian_eigenvalues(loss, [x], k=3, max_products=8)
    assert r.products == 8
    assert not r.converged.largest.any()
    assert (r.found_after.largest == -1).all()


def test_least_squares():
    """The Hessian of |XW - Y|^2 is 2 I (x) X'X: every eigenvalue as many times as there are outputs."""
    generator = torch.Generator().manual_seed(0)
    X, Y = (torch.randn(60, n, generator=generator, dtype=torch.float64) for n in (20, 4))
    W = torch.zeros(20, 4, dtype=torch.float64, requires_grad=True)
    r = hessian_eigenvalues(lambda: ((X @ W - Y) ** 2).sum(), [W], k=6)
    eigenvalues = torch.from_numpy(np.linalg.eigvalsh(2 * X.T.numpy() @ X.numpy())).repeat_interleave(4)
    torch.testing.assert_close(r.largest, eigenvalues.flip(0)[:6], rtol=1e-4, atol=0)
    torch.testing.assert_close(r.smallest, eigenvalues[:6], rtol=1e-4, atol=0)


IMAGE_TOWERS = {
    "vmamba": lambda: timm.create_model("test_vmamba", depths=(1,), dims=(4,), num_classes=4),
    "simba": lambda: timm.create_model(
        "test_simba", depths=(1, 1), dims=(4, 4), mlp_ratios=(1, 1), stem_dim=4, d_state=2, num_classes=4
    ),
    "vit": lambda: timm.create_model(
        "vit_nano_patch16", img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2, mlp_ratio=1, num_classes=4
    ),
}


def tiny_clip_of(image: str, text: str) -> nn.Module:
    """A CLIP of some hundred parameters in float64, weights large enough for curvature everywhere."""
    torch.manual_seed(0)
    words = {"context_length": 4, "vocab_size": 6, "width": 4, "heads": 2, "layers": 1}
    if text == "bag":
        words = {"context_length": 4, "vocab_size": 6, "width": 4, "layers": 0}
    if text == "mamba":
        mamba = dict(model_type="mamba", vocab_size=6, hidden_size=4, num_hidden_layers=1, state_size=2)
        words = {"context_length": 4, "mamba": mamba}
    vision = {"image_size": 8, "layers": 1, "width": 8, "patch_size": 4, "head_width": 4}
    model = create_clip({"model_cfg": {"embed_dim": 4, "vision_cfg": vision, "text_cfg": words}})
    model.visual = IMAGE_TOWERS[image]()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn(p.shape))
    return model.double().eval()


def tiny_batch(n: int = 4):
    generator = torch.Generator().manual_seed(1)
    texts = torch.randint(1, 5, (n, 4), generator=generator)
    texts[:, 3] = 5
    return torch.randn(n, 3, 8, 8, generator=generator, dtype=torch.float64), texts


ROWS = 40  # of a dense Hessian, spread over all parameters


def dense(loss, parameters, places=slice(None)):
    """Row by row: the gradient of every entry of the gradient, or of those at `places`."""
    grads = torch.autograd.grad(loss, parameters, create_graph=True)
    flat = torch.cat([g.reshape(-1) for g in grads])
    rows = [torch.autograd.grad(g, parameters, retain_graph=True, materialize_grads=True) for g in flat[places]]
    return torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in rows])


@pytest.mark.parametrize(("image", "text"), [("vmamba", "attention"), ("simba", "attention"), ("vit", "mamba")])
def test_products_are_those_of_the_dense_hessian(image, text):
    model, batch = tiny_clip_of(image, text), tiny_batch()
    hessian = Hessian(lambda: contrastive_loss(model, *batch), model)
    places = list(range(0, hessian.size, max(1, hessian.size // ROWS)))
    with using("reference"), sdpa_kernel(SDPBackend.MATH):
        rows = dense(contrastive_loss(model, *batch), list(model.parameters()), places)
    vectors = torch.randn(hessian.size, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wanted = rows @ vectors
    for v, product in zip(vectors.T, wanted.T, strict=True):
        assert (hessian(v)[places] - product).norm() < 1e-9 * product.norm()
    r = extreme_eigenvalues(hessian, 2, tol=1e-6, copies=False, vectors=True)
    for end in ("largest", "smallest"):
        for value, v in zip(getattr(r, end), getattr(r.vectors, end), strict=True):
            assert (rows @ v - value * v[places]).norm() <= 2e-6 * value.abs()
    # The same in float32, on the kernels that such a model takes.
    single = Hessian(lambda: contrastive_loss(model, batch[0].float(), batch[1]), model.float())
    for v, product in zip(vectors.T, wanted.T, strict=True):
        assert (single(v.float())[places] - product).norm() < 2e-3 * product.norm()


@pytest.mark.parametrize(("text", "left_out"), [("attention", 2), ("bag", 2), ("tied", 0)])
def test_rows_that_no_text_reads_are_left_out_and_nothing_changes(text, left_out):
    model, (images, texts) = tiny_clip_of("vit", "bag" if text == "tied" else text), tiny_batch()
    texts[texts == 2] = 3
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding))

    def loss(model, *batch):
        other = table.weight[0].square().sum() if text == "tied" else 0.0
        return contrastive_loss(model, *batch) + other

    assert set(texts.flatten().tolist()) == {1, 3, 4, 5}
    whole = Hessian(lambda: loss(model, images, texts), model)
    wanted = extreme_eigenvalues(whole, 3, tol=1e-8, copies=False)
    with only_read_rows(model, dict(model.named_parameters()), lambda: loss(model, images, texts)) as varied:
        assert whole.size - Hessian(lambda: loss(model, images, texts), varied).size == left_out * table.embedding_dim
    rows = batch_rows(
        model, images, texts, SpectrumSettings(k=3, tol=1e-8), model_name="m", where={"batch": 0}, loss=loss
    )
    found = {row.metric: row.value for row in rows}
    for end in ("largest", "smallest", "by_magnitude"):
        values = [found[f"{end}_{i}"] for i in (1, 2, 3)]
        torch.testing.assert_close(torch.tensor(values, dtype=torch.float64), getattr(wanted, end), rtol=1e-9, atol=0)
    assert not table._forward_hooks


def test_classification_loss():
    model = IMAGE_TOWERS["vmamba"]().double().eval()
    images, labels = tiny_batch()[0], torch.tensor([0, 1, 2, 3])
    hessian = Hessian(lambda: classification_loss(model, images, labels), model)
    places = list(range(0, hessian.size, max(1, hessian.size // ROWS)))
    with using("reference"):
        loss = -model(images).log_softmax(1)[range(4), labels].mean()
        rows = dense(loss, list(model.parameters()), places)
    v = torch.randn(hessian.size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(hessian(v)[places], rows @ v, rtol=1e-9, atol=1e-12)


def test_towers_are_blocks_of_the_whole():
    model = tiny_clip_of("vit", "attention")
    whole, image, text = (tower_parameters(model, tower) for tower in ("whole", "image", "text"))
    assert {*image, *text, "logit_scale"} == {*whole}
    assert not {*image} & {*text}
    assert {id(p) for p in image.values()} == {id(p) for p in model.visual.parameters()}
    with pytest.raises(ValueError, match="whole, image, text"):
        tower_parameters(model, "vision")


class FirstOrderOnly(torch.autograd.Function):
    """x^3 whose gradient is right and carries no graph: what most Mamba kernels are."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, dy):
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return (3 * x**2 * dy).detach()


class Cube(nn.Module):
    def forward(self, x):
        return FirstOrderOnly.apply(x)


class Once(nn.Module):
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx, dy):
            return dy

    def forward(self, x):
        return self.Function.apply(x)


@pytest.mark.parametrize("bad", [Cube, Once])
@pytest.mark.parametrize("last", [True, False])
def test_a_module_that_is_not_twice_differentiable_is_named(bad, last):
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Tanh(), bad(), *([] if last else [nn.Linear(6, 6)])]
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Sequential(*layers)).double()
    x = torch.randn(9, 6, dtype=torch.float64)
    with pytest.raises(NotTwiceDifferentiable, match=rf"module '2.2' \({bad.__name__}\)"):
        hessian_eigenvalues(lambda: model(x).square().mean(), model, k=2)


def test_bad_input_is_told():
    x = torch.ones(3, requires_grad=True)
    cases = [
        (lambda: x.sum() / 0, [x], dict(k=1), r"the loss must be finite \(got inf"),
        (lambda: (x - 1).square().sum().sqrt(), {"weight": x}, dict(k=1), "gradient is not finite.*weight"),
        (lambda: x.square().sum(), [x], dict(k=4), "k must be at most 3.*got 4"),
        (lambda: x.square().sum(), [x], dict(k=0), r"k must be at least 1 \(got 0\)"),
        (lambda: x.square().sum(), [x], dict(k=1, tol=0.0), r"tol must be .* \(got 0"),
        (lambda: x.square().sum(), [x], dict(k=1, which="middle"), "which must be 'both'"),
        (lambda: x.square().sum(), [x.detach()], dict(k=1), "no parameter has requires_grad"),
        (lambda: x.detach().sum(), [x], dict(k=1), "under no_grad, or detached"),
        (lambda: x.square().sum(), [torch.ones(2, requires_grad=True)], dict(k=1), "does not depend on any"),
        (lambda: x.square().sum(), [x.half().detach().requires_grad_()], dict(k=1), "float16"),
    ]
    for loss, parameters, options, said in cases:
        with pytest.raises(ValueError, match=said):
            hessian_eigenvalues(loss, parameters, **options)
    for loss, parameters in ((lambda: x * x, [x]), (lambda: 3.0, [x]), (lambda: x.sum(), ["x"])):
        with pytest.raises(TypeError, match=r"must return a scalar tensor|parameters must be tensors"):
            hessian_eigenvalues(loss, parameters, k=1)


def test_under_no_grad():
    x = torch.ones(3, requires_grad=True)
    with torch.no_grad():
        assert hessian_eigenvalues(lambda: (x**2).sum(), [x], k=1).largest.item() == pytest.approx(2)


def test_unused_and_frozen_parameters_take_part_as_they_should():
    x, unused = torch.ones(3, requires_grad=True), torch.ones(2, requires_grad=True)
    r = hessian_eigenvalues(lambda: (x**3).sum(), [x, unused, torch.ones(4), x], k=5)
    assert r.size == 5
    torch.testing.assert_close(r.largest, torch.tensor([6.0, 6, 6, 0, 0], dtype=torch.float64), rtol=0, atol=1e-5)


def test_out_of_memory_says_what_fits():
    model, batch = tiny_clip_of("vit", "attention"), tiny_batch(12)

    def loss(model, images, texts):
        if len(images) > 3:
            torch.empty(2**60)
        return contrastive_loss(model, images, texts)

    with pytest.raises(OutOfMemory, match=r"batch of 12 does not fit.*use --batch-size 3"):
        batch_rows(model, *batch, SpectrumSettings(), model_name="m", where={"batch": 0}, loss=loss)


def test_power_iteration_is_the_usual_one():
    """Well separated, it converges to its own test; its products are what Lanczos saves."""
    eigenvalues = torch.tensor([100.0, -60, 35, 20, 12], dtype=torch.float64)
    loss, x = quadratic([*eigenvalues.tolist(), *bulk(300)])
    hessian = Hessian(loss, [x])
    told = []
    usual = park_kim.power_iteration(hessian, progress=told.append)
    torch.testing.assert_close(usual.values, eigenvalues, rtol=5e-3, atol=0)
    assert (usual.residuals > 1e-3).any()
    assert usual.products == len(told) == told[-1]
    lanczos = extreme_eigenvalues(hessian, 5, which="magnitude", copies=False)
    torch.testing.assert_close(lanczos.by_magnitude, eigenvalues, rtol=1e-6, atol=0)
    assert lanczos.converged.by_magnitude.all()
    assert lanczos.products < usual.products / 2


def test_power_iteration_to_a_residual():
    eigenvalues = torch.tensor([100.0, -60, 35, 20, 12], dtype=torch.float64)
    loss, x = quadratic([*eigenvalues.tolist(), *bulk(300)])
    hessian = Hessian(loss, [x])
    told = []
    long = park_kim.power_to_residual(hessian, tol=1e-3, progress=told.append)
    torch.testing.assert_close(long.values, eigenvalues, rtol=1e-4, atol=0)
    assert (long.residuals < 1e-2).all()
    assert long.residuals[0] <= 1e-3
    assert long.products == len(told) == told[-1] > park_kim.power_iteration(hessian).products
    # Cut off, every eigenvalue has had one product at least, and the residuals say that it was too early.
    short = park_kim.power_to_residual(hessian, tol=1e-6, max_products=20)
    assert short.products == 20
    assert len(short.values) == 5
    assert (short.residuals > 1e-3).all()


def test_weight_decay_shifts_the_spectrum():
    model, batch = tiny_clip_of("vit", "attention"), tiny_batch()
    plain, decayed = (
        {
            row.metric: row.value
            for row in batch_rows(
                model, *batch, SpectrumSettings(tol=1e-6, weight_decay=decay), model_name="m", where={"batch": 0}
            )
        }
        for decay in (0.0, 0.3)
    )
    for i in range(1, 6):
        assert math.isclose(decayed[f"largest_{i}"], plain[f"largest_{i}"] + 0.3, rel_tol=1e-6)


def test_trace_converges_as_one_over_root_probes():
    eigenvalues = bulk(200, -1, 3)
    loss, x = quadratic(eigenvalues)
    hessian = Hessian(loss, [x])
    errors = {
        probes: np.sqrt(np.mean([(trace(hessian, probes, seed).value - sum(eigenvalues)) ** 2 for seed in range(40)]))
        for probes in (4, 64)
    }
    assert 2.6 < errors[4] / errors[64] < 6.2  # 4, give or take the noise of 40 repetitions
    found = trace(hessian, 64)
    assert abs(found.value - sum(eigenvalues)) < 4 * found.standard_error
    assert 0.5 < found.standard_error / errors[64] < 2


def test_density_has_the_moments_of_the_spectrum():
    eigenvalues = np.array([30.0, 20.0, *bulk(300, -1, 2), -8])
    loss, x = quadratic(eigenvalues.tolist())
    found = density(Hessian(loss, [x]), probes=30, steps=25)
    np.testing.assert_allclose(found.weights.sum(axis=1), 1)
    for f in (lambda t: t, lambda t: t**2, lambda t: np.exp(-((t - 1) ** 2) / 0.5)):
        estimate = found.mean(f)
        assert abs(estimate.value - f(eigenvalues).mean()) < 4 * estimate.standard_error
    below = found.share_below(-0.5)
    assert abs(below.value - (eigenvalues < -0.5).mean()) < 0.05
    mass = -eigenvalues[eigenvalues < 0].sum() / np.abs(eigenvalues).sum()
    assert abs(found.negative_mass - mass) < 0.05


def test_density_converges_as_one_over_root_probes():
    eigenvalues = np.array([20.0, *bulk(80, -1, 2), -6])
    loss, x = quadratic(eigenvalues.tolist())
    hessian = Hessian(loss, [x])
    estimates = {
        probes: [density(hessian, probes, 10, seed * 100).mean(np.abs) for seed in range(20)] for probes in (2, 18)
    }
    truth = np.abs(eigenvalues).mean()
    errors = {probes: np.sqrt(np.mean([(e.value - truth) ** 2 for e in each])) for probes, each in estimates.items()}
    assert 1.7 < errors[2] / errors[18] < 5.3  # 3, give or take the noise of 20 repetitions
    assert 0.6 < np.mean([e.standard_error for e in estimates[18]]) / errors[18] < 1.6


def test_a_density_of_every_step_is_exact():
    loss, x = quadratic([3.0, 1.0, -2.0])
    found = density(Hessian(loss, [x]), probes=1, steps=9)
    np.testing.assert_allclose(found.nodes[0], [-2, 1, 3], atol=1e-12)


def test_directions_are_as_long_as_filters():
    model = tiny_clip_of("vmamba", "attention")
    parameters = dict(model.named_parameters())
    direction = filter_normalised_direction(parameters, 0)
    for name, p in parameters.items():
        for filter_, weights in zip(direction[name], p, strict=True) if p.ndim > 1 else []:
            torch.testing.assert_close(filter_.norm(), weights.detach().norm())
        assert p.ndim > 1 or not direction[name].any()


def test_surface_is_the_loss_along_the_direction():
    x = torch.tensor([[3.0, 4.0]], dtype=torch.float64, requires_grad=True)
    direction = filter_normalised_direction({"x": x}, 0)
    found = [loss_at(lambda: (x**2).sum(), {"x": x}, [direction], [t]) for t in (-0.5, 0.0, 1.0)]
    wanted = [float(((x.detach() + t * direction["x"]) ** 2).sum()) for t in (-0.5, 0.0, 1.0)]
    assert found == pytest.approx(wanted, rel=1e-12)
    assert x.tolist() == [[3.0, 4.0]]


# In float32 differences of the gradient are rough, and every module of so small a model is looked at for an error.
FAST = "--towers image --precision float64"


def arguments(out, *more):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*more, "--data", "synthetic:quickstart", "--out", str(out)])


@pytest.fixture
def saved(tiny_clip, tiny_config, tmp_path):
    ssmclip.save_model(tiny_clip[0], tiny_config, tmp_path / "model")
    return str(tmp_path / "model")


def test_the_command_writes_rows_and_resumes(saved, tmp_path):
    asked = f"hessian --model {saved} --batches 2 --batch-size 3 --k 1 {FAST}".split()
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    command.run(arguments(whole, *asked))
    run, rows = read_rows(whole)
    assert run["analysis"]["which"] == "both"
    values = [row for row in rows if "batch" in row.where]
    assert len(values) == 2 * 3
    assert all(row.extra["residual"] <= 1e-3 and row.extra["products"] > 0 and row.extra["converged"] for row in values)
    # Killed in the middle of the second batch's second row, then continued.
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:5]) + lines[5][:30])
    command.run(arguments(cut, *asked))
    assert read_rows(cut)[1] == rows
    assert {path.name for path in tmp_path.glob("[!.]*.jsonl*")} == {"whole.jsonl", "cut.jsonl"}
    with pytest.raises(ValueError, match="k was 1"):
        command.run(arguments(whole, *asked, "--k", "2"))


def test_the_landscape_command(saved, tmp_path, tiny_clip):
    out = tmp_path / "surface.jsonl"
    command.run(arguments(out, *f"landscape --model {saved} --batch-size 4 --dimensions 1 --points 3".split()))
    rows = {row.condition: row.value for row in read_rows(out)[1]}
    model, preprocess, tokenizer = tiny_clip
    batch = next(read_batches("synthetic:quickstart", preprocess, tokenizer, batches=1, batch_size=4))
    assert rows["x=0.0"] == pytest.approx(contrastive_loss(model, *batch).item(), rel=1e-6)
    assert list(rows) == ["x=-1.0", "x=0.0", "x=1.0"]


def test_both_protocols_side_by_side(saved, tmp_path, tiny_clip):
    out = tmp_path / "both.jsonl"
    asked = f"hessian --model {saved} --batches 1 --batch-size 3 --k 1 --towers image --which magnitude"
    command.run(arguments(out, *asked.split(), "--protocol", "lanczos,park-kim,power", "--weight-decay", "0"))
    found = {(row.condition, row.metric): row for row in read_rows(out)[1]}
    model, preprocess, tokenizer = tiny_clip
    batch = next(read_batches("synthetic:quickstart", preprocess, tokenizer, batches=1, batch_size=3))
    hessian = Hessian(lambda: contrastive_loss(model, *batch), tower_parameters(model, "image"))
    usual = park_kim.power_iteration(hessian, 1)
    given = [found["batch=0, tower=image, protocol=park-kim", "by_magnitude_1"]]
    assert usual.values.tolist() == pytest.approx([row.value for row in given], rel=1e-5)
    wanted = [found["batch=0, tower=image", "by_magnitude_1"]]
    true = torch.tensor([row.value for row in wanted], dtype=torch.float64)
    said = {metric.replace("power_iteration_", ""): row.value for (_, metric), row in found.items()}
    assert said["products_over_lanczos"] == usual.products / max(row.extra["found_after"] for row in wanted)
    assert said["error"] == pytest.approx((usual.values / true - 1).abs().max().item(), rel=1e-2)
    assert said["missed"] == np.mean([min(abs(usual.values / x - 1)) > 0.01 for x in true])
    assert said["residual"] == pytest.approx(usual.residuals.max().item(), rel=1e-2)
    long = found["batch=0, tower=image, protocol=power", "by_magnitude_1"]
    assert long.extra["residual"] <= 1e-3 < usual.residuals.max()
    assert long.extra["products"] > usual.products
    assert said["long_products_over_lanczos"] == long.extra["products"] / max(
        row.extra["found_after"] for row in wanted
    )


def test_the_papers_protocol_has_its_l2_term(saved, tmp_path, tiny_clip):
    out = tmp_path / "park_kim.jsonl"
    asked = f"hessian --model {saved} --batches 1 --batch-size 3 --k 1 --towers image --protocol park-kim"
    decay = 1000.0  # a third of the eigenvalue: the usual 0.05 would not be seen
    command.run(arguments(out, *asked.split(), "--weight-decay", str(decay)))
    rows = {row.metric: row for row in read_rows(out)[1] if "batch" in row.where}
    model, preprocess, tokenizer = tiny_clip
    batch = next(read_batches("synthetic:quickstart", preprocess, tokenizer, batches=1, batch_size=3))
    parameters = tower_parameters(model, "image")

    def loss():
        return contrastive_loss(model, *batch) + decay / 2 * sum(p.pow(2).sum() for p in parameters.values())

    true = extreme_eigenvalues(Hessian(loss, parameters), 1, which="magnitude", copies=False).by_magnitude
    assert rows["by_magnitude_1"].value == pytest.approx(true.item(), rel=1e-2)
    assert set(rows) == {"by_magnitude_1"}


def test_two_processes_write_what_one_does(saved, tmp_path, request):
    asked = f"hessian --model {saved} --batches 3 --batch-size 3 --k 1 {FAST}".split()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # as torchrun has it
    command.run(arguments(one, *asked))
    asked += ["--data", "synthetic:quickstart", "--out", str(two)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with open(tmp_path / "said", "w+") as said, subprocess.Popen(
        [*torchrun, "-m", "ssmclip", "analyze", *asked],
        env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stderr=said,
    ) as ranks:  # fmt: skip
        ranks.wait()
    assert ranks.returncode == 0, (tmp_path / "said").read_text()[-4000:]
    assert read_rows(two)[1] == read_rows(one)[1]
    assert sorted(path.name for path in tmp_path.glob("[!.]*.jsonl*")) == ["one.jsonl", "two.jsonl"]


def test_two_models_in_one_file_are_compared_on_the_same_batches(saved, tiny_config, tmp_path):
    torch.manual_seed(5)
    ssmclip.save_model(create_clip(tiny_config), tiny_config, tmp_path / "other")
    out = tmp_path / "rows.jsonl"
    for model in (saved, str(tmp_path / "other")):
        asked = f"hessian --model {model} --batches 2 --batch-size 3 --k 2 {FAST}"
        command.run(arguments(out, *asked.split()))
    rows = read_rows(out)[1]
    tops = {
        model: [
            np.mean([abs(row.value) for row in rows if (row.model, row.where) == (model, {"batch": b, "tower": "image"})
                     and row.metric.startswith("by_magnitude")])
            for b in (0, 1)
        ]
        for model in ("model", "other")
    }  # fmt: skip
    found = {(row.model, row.condition, row.metric): row for row in rows}
    difference = found["model", "tower=image, minus other", "top_magnitude_difference"]
    gains = np.subtract(tops["model"], tops["other"])
    assert difference.value == pytest.approx(gains.mean())
    assert (difference.ci_low, difference.ci_high) == pytest.approx((gains.min(), gains.max()))
    assert found["other", "tower=image", "negative_share"].n == 2


def test_a_run_from_its_beginning_on(tmp_path):
    config = apply_overrides(
        load_recipe(Path(__file__).parents[1] / "recipes" / "tiny.py"),
        ["steps=2", "batch_size=4", "warmup_steps=1", "checkpoint.every=1", "tensorboard=false", "progress=false",
         "drop_path_rate=0.5", "shuffle_buffer=4", "device=cpu"],
    )  # fmt: skip
    train(config, tmp_path / "run")
    asked = f"hessian --model {tmp_path / 'run'} --batches 1 --batch-size 3 --k 1 --tol 1e-5 {FAST}"
    out, last = tmp_path / "rows.jsonl", tmp_path / "last.jsonl"
    command.run(arguments(out, *asked.split(), "--along-training"))
    command.run(arguments(last, *asked.split()))
    rows = read_rows(out)[1]
    largest = {row.condition: row.value for row in rows if row.metric == "largest_1"}
    assert list(largest) == [f"step={step}, batch=0, tower=image" for step in (0, 1, 2)]
    assert largest["step=2, batch=0, tower=image"] == next(
        row.value for row in read_rows(last)[1] if row.metric == "largest_1"
    )
    model, preprocess, tokenizer = ssmclip.load(tmp_path / "run")
    seed_everything(config.seed)
    model = create_clip(load_config(tmp_path / "run")).double().eval()
    images, texts = next(read_batches("synthetic:quickstart", preprocess, tokenizer, batches=1, batch_size=3))
    batch = images.double(), texts
    fresh = hessian_eigenvalues(
        lambda: contrastive_loss(model, *batch), tower_parameters(model, "image"), k=1, tol=1e-5, copies=False
    )
    assert largest["step=0, batch=0, tower=image"] == pytest.approx(fresh.largest.item(), rel=1e-5)
    (figure,) = EigenvaluesOverTraining.each(rows, {})
    assert [(e["step"], e["median"]) for e in figure.frame() if e["end"] == "largest"] == list(
        zip((0, 1, 2), largest.values(), strict=True)
    )
    with pytest.raises(ValueError, match="no checkpoints"):
        command.run(arguments(tmp_path / "none.jsonl", *f"hessian --model {tmp_path}".split(), "--along-training"))


def test_a_surface_in_two_directions(saved, tmp_path, tiny_clip):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    asked = f"landscape --model {saved} --batch-size 4 --dimensions 2 --points 3 --seed 3".split()
    command.run(arguments(whole, *asked))
    rows = read_rows(whole)[1]
    cut.write_text("".join(whole.read_text().splitlines(keepends=True)[:6])[:-9])
    command.run(arguments(cut, *asked))
    assert read_rows(cut)[1] == rows
    model, preprocess, tokenizer = tiny_clip
    batch = next(read_batches("synthetic:quickstart", preprocess, tokenizer, batches=1, batch_size=4, seed=3))
    first, second = (filter_normalised_direction(dict(model.named_parameters()), seed) for seed in (3, 4))
    moved = {name: p + 1.0 * first[name] - 1.0 * second[name] for name, p in model.named_parameters()}
    there = torch.func.functional_call(model, moved, batch)
    (contour,) = Contour.each(rows, {})
    x, y, loss = contour.grid()
    assert x.tolist() == y.tolist() == [-1, 0, 1]
    assert loss[1, 1] == pytest.approx(contrastive_loss(model, *batch).item(), rel=1e-6)
    assert loss[0, 2] == pytest.approx(OBJECTIVES["clip"]()(**there).item(), rel=1e-5)  # x = 1, y = -1


def test_more_batches_than_data_are_refused(tiny_clip):
    with pytest.raises(ValueError, match=r"1 batches of 1000000 need .* use batches of at most \d+"):
        next(read_batches("synthetic:digits", *tiny_clip[1:], batches=1, batch_size=10**6))
    with pytest.raises(ValueError, match=r"10000 batches of 2 .* use at most \d+ batches"):
        next(read_batches("synthetic:digits", *tiny_clip[1:], batches=10**4, batch_size=2))


def test_a_bad_clip_is_told():
    model, batch = tiny_clip_of("vit", "attention"), tiny_batch()
    tell = dict(model_name="m", where={"batch": 0})
    with pytest.raises(ValueError, match=r"k must be at most .*got 100000"):
        batch_rows(model, *batch, SpectrumSettings(k=100_000), **tell)
    with pytest.raises(ValueError, match="'largest', 'smallest' or 'magnitude'"):
        batch_rows(model, *batch, SpectrumSettings(which="middle"), **tell)
    with pytest.raises(ValueError, match="must be one of lanczos, park-kim, power"):
        SpectrumSettings(protocol="arnoldi")
    model.visual = nn.Sequential(model.visual, Cube())
    with pytest.raises(NotTwiceDifferentiable, match=r"module 'visual.1' \(Cube\)"):
        batch_rows(model, *batch, SpectrumSettings(k=1), **tell)
    with torch.no_grad():
        model.visual[0].head.bias.fill_(float("nan"))
    with pytest.raises(ValueError, match=r"the loss must be finite \(got nan"):
        batch_rows(model, *batch, SpectrumSettings(k=1), **tell)


def test_summary_counts_negative_values():
    from ssmclip.rows import Result

    rows = [
        Result(
            "m",
            "hessian",
            f"by_magnitude_{i}",
            v,
            where={"batch": b, "tower": "whole"},
            extra={"converged": True, "products": 7},
        )
        for b, values in enumerate([(3.0, -2.0), (4.0, 1.0), (-5.0, -1.0)])
        for i, v in enumerate(values, 1)
    ]
    found = {row.metric: row for row in summary_rows(rows, 2)}
    assert found["negative_share"].value == pytest.approx(0.5)
    assert found["top_magnitude"].value == pytest.approx(16 / 6)
    assert found["negative_share"].n == 3
    assert found["negative_share"].condition == "tower=whole"
    assert found["negative_share"].ci_low < 0.5 < found["negative_share"].ci_high
