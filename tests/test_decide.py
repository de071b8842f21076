"""Decisions against open_clip's own zero-shot classifier, ImageNet's WordNet ids in the human data, and plain loops."""

import argparse
import logging
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo
from torch import nn
from torchvision.transforms import Compose, Resize

from ssmclip.__main__ import main
from ssmclip.cli import evaluate as command
from ssmclip.evaluate import Model, Settings
from ssmclip.evaluate.models import Models
from ssmclip.humans.decide import (
    IMAGENET,
    SCORED,
    category_probabilities,
    clip_decider,
    decide,
    imagenet_decider,
    open_stimuli,
)
from ssmclip.humans.scores import score_decisions
from ssmclip.humans.stimuli import CATEGORIES
from ssmclip.humans.study import Experiment, OodTask
from ssmclip.humans.trials import read_trials
from ssmclip.models import find, save_model
from ssmclip.rows import read_rows

TEMPLATES = ["a photo of a {}.", "itap of the {}."]
QUICK = Settings(batch_size=4)


def timm_decider(name: str, **settings):
    model = find(f"timm:{name}", label=name, **settings)
    return imagenet_decider(model.network, model.preprocess, model.label)


@pytest.fixture
def root(tmp_path):
    """Sixteen edges and eight cue conflicts of coloured noise, 224 x 224."""
    rng = np.random.default_rng(0)
    for name, texture in [(f"{c}{i + 1}", None) for i, c in enumerate(CATEGORIES)] + [
        ("bird1", "cat2"),
        ("oven3", "dog1"),
    ]:
        folder = tmp_path / "stimuli" / ("cue-conflict" if texture else "edges") / name.rstrip("0123456789")
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (224, 224, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{name}{f'-{texture}' if texture else ''}.png")
    return tmp_path / "stimuli"


class Brightest(nn.Module):
    """A thousand (or fewer) logits that depend on the image; counts the images it saw, and fails at one if asked."""

    def __init__(self, classes: int = 1000, fails_at: int | None = None):
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(classes, 3) * 10)
        self.seen, self.fails_at = 0, fails_at

    def forward(self, images):
        self.seen += len(images)
        if self.fails_at is not None and self.seen > self.fails_at:
            raise RuntimeError("out of memory")
        return images.mean(dim=(2, 3)) @ self.weight.T


def see(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


def test_the_207_classes_are_those_of_the_human_experiments(shared):
    """Every ImageNet image people saw carries its class (a WordNet id) and its category in its name."""
    counts = [1, 4, 2, 49, 5, 7, 3, 6, 4, 3, 109, 2, 2, 1, 1, 8]
    assert [len(IMAGENET[category]) for category in CATEGORIES] == counts
    assert len(set(SCORED)) == sum(counts) == 207
    place = {wordnet: i for i, wordnet in enumerate(ImageNetInfo().label_names())}
    table = pq.read_table(shared / "data" / "ood" / "human_compact.parquet", columns=["image_id", "category"])
    seen = {(row["image_id"].split("_")[0], row["category"]) for row in table.to_pylist()}
    seen = {(place[wordnet], category) for wordnet, category in seen if wordnet in place}
    assert len(seen) > 190
    assert [(i, category) for i, category in seen if i not in IMAGENET[category]] == []


def test_probabilities_are_means_of_the_softmax_over_all_thousand():
    logits = torch.randn(20, 1000, generator=torch.Generator().manual_seed(0)) * 5
    softmax = logits.double().softmax(dim=1).numpy()
    means = np.array([[softmax[i, list(IMAGENET[c])].mean() for c in CATEGORIES] for i in range(20)])
    found = category_probabilities(logits, [IMAGENET[c] for c in CATEGORIES]).numpy()
    np.testing.assert_allclose(found, means / means.sum(axis=1, keepdims=True), rtol=1e-12)
    # A class of no category may be so likely that the others' probabilities are zero in any format.
    logits[:, 0] = 1e5
    again = category_probabilities(logits, [IMAGENET[c] for c in CATEGORIES]).numpy()
    np.testing.assert_allclose(again, found, rtol=1e-12)
    # Nor does it matter that another image's logits are larger by thousands.
    shifted = logits.double() + 1000 * torch.arange(20)[:, None]
    again = category_probabilities(shifted, [IMAGENET[c] for c in CATEGORIES]).numpy()
    np.testing.assert_allclose(again, found, rtol=1e-10)


@pytest.fixture(scope="module")
def vit() -> Model:
    torch.manual_seed(0)
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CLIP(embed_dim=16, vision_cfg=vision, text_cfg=text, output_dict=True).eval()
    return Model(
        model, open_clip.image_transform(32, is_train=False), open_clip.SimpleTokenizer(context_length=16), "vit"
    )


def test_zero_shot_over_207_classes_decides_as_over_all_thousand(vit, root, tmp_path):
    decider = clip_decider(vit, Settings(batch_size=256), templates=TEMPLATES)
    stimuli = open_stimuli(root)
    decide(decider, stimuli, tmp_path / "d.parquet", QUICK)
    rows = pq.read_table(tmp_path / "d.parquet").to_pylist()
    classifier = open_clip.build_zero_shot_classifier(
        vit.network,
        vit.tokenizer,
        open_clip.IMAGENET_CLASSNAMES,
        [lambda name, t=template: t.format(name) for template in TEMPLATES],
        num_classes_per_batch=200,
    )
    images = torch.stack([vit.preprocess(Image.open(stimulus.path)) for stimulus in stimuli])
    with torch.no_grad():
        softmax = (100 * vit.network.encode_image(images, normalize=True) @ classifier).double().softmax(dim=1)
    means = torch.stack([softmax[:, list(IMAGENET[c])].mean(dim=1) for c in CATEGORIES], dim=1)
    assert [row["object_response"] for row in rows] == [CATEGORIES[i] for i in means.argmax(dim=1)]
    assert len({row["object_response"] for row in rows}) > 1
    shares = torch.tensor([row["probabilities"] for row in rows])
    torch.testing.assert_close(shares, (means / means.sum(dim=1, keepdim=True)).float(), rtol=2e-4, atol=1e-6)


def test_prompts_are_embedded_once(vit, tmp_path, monkeypatch):
    """Of the 207 classes with OpenAI's 80 templates 16,560 prompts, once; then other templates, other weights."""
    seen = []
    encode = vit.network.encode_text
    monkeypatch.setattr(vit.network, "encode_text", lambda tokens, **k: seen.append(len(tokens)) or encode(tokens, **k))
    settings = Settings(batch_size=1024, cache=tmp_path / "cache")
    image = torch.rand(2, 3, 32, 32)
    decider = clip_decider(vit, settings)
    first = decider.logits(image)
    assert sum(seen) == 207 * 80 == 16_560
    torch.testing.assert_close(clip_decider(replace(vit), settings).logits(image), first, rtol=0, atol=0)
    assert sum(seen) == 16_560
    few = dict(prompts="categories", templates=TEMPLATES)
    other = clip_decider(vit, settings, **few)
    positive = other.logits(image)
    assert sum(seen) == 16_560 + 16 * 2
    assert other.fingerprint != decider.fingerprint == clip_decider(replace(vit), settings).fingerprint
    with torch.no_grad():
        vit.network.text_projection.mul_(-1)
    negative = clip_decider(replace(vit), settings, **few).logits(image)
    with torch.no_grad():
        vit.network.text_projection.mul_(-1)
    assert sum(seen) == 16_560 + 2 * 16 * 2
    torch.testing.assert_close(negative, -positive)


def test_a_stimulus_of_the_models_size_reaches_it_unaltered(root, tmp_path):
    """As in the published evaluation: to [0, 1], ImageNet's statistics, no resize, no crop; and never 8 bits again."""
    path = open_stimuli(root, ["edge"])[0].path
    pixels = np.asarray(Image.open(path)) / 255
    decider = timm_decider("vit_tiny_patch16_224")
    expected = (pixels - np.array([0.5, 0.5, 0.5])) / np.array([0.5, 0.5, 0.5])
    np.testing.assert_allclose(decider.preprocess(Image.open(path)), expected.transpose(2, 0, 1), atol=1e-6)
    assert decide(decider, open_stimuli(root, ["cue-conflict"]), tmp_path / "d.parquet", QUICK) == 2
    assert read_trials(tmp_path / "d.parquet").subjects == ("vit_tiny_patch16_224",)


def test_a_run_that_failed_goes_on_where_it_stopped(root, tmp_path):
    stimuli = open_stimuli(root)
    whole = Brightest()
    assert decide(imagenet_decider(whole, see, "m"), stimuli, tmp_path / "whole.parquet", QUICK) == 18
    out = tmp_path / "d.parquet"
    with pytest.raises(RuntimeError, match="out of memory"):
        decide(imagenet_decider(Brightest(fails_at=10), see, "m"), stimuli, out, QUICK)
    assert len(pq.read_table(out)) == 8
    rest = Brightest()
    assert decide(imagenet_decider(rest, see, "m"), stimuli, out, QUICK) == rest.seen == 10
    assert pq.read_table(out).equals(pq.read_table(tmp_path / "whole.parquet"))
    assert decide(imagenet_decider(rest, see, "m"), stimuli, out, QUICK) == 0
    other = Brightest()
    other.weight.data += 1
    with pytest.raises(ValueError, match="decisions of another 'm'"):
        decide(imagenet_decider(other, see, "m"), stimuli, out, QUICK)
    assert decide(imagenet_decider(other, see, "n"), stimuli, out, QUICK) == 18
    assert read_trials(out).subjects == ("m", "n")
    assert not list(tmp_path.glob("*.partial"))


def test_a_decider_is_known_again_by_its_weights_and_preprocessing():
    kept = []  # so that each is at an address of its own

    def made(size: int) -> str:
        def preprocess(image):
            return see(image)

        kept.append(preprocess)
        return imagenet_decider(Brightest(), Compose([Resize(size), preprocess]), "m").fingerprint

    assert made(224) == made(224) != made(256)


def test_decisions_are_the_models(root, tmp_path):
    stimuli = open_stimuli(root, ["edge"])
    model = Brightest()
    decide(imagenet_decider(model, see, "m"), stimuli, tmp_path / "d.parquet", QUICK)
    rows = pq.read_table(tmp_path / "d.parquet").to_pylist()
    for row, stimulus in zip(rows, stimuli, strict=True):
        logits = (
            np.asarray(Image.open(stimulus.path)).reshape(-1, 3).mean(axis=0) / 255 @ model.weight.detach().numpy().T
        )
        means = [np.exp(logits[list(IMAGENET[c])]).mean() for c in CATEGORIES]
        assert row["object_response"] == CATEGORIES[int(np.argmax(means))]
        np.testing.assert_allclose(row["probabilities"], means / np.sum(means), rtol=1e-3)
        assert (row["dataset"], row["subject"], row["category"]) == ("edge", "m", stimulus.category)


def test_what_cannot_decide_is_refused_and_what_cannot_be_read_counted(root, tmp_path, vit, caplog):
    out = tmp_path / "d.parquet"
    stimuli = open_stimuli(root)
    with pytest.raises(ValueError, match=r"m must give 1,000 logits \(got 999\)"):
        decide(imagenet_decider(Brightest(999), see, "m"), stimuli, out, QUICK)
    with pytest.raises(ValueError, match=r"r must give 1,000 logits \(got 999\)"):
        decide(imagenet_decider(timm.create_model("test_resnet", num_classes=999), see, "r"), stimuli, out, QUICK)
    assert not out.exists()
    broken = Brightest()
    broken.weight.data[3, 0] = torch.nan
    with pytest.raises(ValueError, match=r"m: the logits of .*\.png are not finite"):
        decide(imagenet_decider(broken, see, "m"), stimuli, out, QUICK)
    with pytest.raises(ValueError, match="unknown prompts 'all'; known: imagenet, categories"):
        clip_decider(vit, QUICK, prompts="all")
    with pytest.raises(FileNotFoundError, match="no data set of stimuli under"):
        open_stimuli(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="sketch"):
        open_stimuli(root, ["sketch"])
    stimuli[2].path.write_bytes(stimuli[2].path.read_bytes()[:500])
    (root / "edges" / "bird" / "budgie1.png").write_bytes(b"")
    caplog.set_level(logging.WARNING)
    assert decide(imagenet_decider(Brightest(), see, "m"), open_stimuli(root), out, QUICK) == 17
    assert "1 stimuli could not be read; the first" in caplog.text
    assert "edge: ignoring 1 files whose names do not follow the set's form; the first: bird/budgie1.png" in caplog.text
    (tmp_path / "old.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"old.parquet is not a file of decisions"):
        decide(imagenet_decider(Brightest(), see, "m"), stimuli, tmp_path / "old.parquet", QUICK)


@pytest.fixture
def people(tmp_path):
    """Two people's answers to the edges and to silhouettes of the same names."""
    lines = [
        f"{dataset},s0{who},{c}{i + 1}.png,0,{c},{c if (i + who) % 4 else 'na'}"
        for dataset in ("edge", "silhouette")
        for who in (1, 2)
        for i, c in enumerate(CATEGORIES)
    ]
    path = tmp_path / "people.csv"
    path.write_text("\n".join(["dataset,subj,imagename,condition,category,object_response", *lines]))
    return path


def test_the_task_ood_decides_and_scores(root, tmp_path, people, tiny_clip, tiny_config, monkeypatch):
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:2])
    save_model(tiny_clip[0], tiny_config, tmp_path / "tiny")
    out = tmp_path / "rows.jsonl"
    words = ["--model", f"{tmp_path / 'tiny'},timm:resnet10t", "--tasks", "ood", "--data", str(root), "--out", str(out)]
    words += ["--cache", str(tmp_path / "cache")]
    with pytest.raises(ValueError, match="--humans FILE"):
        command.run(parse(*words))
    assert command.run(parse(*words, "--humans", str(people), "--ood-prompts", "categories")) == 0
    _, rows = read_rows(out)
    assert {row.model for row in rows} == {"humans", "tiny", "resnet10t"}
    decided = pq.read_table(tmp_path / "rows.decisions.parquet").to_pylist()
    right = [
        row["object_response"] == row["category"]
        for row in decided
        if (row["subject"], row["dataset"]) == ("tiny", "edge")
    ]
    found = [row.value for row in rows if (row.model, row.task, row.metric) == ("tiny", "ood/edge", "ood_accuracy")]
    assert found == [np.mean(right)]
    assert len(list((tmp_path / "cache" / "texts").iterdir())) == 1
    shown = {row.task: list(row.extra["stimuli"]) for row in rows if "stimuli" in row.extra}
    assert shown == {"ood/edge": ["0"]}


def test_the_object_ood_yields_one_data_set_after_another(root, tmp_path, people, vit, monkeypatch):
    """Of a model that is there, of one by its name and of one that decided in an earlier run."""
    monkeypatch.setattr(open_clip, "OPENAI_IMAGENET_TEMPLATES", open_clip.OPENAI_IMAGENET_TEMPLATES[:2])
    shutil.copytree(root / "edges", root / "silhouettes")
    decisions, stimuli = tmp_path / "d.parquet", open_stimuli(root)
    decide(imagenet_decider(Brightest(), see, "earlier"), stimuli, decisions, QUICK)
    task = OodTask(read_trials(people), Experiment(stimuli, decisions, "categories"), resamples=20)
    assert task.name == "ood"
    models = {"vit": vit, "timm:resnet10t": "timm:resnet10t"}
    averages, *of_sets = task.measure(Models(models), replace(QUICK, examples=0, seed=3))
    assert averages == []  # nobody was asked all 17
    assert [{row.task for row in rows} for rows in of_sets] == [{"ood/edge"}, {"ood/silhouette"}]
    rows = [row for of_set in of_sets for row in of_set]
    assert {row.model for row in rows} == {"humans", "earlier", "vit", "resnet10t"}
    assert rows == score_decisions(read_trials(people), read_trials(decisions), resamples=20, seed=3)
    assert list(task.experiment.run({"vit": vit}, QUICK)) == [("vit", 0)]


def test_a_timm_model_is_asked_at_another_size():
    small = timm_decider("vit_tiny_patch16_224", image_size=64)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8))
    inputs = small.preprocess(picture)
    resized = np.asarray(picture.resize((64, 64), Image.Resampling.BICUBIC)) / 255
    np.testing.assert_allclose(inputs, (resized.transpose(2, 0, 1) - 0.5) / 0.5, atol=1e-6)
    assert small.logits(inputs[None]).shape == (1, 1000)
    wide = timm_decider("vit_tiny_patch16_224", image_size=(64, 96))
    assert wide.preprocess(picture).shape == (3, 64, 96)
    with pytest.raises(ValueError, match="no multiple of the patch"):
        timm_decider("vit_tiny_patch16_224", image_size=100)


def test_sets_rebuilt_from_imagenet_are_decided_and_scored(tmp_path, capsys):
    """From a folder like ILSVRC2012 and the image ids of the human data to scores, with nothing that doesn't match."""
    rng = np.random.default_rng(0)
    of = [("n02690373", "airplane"), ("n02504013", "elephant"), ("n02690373", "airplane"), ("n02504013", "elephant")]
    trials = []
    for i, (wordnet, category) in enumerate(of):
        file = tmp_path / "imagenet" / "train" / wordnet / f"{wordnet}_{i}.JPEG"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 200 + 18 * i, (280, 300, 3), dtype=np.uint8)).save(file, "JPEG")
        trials += [
            {
                "dataset": "contrast",
                "subject": who,
                "image_id": f"{wordnet}_{i}.png",
                "condition": ("c100", "c50")[i // 2],
                "category": category,
                "object_response": category if i != who else "na",
            }
            for who in (1, 2)
        ]
    people = tmp_path / "humans.parquet"
    pq.write_table(pa.Table.from_pylist([row | {"subject": f"subject-0{row['subject']}"} for row in trials]), people)
    words = ["--humans", str(people), "--imagenet", str(tmp_path / "imagenet"), "--distortions", "contrast"]
    assert main(["distort", *words, "--out", str(tmp_path / "datasets")]) == 0
    out = tmp_path / "decisions.parquet"
    decide(imagenet_decider(Brightest(), see, "m"), open_stimuli(tmp_path / "datasets"), out, QUICK)
    decided = pq.read_table(out).to_pylist()
    assert {(row["image_id"], row["condition"]) for row in decided} == {(r["image_id"], r["condition"]) for r in trials}
    right = {row["image_id"]: row["object_response"] == row["category"] for row in decided}
    words = ["--decisions", str(out), "--humans", str(people), "--resamples", "0"]
    assert main(["ood", "score", *words, "--out", str(tmp_path / "rows.jsonl")]) == 0
    _, rows = read_rows(tmp_path / "rows.jsonl")
    (row,) = (row for row in rows if (row.model, row.metric) == ("m", "ood_accuracy"))
    assert (row.value, row.n) == (np.mean([right["n02690373_2.png"], right["n02504013_3.png"]]), 4)
    assert "partial" not in row.extra
    assert "4 written" in capsys.readouterr().out


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args(words)
