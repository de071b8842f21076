"""Objectives: each against its formula; one of a user's own is trained, logged, resumed and analysed like ours."""

import math

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from ssmclip import models
from ssmclip.__main__ import main
from ssmclip.analyze.curvature.batches import read_batches
from ssmclip.config import LossConfig, TrainConfig, apply_overrides, load_recipe
from ssmclip.registry import UnknownName
from ssmclip.rows import read_rows
from ssmclip.train import objective as objectives
from ssmclip.train import train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_objective
from ssmclip.train.gradient import backward
from ssmclip.train.objective import OBJECTIVES, Contrastive, Objective, objective, objective_of


def clip_formula(image, text, scale, bias):
    logits = scale * image @ text.T
    return -(logits.softmax(1).diag().log() + logits.softmax(0).diag().log()).mean() / 2


def siglip_formula(image, text, scale, bias):
    signs = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    return -nn.functional.logsigmoid(signs * (scale * image @ text.T + bias)).sum() / len(image)


FORMULAS = {"clip": clip_formula, "siglip": siglip_formula}
ELSEWHERE = {"classification", "distill", "slip", "a-clip"}  # test_supervised.py, and files of their own


def test_every_objective_has_a_formula_here():
    assert set(FORMULAS) == set(OBJECTIVES) - ELSEWHERE
    for name, kind in OBJECTIVES.items():
        assert kind.name == name
        assert issubclass(kind, Objective)


def outputs(kind):
    generator = torch.Generator().manual_seed(0)
    image, text = (
        nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    made = {"image_features": image, "text_features": text, "logit_scale": torch.tensor(7.0, dtype=torch.float64)}
    return made | ({"logit_bias": torch.tensor(-3.0, dtype=torch.float64)} if kind == "siglip" else {})


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_loss_and_gradient_are_the_formulas(kind):
    given = {name: value.requires_grad_() for name, value in outputs(kind).items()}
    value = OBJECTIVES[kind]()(**given)
    expected = FORMULAS[kind](*given.values(), *([None] if len(given) == 3 else []))
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(of, list(given.values())) for of in (value, expected)]
    for got, true in zip(*gradients, strict=True):
        torch.testing.assert_close(got, true, rtol=1e-10, atol=1e-14)


def test_without_gathered_gradients_a_feature_is_pulled_by_its_own_softmax_alone():
    """Its gradient is scale / 2n * (probabilities - truth) @ candidates; with them, texts pull images as well."""
    given = {name: value.requires_grad_() for name, value in outputs("clip").items()}
    image, text, scale = given.values()
    losses = [OBJECTIVES["clip"](LossConfig(gather_with_grad=on))(**given) for on in (True, False)]
    assert losses[0] == losses[1]
    got = torch.autograd.grad(losses[1], list(given.values()))
    n, truth = len(image), torch.eye(len(image), dtype=image.dtype)
    to_text, to_image = ((scale * a @ b.T).softmax(1) - truth for a, b in ((image, text), (text, image)))
    cosines = image @ text.T
    expected = (
        scale / (2 * n) * to_text @ text,
        scale / (2 * n) * to_image @ image,
        ((to_text * cosines).sum() + (to_image * cosines.T).sum()) / (2 * n),
    )
    for one, true in zip(got, expected, strict=True):
        torch.testing.assert_close(one, true.detach(), rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match=r"loss.gather_with_grad must be true for loss.kind=siglip \(got false\)"):
        OBJECTIVES["siglip"](LossConfig(gather_with_grad=False))


class Pair(nn.Module):
    """A model that returns what it is given."""

    def __init__(self, bias=False):
        super().__init__()
        self.logit_scale = nn.Parameter(torch.tensor(math.log(7.0), dtype=torch.float64))
        self.logit_bias = nn.Parameter(torch.tensor(-3.0, dtype=torch.float64)) if bias else None

    def forward(self, image, text):
        out = {"image_features": image, "text_features": text, "logit_scale": self.logit_scale.exp()}
        return out | ({} if self.logit_bias is None else {"logit_bias": self.logit_bias})


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_a_model_of_unknown_origin_is_taken_by_its_bias(kind):
    image, text, scale, *bias = outputs(kind).values()
    model = Pair(bias=kind == "siglip")
    assert objective_of(model).name == kind
    value = objectives.contrastive_loss(model, image, text)
    torch.testing.assert_close(value, FORMULAS[kind](image, text, scale, *(bias or [None])), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", list(FORMULAS))
def test_an_objective_says_what_it_needs_of_the_model_and_settings_overrule_it(kind):
    plain = blueprint(TrainConfig()).config["model_cfg"]
    needed = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0} if kind == "siglip" else {}
    config = TrainConfig(loss=LossConfig(kind=kind))
    assert blueprint(config).config["model_cfg"] == plain | needed
    changed = apply_overrides(config, ['model.changes={"init_logit_bias": -2.0}'])
    assert blueprint(changed).config["model_cfg"] == plain | needed | {"init_logit_bias": -2.0}


def test_contrastive_objectives_limit_and_report_the_logit_scale():
    model = Pair()
    limited = OBJECTIVES["clip"](LossConfig(max_logit_scale=5.0))
    limited.constrain(model)
    assert limited.numbers(model) == {"logit_scale": pytest.approx(5.0)}


@pytest.fixture
def own_objectives(monkeypatch):
    """A registry that forgets what the test registers."""
    monkeypatch.setattr(OBJECTIVES, "_items", dict(OBJECTIVES._items))


RECIPE = '''
"""Nothing contrastive: every image moves to its caption."""
import torch
from ssmclip.config import *
from ssmclip.train.objective import Objective, objective


@objective("distance")
class Distance(Objective):
    start = {"init_logit_scale": 1.25}

    def forward(self, image_features, text_features, **scales):
        return (image_features - text_features).square().sum(1).mean()

    def numbers(self, model):
        return {"head_norm": model.visual.head.proj.weight.detach().norm()}


def mine():
    changes = {"embed_dim": 16, "vision_cfg": {"timm_model_name": "test_vmamba"}}
    changes["text_cfg"] = {"width": 16, "heads": 2, "layers": 1}
    return TrainConfig(
        steps=12,
        batch_size=16,
        device="cpu",
        model=ModelConfig(changes=changes),
        data=DataConfig(source="synthetic:quickstart", image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        loss=LossConfig(kind="distance", micro_batch=5),
        checkpoint=CheckpointConfig(every=6),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )
'''


def test_an_objective_of_ones_own_trains_from_the_command_line(tmp_path, own_objectives):
    recipe, run = tmp_path / "mine.py", tmp_path / "run"
    recipe.write_text(RECIPE)
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    rows = [row for row in read_rows(run / "rows.jsonl")[1] if row.task == "train"]
    losses = [row.value for row in rows if row.metric == "loss"]
    assert len(losses) == 12
    assert losses[-1] < 0.5 * losses[0]
    assert {"head_norm", "loss", "grad_norm"} <= {row.metric for row in rows}
    assert "logit_scale" not in {row.metric for row in rows}
    assert models.load_config(run)["model_cfg"]["init_logit_scale"] == 1.25
    # The objective touches no scale: the model ends with the one it started with.
    assert models.load(run).model.logit_scale.item() == 1.25
    # Read again, for another run in one process; and the analysis finds it by the run, or a checkpoint of it.
    train(load_recipe(recipe), tmp_path / "again")
    for folder in (run, run / "checkpoints" / "step_00000006"):
        assert objective_of(models.load(run).model, folder).name == "distance"
    surface = f"analyze landscape --model {run} --data synthetic:quickstart --batch-size 4 --dimensions 1 --points 3"
    assert main([*surface.split(), "--out", str(tmp_path / "surface.jsonl")]) == 0
    (middle,) = (r.value for r in read_rows(tmp_path / "surface.jsonl")[1] if r.where["x"] == 0)
    model, preprocess, tokenizer = models.load(run)
    images, texts = next(read_batches("synthetic:quickstart", preprocess, tokenizer, batches=1, batch_size=4))
    with torch.no_grad():
        distances = (model.encode_image(images, normalize=True) - model.encode_text(texts, normalize=True)).norm(dim=1)
    assert middle == pytest.approx(distances.square().mean().item(), rel=1e-5)


def test_a_run_whose_objective_is_not_registered_is_told(tmp_path, own_objectives):
    train(_with(tmp_path, steps=1), tmp_path / "run")
    del OBJECTIVES._items["distance"]
    with pytest.raises(UnknownName, match="unknown objective 'distance'; known: a-clip, classification, clip, "):
        objective_of(Pair(), tmp_path / "run")


def _with(folder, **changes):
    (folder / "mine.py").write_text(RECIPE)
    changes = {"schedule.warmup_steps": 0} | changes
    return apply_overrides(load_recipe(folder / "mine.py"), [f"{key}={value}" for key, value in changes.items()])


def test_an_unknown_objective_is_refused_before_any_work(tmp_path):
    config = TrainConfig(loss=LossConfig(kind="clop"))
    with pytest.raises(UnknownName, match="unknown objective 'clop'; did you mean 'clip'"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_parameters_of_an_objective_are_refused_as_nothing_trains_them(own_objectives):
    @objective("headed")
    class Headed(Contrastive):
        def build_loss(self):
            return nn.Linear(2, 2)

    with pytest.raises(ValueError, match=r"'headed' must not have parameters \(got loss.weight, loss.bias\)"):
        build_objective(TrainConfig(loss=LossConfig(kind="headed")))


def test_two_objectives_of_one_name_are_refused(own_objectives):
    with pytest.raises(ValueError, match="objective 'clip' is already registered"):

        @objective("clip")
        class Other(Objective):
            def forward(self, **_):
                return torch.zeros(())


class Labelled(nn.Module):
    """An image classifier whose targets are numbers of classes."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3 * 4 * 4, 5).double()

    def forward(self, images):
        return self.layer(images.flatten(1))


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_an_objective_chooses_what_the_loss_takes(own_objectives, micro_batch):
    """Classification: a model of one input, labels for targets, and outputs of other names in every micro-batch."""

    @objective("classes")
    class Classes(Objective):
        rows = ("logits", "labels")

        def outputs(self, model, images, targets):
            return {"logits": model(images), "labels": targets}

        def forward(self, logits, labels):
            return nn.functional.cross_entropy(logits, labels)

    torch.manual_seed(0)
    model, images, labels = Labelled(), torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.arange(8) % 5
    expected = torch.autograd.grad(objectives.classification_loss(model, images, labels), list(model.parameters()))
    backward(Accelerator(cpu=True), model, OBJECTIVES["classes"](), images, labels, micro_batch)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
