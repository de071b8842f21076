"""Distillation: the loss beside its formula and open_clip's, the teacher beside itself, and what is refused."""

import copy
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from open_clip.loss import DistillClipLoss
from PIL import Image
from torch.nn.functional import normalize

import ssmclip
from small_clips import SMALL, VIT, a_clip, saved, with_text
from ssmclip.config import (
    CheckpointConfig,
    DataConfig,
    DistillConfig,
    LoggingConfig,
    LossConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    apply_overrides,
)
from ssmclip.models import load_state
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_objective
from ssmclip.train.checkpoint import checkpoints
from ssmclip.train.distill import Distill, check_tokens, load_teacher
from ssmclip.train.gradient import backward, more_of
from ssmclip.train.objective import objective_of

CPU = torch.device("cpu")


def rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def features(count=6):
    """A student's and a wider teacher's."""
    return {
        "image_features": rows(count, 4, seed=0),
        "text_features": rows(count, 4, seed=1),
        "logit_scale": torch.tensor(7.0, dtype=torch.float64),
        "dist_image_features": rows(count, 5, seed=2),
        "dist_text_features": rows(count, 5, seed=3),
        "dist_logit_scale": torch.tensor(20.0, dtype=torch.float64),
    }


def formula(weight, contrastive_weight, image, text, scale, t_image, t_text, t_scale):
    """Both parts over images, then over texts, entry by entry."""
    total, n = 0.0, len(image)
    for a, b, t_a, t_b in ((image, text, t_image, t_text), (text, image, t_text, t_image)):
        for i in range(n):
            student = torch.stack([scale * a[i] @ b[j] for j in range(n)])
            teacher = torch.stack([t_scale * t_a[i] @ t_b[j] for j in range(n)])
            log_q, p = student - student.exp().sum().log(), teacher.exp() / teacher.exp().sum()
            total += (-contrastive_weight * log_q[i] - weight * (p * log_q).sum()) / (2 * n)
    return total


def test_loss_and_gradient_are_the_formulas_and_open_clips():
    given = {name: value.requires_grad_(not name.startswith("dist_")) for name, value in features().items()}
    learnt = [value for value in given.values() if value.requires_grad]
    settings = LossConfig(distill=DistillConfig(weight=0.3, contrastive_weight=0.9))
    objective = Distill(settings)
    parts = DistillClipLoss()(**given)
    values = objective(**given), formula(0.3, 0.9, *given.values()), 0.9 * parts[0] + 0.3 * parts[1]
    gradients = [torch.autograd.grad(value, learnt) for value in values]
    for value, gradient in zip(values[1:], gradients[1:], strict=True):
        torch.testing.assert_close(values[0], value, rtol=1e-12, atol=0)
        for one, true in zip(gradients[0], gradient, strict=True):
            torch.testing.assert_close(one, true, rtol=1e-10, atol=1e-14)
    assert list(objective.parts) == ["loss_clip", "loss_distill"]
    for one, true in zip(objective.parts.values(), parts, strict=True):
        torch.testing.assert_close(one, true.detach(), rtol=1e-12, atol=0)


def test_the_loss_is_the_mean_over_views_and_captions():
    one = features(4)
    several = {
        name: value.repeat_interleave(3 if "text" in name else 2, 0) if value.ndim else value
        for name, value in one.items()
    }
    others = [2 * torch.arange(4) + 1, 3 * torch.arange(4) + 2]  # of the second view, and of the third caption
    for name, place in zip(("image_features", "text_features"), others, strict=True):
        several[name][place] = rows(4, 4, seed=8)
        several[f"dist_{name}"][place] = rows(4, 5, seed=9)
    expected = [
        formula(1, 1, *({**one, **changed[0], **changed[1]}[name] for name in one))
        for changed in [
            (image, text)
            for image in ({}, {"image_features": rows(4, 4, seed=8), "dist_image_features": rows(4, 5, seed=9)})
            for text in ({}, {}, {"text_features": rows(4, 4, seed=8), "dist_text_features": rows(4, 5, seed=9)})
        ]
    ]
    value = Distill(views=2, captions=3)(**several)
    torch.testing.assert_close(value, torch.stack(expected).mean(), rtol=1e-12, atol=0)


# ---- the teacher

OTHER_SIZE = {**SMALL, "embed_dim": 24, "vision_cfg": {**VIT, "image_size": 48}}
OTHER_COLOURS = {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.25, 0.3], "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a CLIP of another encoder, width, image size and normalisation."""
    return saved(tmp_path_factory.mktemp("teacher"), OTHER_SIZE, seed=5, preprocess=OTHER_COLOURS)[1]


def settings(*overrides, changes=SMALL, **loss):
    config = TrainConfig(
        steps=4,
        batch_size=6,
        device="cpu",
        model=ModelConfig(changes=changes),
        data=DataConfig(image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        loss=LossConfig(kind="distill", **loss),
        checkpoint=CheckpointConfig(every=2, keep=9),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )
    return apply_overrides(config, overrides)


def texts(model, count):
    return model.tokenizer([f"a photo of {i} dogs" for i in range(count)])


def test_a_teacher_sees_what_its_own_preprocessing_shows_it(teacher):
    """Of images that need no resizing, exactly; of smaller ones, as if they had been enlarged before."""
    plan = blueprint(settings())
    model = ssmclip.load(teacher)
    taught = load_teacher(str(teacher), plan, CPU)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 48, 48, 3), dtype=np.uint8)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in plan.statistics())
    students = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - mean) / std
    with torch.no_grad():
        made = taught(students, texts(model, 4))
        own = torch.stack([model.preprocess(Image.fromarray(image)) for image in pixels])
        expected = model.network.encode_image(own, normalize=True)
        torch.testing.assert_close(made["dist_image_features"], expected, rtol=1e-4, atol=1e-5)
        expected = model.network.encode_text(texts(model, 4), normalize=True)
        torch.testing.assert_close(made["dist_text_features"], expected)
        torch.testing.assert_close(made["dist_logit_scale"], model.network.logit_scale.exp())
        grey = [torch.full((1, 3, side, side), 0.5) for side in (32, 48)]
        small, large = (taught(images, texts(model, 1))["dist_image_features"] for images in grey)
        torch.testing.assert_close(small, large, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("views", "captions"), [(1, 1), (2, 3)])
def test_micro_batches_give_the_whole_batchs_gradient(teacher, views, captions):
    config = settings(f"teacher={teacher}", f"views_per_image={views}", f"captions_per_image={captions}")
    objective = build_objective(config)
    objective.prepare(blueprint(config), CPU)
    objective._teacher[0].network.double()
    model = a_clip().double()
    images = torch.randn(5 * views, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    words = texts(ssmclip.load(teacher), 5 * captions)
    other = copy.deepcopy(model)
    values = [backward(Accelerator(cpu=True), m, objective, images, words, s) for m, s in ((model, None), (other, 2))]
    assert values[0].item() == pytest.approx(values[1].item(), rel=1e-12)
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, rtol=1e-8, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None and not p.requires_grad for p in objective._teacher[0].network.parameters())


@pytest.mark.parametrize("micro_batch", [None, 2])
def test_stored_features_take_a_teachers_place(micro_batch):
    """Of any length, as shards may store them; of micro-batches, those of their pairs."""
    objective = Distill(LossConfig(distill=DistillConfig(teacher_scale=30.0)))
    model = a_clip().double()
    images = torch.randn(5, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    words = torch.arange(1, 81).view(5, 16)
    stored = SimpleNamespace(images=3 * rows(5, 7, seed=4), texts=2 * rows(5, 7, seed=5))
    value = backward(
        Accelerator(cpu=True), model, objective, images, words, micro_batch, more_of(SimpleNamespace(teacher=stored))
    )
    with torch.no_grad():
        made = model(images, words)
    given = [made[name] for name in ("image_features", "text_features", "logit_scale")]
    expected = formula(1, 1, *given, rows(5, 7, seed=4), rows(5, 7, seed=5), 30.0)
    assert value.item() == pytest.approx(expected.item(), rel=1e-9)
    with pytest.raises(ValueError, match=r"loss.distill.teacher must name a CLIP, as the data store no features"):
        objective.inputs(images, words)


# ---- a run


def learnt(run):
    names = ("loss", "loss_clip", "loss_distill", "grad_norm", "logit_scale")
    return {(r.where["step"], r.metric): r.value for r in read_rows(run / "rows.jsonl")[1] if r.metric in names}


def test_a_run_learns_from_its_teacher_and_goes_on_exactly(teacher, tmp_path):
    config = settings(f"teacher={teacher}", "micro_batch=4")
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train(config, whole)
    numbers = learnt(whole)
    assert len(numbers) == 4 * 5
    for step in range(1, 5):
        loss, *parts = (numbers[step, name] for name in ("loss", "loss_clip", "loss_distill"))
        assert loss == pytest.approx(sum(parts), rel=1e-6)
    assert load_state(checkpoints(whole)[-1] / WEIGHTS_NAME).keys() == a_clip().state_dict().keys()
    assert objective_of(ssmclip.load(whole).model, whole).name == "clip"

    shutil.copytree(whole, resumed)
    for later in checkpoints(resumed)[1:]:
        shutil.rmtree(later)
    train(config, resumed, resume=True)
    assert learnt(resumed) == numbers
    ends = [load_state(checkpoints(run)[-1] / WEIGHTS_NAME) for run in (whole, resumed)]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


# ---- what is refused


def test_a_run_without_anything_to_learn_from_is_refused_before_there_is_a_folder(tmp_path):
    with pytest.raises(ValueError, match=r"loss.distill.teacher must name a CLIP .* \(got ''\)"):
        train(settings(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["views_per_image=2", "view_weight=0.5"], r"loss.view_weight must be 0 for loss.kind=distill \(got 0.5\)"),
        (["gather_with_grad=false"], r"loss.gather_with_grad must be true for loss.kind=distill \(got false\)"),
    ],
)
def test_settings_that_do_not_go_with_a_teacher_are_refused(teacher, overrides, told):
    with pytest.raises(ValueError, match=told):
        build_objective(settings(f"teacher={teacher}", *overrides))


def test_distillation_of_no_weight_is_refused():
    with pytest.raises(ValueError, match=r"loss.distill.weight must be above 0 when .*contrastive_weight is 0 \(got 0"):
        DistillConfig(weight=0.0, contrastive_weight=0.0)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("CLIP-VMamba-Nano", r"must have trained weights \(got CLIP-VMamba-Nano\): pass "),
        ("timm:test_vit", r"must be a CLIP \(got timm:test_vit, an image encoder\)"),
    ],
)
def test_a_teacher_that_knows_nothing_is_refused(name, told):
    with pytest.raises(ValueError, match=f"loss.distill.teacher {told}"):
        load_teacher(name, blueprint(settings()), CPU)


def test_a_teacher_of_other_tokens_is_refused(teacher):
    plan = blueprint(settings(changes=with_text(context_length=12)))
    told = r"must read the same tokens .* which reads 16 tokens of each text, the model 12\): choose a teacher"
    with pytest.raises(ValueError, match=told):
        load_teacher(str(teacher), plan, CPU)
    own = blueprint(settings()).texts()
    check_tokens("itself", own, own)
    with pytest.raises(ValueError, match=r"\(got other, which has another tokenizer\): choose"):
        check_tokens("other", own, lambda probes: own([probe.lower() + "!" for probe in probes]))
