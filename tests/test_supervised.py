"""Supervised training: labelled data, the objective, published schedules and optimisers, the loop, starting weights."""

import io
import json
import math
import pickle
import shutil
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from ssmclip.__main__ import main
from ssmclip.config import (
    AugmentConfig,
    CheckpointConfig,
    DataConfig,
    LoggingConfig,
    LossConfig,
    MixConfig,
    ModelConfig,
    OptimiserConfig,
    ScheduleConfig,
    TrainConfig,
    apply_overrides,
)
from ssmclip.data.pairs.labelled import ClassIndex, classes_of
from ssmclip.data.pairs.loader import TableFormat
from ssmclip.models import CheckpointError, find
from ssmclip.registry import UnknownName
from ssmclip.rows import read_rows
from ssmclip.train import train
from ssmclip.train.build import build_transform, open_stream, plan
from ssmclip.train.checkpoint import checkpoints
from ssmclip.train.gradient import backward
from ssmclip.train.objective import OBJECTIVES
from ssmclip.train.optimiser import build_optimiser, layer_scales
from ssmclip.train.schedule import lr_schedule

CLASSES = ("ant", "bee", "cat")
COLOURS = {"ant": (200, 30, 30), "bee": (30, 200, 30), "cat": (30, 30, 200)}


def picture(name, number=0):
    noise = np.random.default_rng([number, *map(ord, name)]).integers(-25, 25, (24, 24, 3))
    return Image.fromarray((np.array(COLOURS[name]) + noise).clip(0, 255).astype(np.uint8))


@pytest.fixture
def folders(tmp_path):
    """Class folders with 8 pictures for each class, in train/ and val/."""
    for split in ("train", "val"):
        for name in CLASSES:
            (tmp_path / "set" / split / name).mkdir(parents=True)
            for number in range(8):
                picture(name, number).save(tmp_path / "set" / split / name / f"{number}.png")
    return tmp_path / "set"


def settings(source, *overrides):
    config = TrainConfig(
        steps=12,
        batch_size=12,
        device="cpu",
        model=ModelConfig(name="timm:test_mambaout"),
        data=DataConfig(source=str(source), image_sizes=((0.0, 32),)),
        optimiser=OptimiserConfig(lr=3e-3),
        schedule=ScheduleConfig(warmup_steps=2),
        loss=LossConfig(kind="classification", label_smoothing=0.1),
        checkpoint=CheckpointConfig(every=6),
        logging=LoggingConfig(every=1, tensorboard=False, progress=False),
    )
    return apply_overrides(config, overrides)


def losses(run):
    return [row.value for row in read_rows(run / "rows.jsonl")[1] if (row.task, row.metric) == ("train", "loss")]


# ---- data


def as_shards(folder, with_caption=False):
    folder.mkdir()
    with tarfile.open(folder / "0.tar", "w") as tar:
        for number in range(6):
            name = CLASSES[number % 3]
            buffer = io.BytesIO()
            picture(name, number).save(buffer, "PNG")
            parts = {"png": buffer.getvalue(), "cls": str(number % 3).encode()}
            for suffix, content in (parts | ({"txt": b"a caption"} if with_caption else {})).items():
                info = tarfile.TarInfo(f"{number:03d}.{suffix}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return folder


def as_parquet(path, labels, metadata=None):
    images = []
    for number, _ in enumerate(labels):
        buffer = io.BytesIO()
        picture(CLASSES[number % 3], number).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": images, "label": labels})
    pa.parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def batch(source, *overrides, size=6):
    config = settings(source, f"batch_size={size}", *overrides)
    planned = plan(config)
    return planned, next(open_stream(config, planned, 32, 0, 1))


def test_class_folders_are_numbered_in_their_sorted_order(folders):
    planned, made = batch(folders, size=24)
    assert planned.classes == CLASSES
    assert sorted(made.keys) == sorted(f"{name}/{number}.png" for name in CLASSES for number in range(8))
    assert made.texts.tolist() == [CLASSES.index(key.split("/")[0]) for key in made.keys]
    assert made.texts.dtype == torch.int64
    # torchvision's reader gives the same numbers.
    from torchvision.datasets import ImageFolder

    numbers = {path.split("/train/")[1]: label for path, label in ImageFolder(folders / "train").samples}
    assert {key: label for key, label in zip(made.keys, made.texts.tolist(), strict=True)} == numbers


def test_shards_give_the_number_in_cls_and_not_the_caption(tmp_path):
    shards = as_shards(tmp_path / "shards", with_caption=True)
    with pytest.raises(ValueError, match=r"does not name its classes: set data.classes"):
        plan(settings(shards))
    (shards / "classnames.txt").write_text("ant\nbee\ncat\n")
    planned, made = batch(shards)
    assert planned.classes == CLASSES
    assert sorted(zip(made.keys, made.texts.tolist(), strict=True)) == [(f"{n:03d}", n % 3) for n in range(6)]
    assert plan(settings(shards, "data.classes=5")).classes == ("0", "1", "2", "3", "4")


@pytest.mark.parametrize(
    ("labels", "features", "classes"),
    [
        ([0, 1, 2, 0, 1, 2], ["ant", "bee", "cat"], CLASSES),
        ([0, 1, 2, 0, 1, 2], None, ("0", "1", "2")),
        (["ant", "bee", "cat", "ant", "bee", "cat"], None, CLASSES),
    ],
)
def test_tables_give_numbers_or_names(tmp_path, labels, features, classes):
    metadata = {"huggingface": json.dumps({"info": {"features": {"label": {"names": features}}}})} if features else None
    planned, made = batch(as_parquet(tmp_path / "train.parquet", labels, metadata))
    assert planned.classes == classes
    by_row = sorted(zip((int(key.split()[1]) for key in made.keys), made.texts.tolist(), strict=True))
    assert by_row == [(row, row % 3) for row in range(6)]


def test_a_data_sets_training_split_is_a_source(shared):
    """CIFAR-10's pickles, by scikit-learn-free counting: 2,000 pictures, none of which are tested on."""
    planned, made = batch(f"dataset:cifar10:{shared / 'data'}", size=500)
    assert planned.classes[:2] == ("airplane", "automobile")
    content = {}
    for number in range(1, 6):
        with (shared / f"data/cifar10/cifar-10-batches-py/data_batch_{number}").open("rb") as file:
            part = pickle.load(file, encoding="bytes")  # our own file
        content |= {row.tobytes(): label for row, label in zip(part[b"data"], part[b"labels"], strict=True)}
    assert len(content) == 2000
    counts = np.bincount(made.texts.numpy(), minlength=10) / np.bincount(list(content.values()), minlength=10)
    assert 0.15 < counts.min() <= counts.max() < 0.35  # a quarter of each class
    with pytest.raises(ValueError, match="a classifier needs images with labels"):
        plan(settings(f"dataset:flickr8k:{shared / 'data' / 'captions'}"))
    with pytest.raises(FileNotFoundError, match="cifar100"):
        plan(settings("dataset:cifar100"))


def test_labels_without_a_class_are_refused():
    assert ClassIndex(CLASSES)(["cat", "0"]).tolist() == [2, 0]
    assert ClassIndex(("7", "8"))(["8", "0"]).tolist() == [1, 0]  # a name goes before a number
    for label in ("dog", "3", "-1", ""):
        with pytest.raises(ValueError, match=f"label '{label}' is none of the 3 classes"):
            ClassIndex(CLASSES)([label])


def test_data_without_classes_are_refused(folders, tmp_path):
    (folders / "train" / "dog").mkdir()
    with pytest.raises(ValueError, match=r"1 of 4 class folders in .*train have no picture: dog"):
        batch(folders)
    (tmp_path / "one" / "cat").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"at least 2 classes .* has 1: cat"):
        plan(settings(tmp_path / "one"))
    (tmp_path / "names.txt").write_text("cat\ncat\n")
    with pytest.raises(ValueError, match="names classes more than once: cat"):
        classes_of("", str(tmp_path / "names.txt"), TableFormat())
    with pytest.raises(FileNotFoundError, match=r"data.classes must be a number or a file"):
        classes_of("", str(tmp_path / "missing.txt"), TableFormat())


def test_a_set_smaller_than_a_batch_is_refused(folders):
    with pytest.raises(ValueError, match=r"has 24 images, fewer than a batch \(got batch_size=25\)"):
        batch(folders, size=25)


# ---- augmentation


def test_timm_makes_the_transform_and_draws_only_from_the_generator(folders):
    config = settings(folders, "library=timm", "auto_augment=rand-m9-mstd0.5-inc1", "erase_prob=1", "scale=[0.3, 1]")
    transform = build_transform(config.data.augment, plan(config), 32)
    image = picture("ant")
    before = torch.get_rng_state()
    made = [transform(image, torch.Generator().manual_seed(seed)) for seed in (1, 2, 1)]
    assert torch.equal(torch.get_rng_state(), before)
    assert made[0].shape == (3, 32, 32)
    assert torch.equal(made[0], made[2])
    assert not torch.equal(made[0], made[1])
    names = [type(part).__name__ for part in transform._transform.transforms]
    assert names.index("RandAugment") < names.index("RandomErasing")


def test_without_colors_crop_and_flip_stay_as_they_are(folders):
    geometry = ["scale=[0.3, 0.5]", "flip=true", "interpolation=bilinear"]
    colors = ["color_jitter=[0.4, 0.4, 0.2, 0.1]", "color_jitter_prob=0.8", "gray_scale_prob=0.2"]
    for library, more in (("own", ["solarize_prob=0.2", "color_order=random"]), ("timm", [])):
        base = [f"library={library}", *geometry, "gaussian_blur_prob=0.5"]
        given = (base[:-1], [*base, *colors, *more, "colors=false"], [*base, *colors, *more])
        configs = [settings(folders, *overrides) for overrides in given]
        made = [
            build_transform(config.data.augment, plan(config), 32)(picture("ant"), torch.Generator().manual_seed(3))
            for config in configs
        ]
        assert torch.equal(made[0], made[1])
        assert not torch.equal(made[1], made[2])
    with pytest.raises(ValueError, match=r"data.augment.colors must be true for auto_augment"):
        settings(folders, "library=timm", "auto_augment=rand-m9", "colors=false")


def test_settings_of_timm_need_timm():
    for changes in ({"auto_augment": "rand-m9"}, {"erase_prob": 0.1}, {"interpolation": "random"}):
        with pytest.raises(ValueError, match="library"):
            AugmentConfig(**changes)


# ---- the objective


def objective(**changes):
    return OBJECTIVES["classification"](LossConfig(kind="classification", **changes), num_classes=5)


def test_the_loss_is_the_formula():
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(6, 5, generator=generator, dtype=torch.float64).float(), torch.arange(6) % 5
    torch.testing.assert_close(objective()(logits, labels), cross_entropy(logits, labels))
    smooth = cross_entropy(logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(objective(label_smoothing=0.1)(logits, labels), smooth)
    shares = 0.3 * one_hot(labels, 5) + 0.7 * one_hot(labels.flip(0), 5)
    torch.testing.assert_close(objective()(logits, shares.float()), cross_entropy(logits, shares))
    targets = one_hot(labels, 5) * 0.9 + 0.1 / 5
    binary = nn.functional.binary_cross_entropy_with_logits(logits, targets)
    torch.testing.assert_close(objective(binary=True, label_smoothing=0.1)(logits, labels), binary)


def test_images_and_labels_are_mixed_with_one_share():
    mixing = objective(mix=MixConfig(mixup=0.8), label_smoothing=0.1)
    images, labels = torch.zeros(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    images[:2] = 1.0
    mixed, targets = mixing.inputs(images, labels)
    share = mixed[0, 0, 0, 0].item()
    torch.testing.assert_close(mixed[:, 0, 0, 0], torch.tensor([share, share, 1 - share, 1 - share]))
    smooth = one_hot(labels, 5) * 0.9 + 0.1 / 5
    torch.testing.assert_close(targets, share * smooth + (1 - share) * smooth.flip(0))
    assert torch.equal(images[:2], torch.ones(2, 3, 8, 8))  # the batch itself is left alone


def test_micro_batches_add_up_to_the_gradient_of_the_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 5)).double()
    images, labels = torch.randn(8, 3, 4, 4, dtype=torch.float64), torch.arange(8) % 5
    expected = torch.autograd.grad(cross_entropy(model(images), labels), list(model.parameters()))
    value = backward(Accelerator(cpu=True), model, objective(), images, labels, 3)
    torch.testing.assert_close(
        value, cross_entropy(model(images), labels).float(), check_dtype=False, rtol=1e-6, atol=0
    )
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-5, atol=1e-7)  # the loss is in float32


@pytest.mark.parametrize("overrides", [["batch_size=9"], ["micro_batch=5"], ["batch_size=10", "micro_batch=7"]])
def test_an_odd_batch_cannot_be_mixed(folders, overrides):
    with pytest.raises(ValueError, match="an even number of images in each micro-batch"):
        train(settings(folders, "mixup=0.8", *overrides), folders.parent / "run")
    assert not (folders.parent / "run").exists()


# ---- schedule and optimiser


def test_mambaouts_schedule_at_the_epochs_that_its_script_printed():
    """Read off MambaOut's train.py with timm 0.6.11: 310 epochs, the rate constant within each."""
    epoch = 312
    schedule = ScheduleConfig(
        shape="timm:cosine",
        warmup_steps=20 * epoch,
        cooldown_steps=10 * epoch,
        hold_steps=epoch,
        start_lr=1e-6,
        end_lr=1e-5,
    )
    rates = lr_schedule(310 * epoch, schedule, 4e-3)
    assert len(rates) == 96_720
    expected = {0: 1e-6, 1: 2.0095e-4, 20: 3.9564e-3, 150: 2.005e-3, 299: 1.011e-5, 305: 1e-5}
    for at, rate in expected.items():
        assert rates[at * epoch] == pytest.approx(rate, rel=1e-4)
        assert rates[at * epoch] == rates[(at + 1) * epoch - 1]
    assert rates.max() == pytest.approx(3.9564e-3, rel=1e-4)
    assert rates[20 * epoch] == pytest.approx(1e-5 + (4e-3 - 1e-5) * (1 + math.cos(math.pi * 20 / 300)) / 2, rel=1e-12)


def test_other_schedules_are_timms():
    steps = ScheduleConfig(shape="timm:step", warmup_steps=0, args={"decay_epochs": 3, "decay_rate": 0.5})
    np.testing.assert_allclose(lr_schedule(7, steps, 8.0), [8, 8, 8, 4, 4, 4, 2])
    with pytest.raises(UnknownName, match="unknown schedule 'timm:plateau'"):
        lr_schedule(7, ScheduleConfig(shape="timm:plateau"), 8.0)
    with pytest.raises(ValueError, match=r"schedule.args must be arguments of"):
        lr_schedule(7, ScheduleConfig(shape="timm:cosine", args={"decoy": 1}), 8.0)
    with pytest.raises(ValueError, match=r"schedule.hold_steps needs a schedule of timm"):
        ScheduleConfig(hold_steps=2)


@pytest.mark.parametrize("groups", ["block", "stage"])
@pytest.mark.parametrize("name", ["test_mambaout", "vmamba_nano", "vit_nano_patch16"])
def test_layers_learn_as_timms_layer_decay_has_it(name, groups):
    if name not in timm.list_models():
        pytest.skip(f"{name} is no model here")
    model = timm.create_model(name, num_classes=3)
    scales = layer_scales(model, 0.5, groups)
    if groups == "block":  # timm's own function has only these
        theirs = timm.optim.param_groups_layer_decay(model, layer_decay=0.5)
        expected = {id(p): group["lr_scale"] for group in theirs for p in group["params"]}
        assert {id(p): scales[name] for name, p in model.named_parameters()} == pytest.approx(expected)
    head = [name for name, _ in model.named_parameters()][-1]
    assert scales[head] == 1.0
    assert min(scales.values()) < 0.2


def test_mambaout_tiny_has_20_layers_of_blocks_and_6_of_stages():
    with torch.device("meta"):
        model = timm.create_model("mambaout_tiny")
    smallest = [min(layer_scales(model, 0.7, groups).values()) for groups in ("block", "stage")]
    assert smallest == pytest.approx([0.7**19, 0.7**5], rel=1e-6)


def test_lamb_takes_the_step_that_timms_takes():
    torch.manual_seed(0)
    ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
    theirs.load_state_dict(ours.state_dict())
    config = OptimiserConfig(algorithm="lamb", lr=0.01, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.02)
    mine = build_optimiser(ours, config)
    other = timm.optim.Lamb(
        [{"params": [theirs.weight], "weight_decay": 0.02}, {"params": [theirs.bias], "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.999),
        eps=1e-6,
    )
    for model, optimiser in ((ours, mine), (theirs, other)):
        model(torch.ones(2, 4)).square().sum().backward()
        optimiser.step()
    torch.testing.assert_close(ours.weight, theirs.weight, rtol=0, atol=0)
    torch.testing.assert_close(ours.bias, theirs.bias, rtol=0, atol=0)
    with pytest.raises(UnknownName, match="unknown optimiser 'lambda'"):
        build_optimiser(ours, OptimiserConfig(algorithm="lambda"))
    with pytest.raises(ValueError, match=r"optimiser.args must be arguments of timm's lamb"):
        build_optimiser(ours, OptimiserConfig(algorithm="lamb", args={"momentums": 1}))


# ---- the loop


def test_a_classifier_learns_and_its_checkpoint_is_timms(folders, tmp_path):
    run = train(settings(folders, "steps=30", "lr=0.01"), tmp_path / "run")
    assert losses(run)[-1] < 0.6 < 1.0 < losses(run)[0]
    checkpoint = checkpoints(run)[-1]
    config = json.loads((checkpoint / "config.json").read_text())
    assert (config["label_names"], config["num_classes"]) == (list(CLASSES), 3)
    # timm reads the folder without this package's help, and classifies the validation pictures.
    model = timm.create_model(f"local-dir:{checkpoint}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    images = torch.stack([transform(picture(name, 100)) for name in CLASSES])
    assert images.shape[-1] == 32
    with torch.no_grad():
        assert model(images).argmax(1).tolist() == [0, 1, 2]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_training_is_the_same_bit_for_bit(folders, tmp_path, workers):
    mixing = ["mixup=0.8", "cutmix=1", "library=timm", "auto_augment=rand-m9-mstd0.5-inc1", "erase_prob=0.25"]
    more = ["micro_batch=4", "ema.decay=0.9", "drop_path_rate=0.2", f"workers={workers}", "checkpoint.keep=9"]
    config = settings(folders, *mixing, *more)
    whole = train(config, tmp_path / "whole")
    resumed = tmp_path / "resumed"
    train(config, resumed)
    shutil.rmtree(checkpoints(resumed)[-1])
    train(config, resumed, resume=True)
    assert losses(resumed) == losses(whole)
    assert len(losses(whole)) == 12
    ends = [timm.models.load_state_dict(checkpoints(run)[-1] / "model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_training_starts_from_a_run_with_a_new_head_at_another_size(folders, tmp_path, caplog):
    run = train(settings(folders, "steps=3"), tmp_path / "run")
    trained = timm.models.load_state_dict(checkpoints(run)[-1] / "model.safetensors")
    (tmp_path / "names.txt").write_text("ant\nbee\ncat\ndog\n")
    fewer = [
        f"model.weights={run}",
        f"data.classes={tmp_path / 'names.txt'}",
        "head_init_scale=0.001",
        "steps=1",
        "lr=1e-9",
    ]
    fewer += ["warmup_steps=0", "weight_decay=0"]
    with pytest.raises(CheckpointError, match="are those of another model"):
        train(settings(folders, *fewer, "model.name=timm:test_vit"), tmp_path / "other")
    tuned = train(settings(folders, *fewer, "image_sizes=[[0, 48]]"), tmp_path / "tuned")
    state = timm.models.load_state_dict(checkpoints(tuned)[-1] / "model.safetensors")
    assert "the classifier's head is new, for 4 classes" in caplog.text
    heads = sorted(key for key in state if key not in trained or state[key].shape != trained[key].shape)
    assert heads == ["head.fc.bias", "head.fc.weight"]
    assert state["head.fc.weight"].abs().max() < 1e-4
    for key in state.keys() - set(heads):
        torch.testing.assert_close(state[key], trained[key], rtol=0, atol=1e-6)


def test_a_clip_is_no_classifier(folders, tmp_path):
    with pytest.raises(UnknownName, match="unknown image encoder 'CLIP-VMamba-Nano'"):
        train(settings(folders, "model.name=CLIP-VMamba-Nano"), tmp_path / "run")
    with pytest.raises(ValueError, match="test_mambaout cannot be built with the arguments decoy"):
        train(settings(folders, 'model.changes={"decoy": 1}'), tmp_path / "run")


@pytest.mark.parametrize("name", ["vit_nano_patch16", "timm:test_vit", "vmamba_nano", "mambaout_nano_linear_head"])
def test_the_files_of_a_classifier_are_read_at_the_size_it_was_trained_at(folders, tmp_path, name):
    planned = plan(settings(folders, f"model.name={name}", "image_sizes=[[0, 64]]"))
    network = planned.create().eval()
    planned.save(network, tmp_path / "model")
    found = find(tmp_path / "model")
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found.network(image), network(image), rtol=0, atol=0)
        theirs = timm.create_model(f"local-dir:{tmp_path / 'model'}", pretrained=True).eval()
        torch.testing.assert_close(theirs(image), network(image), rtol=0, atol=0)
    assert found.classes == CLASSES
    assert found.preprocess(picture("ant")).shape == (3, 64, 64)


RECIPE = """
from ssmclip.config import *


def mine():
    return TrainConfig(
        steps=6,
        batch_size=12,
        device="cpu",
        model=ModelConfig(name="timm:test_mambaout"),
        data=DataConfig(source="{source}", image_sizes=((0.0, 32),)),
        loss=LossConfig(kind="classification"),
        schedule=ScheduleConfig(warmup_steps=1),
        validation=ValidationConfig(every=3, tasks=("{val}",), best="{val}/top1"),
        logging=LoggingConfig(tensorboard=False, progress=False),
    )
"""


def test_a_run_validates_on_class_folders_and_evaluate_agrees(folders, tmp_path, capsys):
    """Counted with timm's own transform and model, picture by picture."""
    recipe = tmp_path / "mine.py"
    val = f"folder:{folders}/val"
    recipe.write_text(RECIPE.format(source=folders, val=val))
    run = tmp_path / "run"
    assert main(["train", str(recipe), "--out", str(run)]) == 0
    rows = [row for row in read_rows(run / "rows.jsonl")[1] if (row.task, row.metric) == (val, "top1")]
    assert [row.where["step"] for row in rows] == [3, 6]
    out = tmp_path / "rows.jsonl"
    words = [
        "evaluate",
        "--model",
        f"run={run}",
        "--tasks",
        f"folder:{folders}/val",
        "--out",
        str(out),
        "--device",
        "cpu",
    ]
    assert main([*words, "--cache", "none"]) == 0
    (evaluated,) = (row for row in read_rows(out)[1] if row.metric == "top1")
    best = run / "checkpoints" / (run / "checkpoints" / "best").read_text().strip()
    model = timm.create_model(f"local-dir:{best}", pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    with torch.no_grad():
        right = [
            model(transform(picture(name, number))[None]).argmax().item() == label
            for label, name in enumerate(CLASSES)
            for number in range(8)
        ]
    assert evaluated.value == sum(right) / 24 == max(row.value for row in rows)

    shutil.rmtree(folders / "train" / "cat")  # validation has a class that training has not
    assert main(["train", str(recipe), "--out", str(tmp_path / "other")]) == 1
    assert "cat" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()
