"""SLIP: its loss beside the formula and published numbers, its head beside torch's, its views, and a run of it."""

import shutil

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn.functional import normalize

from small_clips import SMALL, VIT, a_clip, with_vision
from ssmclip.config import (
    CheckpointConfig,
    DataConfig,
    EmaConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    SslConfig,
    TrainConfig,
    apply_overrides,
)
from ssmclip.data.pairs.augment import TrainTransform
from ssmclip.models import load_state
from ssmclip.models.features import feature_width, image_features
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.registry import UnknownName
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_objective, build_trainee, open_stream
from ssmclip.train.checkpoint import checkpoints, load_training_state
from ssmclip.train.gradient import backward
from ssmclip.train.optimiser import build_optimiser
from ssmclip.train.self_supervised.heads import mlp
from ssmclip.train.self_supervised.losses import nt_xent
from ssmclip.train.self_supervised.slip import SSL_AUGMENT
from ssmclip.train.trainee import Trainee


def rows(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def formula(one, other, temperature):
    """SimCLR's section 2.1, pair by pair: each of 2n views looks for its other view among the 2n - 1 others."""
    views = [*normalize(one, dim=-1), *normalize(other, dim=-1)]
    n, total = len(one), 0.0
    for i, view in enumerate(views):
        scores = torch.stack([view @ w / temperature for w in views])
        others = torch.cat([scores[:i], scores[i + 1 :]])
        total = total + others.exp().sum().log() - scores[(i + n) % (2 * n)]
    return total / (2 * n)


def test_nt_xent_and_its_gradient_are_the_formulas():
    one, other = (rows(5, 7, seed=seed).requires_grad_() for seed in (0, 1))
    values = [nt_xent(one, other, 0.3), formula(one, other, 0.3)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(value, [one, other]) for value in values]
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-9, atol=1e-13)


def test_nt_xent_has_the_values_measured_of_the_published_code():
    """Of 4,096 random views in 256 dimensions: 9.20; of a view with itself, as A-CLIP's code compares it: 0.373.

    Of random views the mean over 4,096 positives alone has a standard deviation of 10 / sqrt(256 * 4096) = 0.0098.
    """
    one, other = (rows(4096, 256, seed=seed, dtype=torch.float32) for seed in (0, 1))
    assert nt_xent(one, other, 0.1).item() == pytest.approx(9.20, abs=3 * 2**0.5 * 0.0098)
    assert nt_xent(one, one, 0.1).item() == pytest.approx(0.373, abs=0.002)


def test_the_head_is_torchs_linear_layers_and_batch_norms():
    head = mlp([6, 9, 9, 4]).double()
    layers = [nn.Linear(6, 9), nn.BatchNorm1d(9), nn.ReLU(), nn.Linear(9, 9), nn.BatchNorm1d(9), nn.ReLU()]
    torchs = nn.Sequential(*layers, nn.Linear(9, 4)).double()
    torchs.load_state_dict(head.state_dict(), strict=False)
    features = 3 + 2 * rows(8, 6, seed=0)
    torch.testing.assert_close(head(features), torchs(features), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(head.eval()(features), head.train()(features))
    published = mlp([768, 4096, 4096, 256])
    assert [layer.weight.shape[0] for layer in published if isinstance(layer, nn.Linear)] == [4096, 4096, 256]
    assert all(layer.bias is not None for layer in published if isinstance(layer, nn.Linear))


# ---- image features


@pytest.mark.parametrize(
    ("changes", "width"),
    [(SMALL, 32), ({**SMALL, "vision_cfg": VIT}, 32), (with_vision(timm_proj="mlp"), 32)],
    ids=["vmamba", "vit", "mlp"],
)
def test_image_features_are_what_the_projection_takes(changes, width):
    model, images = a_clip(changes), rows(2, 3, 32, 32, seed=0, dtype=torch.float32)
    with torch.no_grad():
        features, embedded = image_features(model, images)
        torch.testing.assert_close(embedded, model.encode_image(images))
        again = features @ model.visual.proj if hasattr(model.visual, "proj") else model.visual.head(features)
    torch.testing.assert_close(again, embedded)
    assert features.shape == (2, feature_width(model))


def test_a_tower_without_such_features_is_refused():
    resnet = a_clip({**SMALL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}})
    with pytest.raises(ValueError, match="ModifiedResNet has no features between its pooling and its projection"):
        feature_width(resnet)


# ---- views


def settings(*overrides, changes=SMALL, **parts):
    config = TrainConfig(
        steps=4,
        batch_size=6,
        device="cpu",
        model=ModelConfig(changes=changes),
        data=DataConfig(image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        loss=LossConfig(kind="slip", ssl=SslConfig(head_width=8, head_features=6)),
        checkpoint=CheckpointConfig(every=2, keep=9),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
        **parts,
    )
    return apply_overrides(config, overrides)


def test_the_views_of_the_texts_are_those_of_clip_and_the_others_slips():
    config = settings("views_per_image=2")
    clip = apply_overrides(config, ["loss.kind=clip"])
    ours, plain = (next(open_stream(c, blueprint(c), 32, 0, 1)) for c in (config, clip))
    views = ours.images.unflatten(0, (6, 4))
    assert torch.equal(views[:, :2].flatten(0, 1), plain.images)
    assert torch.equal(ours.texts, plain.texts)
    assert not torch.equal(views[:, 2], views[:, 3])

    transform = TrainTransform(
        32, (0.5,) * 3, (0.5,) * 3, further=(TrainTransform(32, (0.5,) * 3, (0.5,) * 3, flip=True),)
    )
    picture = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    made, _ = transform.views(picture, torch.Generator().manual_seed(3), 1)
    generator = torch.Generator().manual_seed(3)
    expected = [each.pixels(picture, generator) for each in (transform, transform.further[0])]
    assert all(torch.equal(*pair) for pair in zip(made, expected, strict=True))


def test_slips_augmentation_is_the_published_one_unless_it_is_changed():
    """Crops of 8 % and more, colours of the published strengths, blur for half, flips."""
    published = dict(scale=(0.08, 1.0), flip=True, color_jitter=(0.4, 0.4, 0.4, 0.1), color_jitter_prob=0.8)
    published |= dict(gray_scale_prob=0.2, gaussian_blur_prob=0.5, solarize_prob=0.0)
    assert {name: getattr(SSL_AUGMENT, name) for name in published} == published
    objective = build_objective(settings('ssl.augment={"flip": false, "scale": [0.3, 1]}'))
    one, other = objective.further_views(objective.settings)
    assert one == other
    assert (one.flip, one.scale, one.gaussian_blur_prob) == (False, (0.3, 1.0), 0.5)


@pytest.mark.parametrize(
    ("overrides", "error", "told"),
    [
        (['ssl.augment={"flap": 1}'], UnknownName, "unknown setting 'loss.ssl.augment.flap'; did you mean"),
        (['ssl.augment={"flip": 1}'], ValueError, r"loss.ssl.augment.flip must be true or false \(got 1\)"),
        (['ssl.augment={"library": "timm"}'], ValueError, r"loss.ssl.augment.library must be own \(got timm\)"),
        (["data.augment.library=timm"], ValueError, r"data.augment.library must be own for loss.kind=slip, .*got timm"),
    ],
)
def test_views_that_cannot_be_made_are_refused_before_there_is_a_folder(tmp_path, overrides, error, told):
    with pytest.raises(error, match=told):
        train(settings(*overrides), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ---- the objective


def trainee_of(config, seed=1):
    objective, model = build_objective(config), a_clip(config.model.changes, seed)
    return objective, build_trainee(model, objective).double()


def a_batch(shown, count=5):
    return rows(count * shown, 3, 32, 32, seed=2), torch.arange(1, 16 * count + 1).view(count, 16)


def test_the_loss_is_clips_and_that_between_the_further_views():
    objective, trainee = trainee_of(settings("ssl.weight=0.7", "temperature=0.2"))
    images, texts = a_batch(3)
    value = backward(Accelerator(cpu=True), trainee, objective, images, texts, None)
    with torch.no_grad():
        model, (shown, one, other) = trainee.model, (images[i::3] for i in range(3))
        image, text = model.encode_image(shown, normalize=True), model.encode_text(texts, normalize=True)
        logits = model.logit_scale.exp() * image @ text.T
        clip = -(logits.softmax(1).diag().log() + logits.softmax(0).diag().log()).mean() / 2
        heads = [trainee.heads(model.visual.trunk(view)) for view in (one, other)]
        expected = clip + 0.7 * formula(*heads, 0.2)
    assert value.item() == pytest.approx(expected.item(), rel=1e-10)
    assert objective.numbers(model)["loss_clip"].item() == pytest.approx(clip.item(), rel=1e-10)
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trainee.heads.parameters() if p.ndim > 1)


def test_micro_batches_give_the_gradient_of_heads_that_see_one_each():
    """Batch norm sees a micro-batch, so the whole batch's loss is that of the heads' outputs by micro-batches."""
    config = settings()
    objective, trainee = trainee_of(config)
    images, texts = a_batch(3, 6)
    value = backward(Accelerator(cpu=True), trainee, objective, images, texts, 3)
    other = trainee_of(config)[1]
    parts = [
        objective.outputs(other, *objective.inputs(images[9 * i : 9 * i + 9], texts[3 * i : 3 * i + 3]))
        for i in range(2)
    ]
    joined = {name: torch.cat([part[name] for part in parts]) for name in objective.rows}
    whole = objective(**joined, logit_scale=parts[0]["logit_scale"])
    whole.backward()
    assert value.item() == pytest.approx(whole.item(), rel=1e-12)
    for (name, one), two in zip(trainee.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one.grad, two.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_heads_learn_at_their_own_rate_and_are_decayed_like_all():
    config = settings("text_lr_scale=0.1", "image_lr_scale=0.2", "weight_decay=0.3")
    trainee = trainee_of(config)[1]
    groups = build_optimiser(trainee, config.optimiser).param_groups
    rates = {id(p): (group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert {rates[id(p)] for p in trainee.heads.parameters() if p.ndim > 1} == {(1.0, 0.3)}
    assert {rates[id(p)] for p in trainee.heads.parameters() if p.ndim == 1} == {(1.0, 0.0)}
    assert rates[id(trainee.model.token_embedding.weight)] == (0.1, 0.3)
    assert sum(len(group["params"]) for group in groups) == len(list(trainee.parameters()))


def test_heads_are_not_sharded():
    objective = build_objective(settings())
    with pytest.raises(ValueError, match=r"loss.kind must be one without heads under FSDP \(got slip\)"):
        build_trainee(a_clip(), objective, sharded=True)
    clip = build_objective(settings("loss.kind=clip"))
    assert not isinstance(build_trainee(a_clip(), clip, sharded=True), Trainee)


# ---- a run


def learnt(run):
    names = ("loss", "loss_clip", "loss_ssl", "grad_norm", "logit_scale")
    return {(r.where["step"], r.metric): r.value for r in read_rows(run / "rows.jsonl")[1] if r.metric in names}


@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_run_keeps_its_heads_and_goes_on_exactly(tmp_path, decay):
    config = settings("micro_batch=4", ema=EmaConfig(decay))
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    numbers = learnt(whole)
    assert len(numbers) == 4 * 5
    assert load_state(checkpoints(whole)[-1] / WEIGHTS_NAME).keys() == a_clip().state_dict().keys()
    shutil.copytree(whole, resumed)
    for later in checkpoints(resumed)[1:]:
        shutil.rmtree(later)
    train(config, resumed, resume=True)
    assert learnt(resumed) == numbers
    ends = [load_state(checkpoints(run)[-1] / WEIGHTS_NAME) for run in (whole, resumed)]
    ends += [load_training_state(checkpoints(run)[-1])["heads"] for run in (whole, resumed)]
    for one, two in (ends[:2], ends[2:]):
        assert one.keys() == two.keys()
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    first = load_training_state(checkpoints(whole)[0])["heads"]
    assert any(not torch.equal(value, first[name]) for name, value in ends[2].items())
