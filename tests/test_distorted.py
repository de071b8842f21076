"""Accuracy over the level of distortion, against pictures distorted, cropped, embedded and counted one by one."""

import argparse

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binom
from torchvision.transforms.functional import center_crop, resize

import ssmclip
from ssmclip.cli import evaluate as command
from ssmclip.cli import quickstart
from ssmclip.data.distortions.pictures import picture_seed
from ssmclip.data.testsets.open import Classification, load_card, open_dataset
from ssmclip.evaluate import Model, Settings, distorted
from ssmclip.evaluate.distorted import choose, distorted_rows
from ssmclip.evaluate.retrieval import Retrieval
from ssmclip.evaluate.tasks import Task
from ssmclip.evaluate.zeroshot import ZeroShot
from ssmclip.report.figures.examples import picture
from ssmclip.rows import read_rows

FEW = Settings(batch_size=16, max_images=10, examples=1)


class Ruler:
    """A CLIP whose embedding of a picture is its mean colour and contrast, of a text a fixed random direction."""

    def __init__(self, turn: float):
        self.turn = turn

    def clip(self, name: str) -> Model:
        model = torch.nn.Linear(4, 4, bias=False)
        torch.manual_seed(3)
        torch.nn.init.orthogonal_(model.weight)
        with torch.no_grad():
            model.weight += self.turn * torch.randn(4, 4)
        model.encode_image = lambda images: model(images.flatten(1))
        model.encode_text = self.hear
        return Model(model, self.see, self.say, name)

    @staticmethod
    def see(picture: Image.Image) -> torch.Tensor:
        pixels = np.asarray(picture, np.float64) / 255
        return torch.tensor([*(pixels.mean(axis=(0, 1)) - 0.5), pixels.std()]).float()[:, None, None]

    @staticmethod
    def say(texts: list[str]) -> torch.Tensor:
        return torch.tensor([[len(text) + ord(text[-1])] for text in texts])

    @staticmethod
    def hear(tokens: torch.Tensor) -> torch.Tensor:
        return torch.stack([torch.from_numpy(np.random.RandomState(int(seed)).randn(4)) for seed in tokens[:, 0]])


def by_hand(clips: list[Model], dataset, classes: torch.Tensor, name: str, label: str, places) -> list[list[bool]]:
    """Of each model, which pictures are right."""
    right = [[] for _ in clips]
    for place in places:
        picture, truth = dataset[place]
        picture = np.asarray(center_crop(resize(picture, 256), 224))
        seed = picture_seed(0, name, str(dataset.keys[place]))
        picture = Image.fromarray(ssmclip.distort(picture, name, label, seed=seed))
        for clip, mine in zip(clips, right, strict=True):
            with torch.no_grad():
                mine.append(int((classes @ clip.network(clip.preprocess(picture).flatten())).argmax()) == truth)
    return right


@pytest.fixture(scope="module")
def scenes():
    return open_dataset("scenes", "")


def rows_of(clips, dataset, names, settings=FEW):
    judges = [ZeroShot(clip, dataset, settings) for clip in clips]
    return [row for rows in distorted_rows(judges, choose(names), settings) for row in rows]


def test_every_level_is_what_one_picture_after_another_gives(scenes):
    clips = [Ruler(0.1).clip("A"), Ruler(0.8).clip("B")]
    rows = rows_of(clips, scenes, ["contrast", "uniform-noise"])
    places = distorted.subset(len(scenes), FEW)
    levels = {"contrast": "c100 c50 c30 c15 c10 c05 c03 c01", "uniform-noise": "0.0 0.03 0.05 0.1 0.2 0.35 0.6 0.9"}
    counted = {"contrast": slice(1, 6), "uniform-noise": slice(1, 6)}  # Geirhos et al. leave out the rest
    prompts = [[template.format(name) for template in scenes.templates] for name in scenes.classnames]
    unit = torch.nn.functional.normalize
    classes = torch.stack([unit(unit(Ruler.hear(Ruler.say(of)).float(), dim=1).mean(dim=0), dim=0) for of in prompts])
    found = {(row.model, row.task, row.condition, row.metric): row for row in rows}
    for name, labels in levels.items():
        hits = [by_hand(clips, scenes, classes, name, label, places) for label in labels.split()]
        right = {clip.label: list(of_clip) for clip, of_clip in zip(clips, zip(*hits, strict=True), strict=True)}
        task = f"distorted/scenes/{name}"
        for model, hits in right.items():
            mine = [found[model, task, f"level={label}", "top1"] for label in labels.split()]
            assert [row.value for row in mine] == pytest.approx([np.mean(hit) for hit in hits])
            assert [row.extra["counted"] for row in mine] == [
                counted[name].start <= i < counted[name].stop for i in range(8)
            ]
            mean = found[model, task, "mean over levels", "top1"]
            assert mean.value == pytest.approx(np.mean(hits[counted[name]]))
            kept = found.get((model, task, "mean over levels", "top1_retained"))
            assert (kept is not None) == (binom.ppf(0.025, 10, np.mean(hits[0])) / 10 > 1 / 16)
            if kept is not None:  # clearly better than guessing, undistorted
                wanted = (np.mean(hits[counted[name]]) - 1 / 16) / (np.mean(hits[0]) - 1 / 16)
                assert kept.value == pytest.approx(wanted)
        gain = np.mean(np.array(right["A"][counted[name]], float) - right["B"][counted[name]], axis=0)
        paired = found["A", task, "mean over levels, minus B", "top1_difference"]
        assert paired.value == pytest.approx(gain.mean())
        # The interval of a mean is near the normal one; of few images, to a third.
        assert paired.ci_high - paired.ci_low == pytest.approx(2 * 1.96 * gain.std() / np.sqrt(10), rel=0.33, abs=1e-9)
        at_level = found["A", task, f"level={labels.split()[2]}, minus B", "top1_difference"]
        assert at_level.value == pytest.approx(np.mean(right["A"][2]) - np.mean(right["B"][2]))
    assert len({row.value for row in rows if "level" in row.where}) > 3
    assert list(rows[0].extra["stimuli"]) == levels["contrast"].split()


def test_undistorted_captions_are_retrieved_as_ever(scenes):
    """A data set with captions: at rotation 0 a grey picture's recall@10 is that of retrieval on grey pictures."""

    class Captioned:
        def __init__(self):
            self.captions = [[f"{i} one", f"{i} other"] for i in range(30)]
            self.keys, self.files, self.card = [str(i) for i in range(30)], (), load_card("flickr8k")

        def __len__(self):
            return 30

        def __getitem__(self, i):
            grey = ssmclip.distort(np.asarray(center_crop(resize(scenes[i][0], 256), 224)), "colour", "bw")
            return Image.fromarray(grey)

    settings = Settings(batch_size=16, max_images=25, examples=0)
    judge = Retrieval(Ruler(0.3).clip("A"), Captioned(), settings)
    plain = {row.metric: row for row in judge.rows(judge.see(Captioned()), "x")}
    rows = [row for made in distorted_rows([judge], choose(["rotation"]), settings) for row in made]
    first = next(row for row in rows if row.condition == "level=0")
    expected = plain["image_to_text_recall@10"]
    assert first.metric == "image_to_text_recall@10"
    assert (first.value, first.ci_low, first.n) == (expected.value, expected.ci_low, 25)
    assert first.extra["chance"] == expected.extra["chance"]
    assert first.extra["right"] == expected.extra["right"]


def test_the_undistorted_level_of_colour_is_the_zero_shot_task(scenes):
    """Pictures of 224 pixels are taken as they are: the zero-shot task on those gives the first level's bits."""
    clip = Ruler(0.3).clip("A")

    class Large:
        def __init__(self):
            for name in ("card", "keys", "files", "labels", "classnames", "templates"):
                setattr(self, name, getattr(scenes, name))

        def __len__(self):
            return len(scenes)

        def __getitem__(self, i):
            return center_crop(resize(scenes[i][0], 256), 224), scenes.labels[i]

    plain = next(row for row in Task(Large()).rows(clip, FEW) if row.metric == "top1")
    row = next(row for row in rows_of([clip], scenes, ["colour"]) if row.condition == "level=cr")
    assert (row.value, row.ci_low, row.ci_high) == (plain.value, plain.ci_low, plain.ci_high)
    assert row.extra["right"] == plain.extra["right"]


def test_a_second_run_opens_no_picture(scenes, tmp_path, monkeypatch):
    settings = Settings(batch_size=16, max_images=12, examples=0, cache=tmp_path)
    clips = [Ruler(0.1).clip("A"), Ruler(0.8).clip("B")]
    calls = []
    distort = distorted.distort
    monkeypatch.setattr(distorted, "distort", lambda *a, **k: calls.append(a[1:]) or distort(*a, **k))
    small = Classification.__new__(Classification)
    small.__dict__ |= scenes.__dict__ | {"n": 12, "keys": scenes.keys[:12], "labels": scenes.labels[:12]}
    first = rows_of(clips, small, ["rotation"], settings)
    assert len(calls) == 4 * 12  # once for both models
    assert rows_of(clips, small, ["rotation"], settings) == first


def test_tables_are_asked_for_where_they_are_needed(caplog):
    assert len(choose(None).names) == 10
    assert "power-equalisation is omitted: it needs --amplitude FILE.npy" in caplog.text
    assert "false-colour is omitted: it needs --gamma FILE.npy" in caplog.text
    assert len(choose(None, amplitude=np.ones((224, 224)), gamma=np.linspace(0, 1, 256)).names) == 12
    with pytest.raises(ValueError, match="false-colour needs gamma: pass"):
        choose(["false-colour"])
    with pytest.raises(KeyError, match="unknown distortion 'blur'"):
        choose(["blur"])


def test_the_command_writes_the_curves_and_the_comparison(tmp_path, tiny_clip, monkeypatch, capsys):
    monkeypatch.setattr("ssmclip.evaluate.models.find", lambda *a, **k: tiny_clip)
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    words = (
        "--model a=x,b=y --tasks distorted:digits --distortions rotation,colour --max-images 12 --cache none".split()
    )
    assert command.run(parser.parse_args([*words, "--out", str(tmp_path / "rows.jsonl")])) == 0
    run, rows = read_rows(tmp_path / "rows.jsonl")
    assert run["tasks"] == ["distorted:digits"]
    assert {row.task for row in rows} == {"distorted/digits/rotation", "distorted/digits/colour"}
    equal = [row.value for row in rows if row.metric == "top1_difference"]
    assert equal == [0.0] * 8  # six levels and two means, of one model under two names
    said = capsys.readouterr().out
    assert "level=" not in said


def test_the_quickstart_distorts_digits(tiny_clip, monkeypatch):
    monkeypatch.setattr(quickstart, "DISTORTED_IMAGES", 4)
    monkeypatch.setattr(quickstart, "DISTORTED", ("rotation", "colour"))
    rows = quickstart.distorted_digits({"a": tiny_clip, "b": tiny_clip})
    assert {row.task for row in rows} == {"distorted/digits/rotation", "distorted/digits/colour"}
    shown = {row.task: row.extra["stimuli"] for row in rows if "stimuli" in row.extra}
    turned = [np.asarray(picture(small), float) for small in shown["distorted/digits/rotation"].values()]
    for quarter, seen in enumerate(turned):  # JPEG costs a few levels
        assert np.abs(np.rot90(turned[0], quarter) - seen).mean() < 4
    assert np.abs(turned[0] - turned[1]).mean() > 10


def test_each_picture_has_the_noise_of_its_own_key(scenes):
    pictures = distorted.Distorted(scenes, "uniform-noise", "0.35", choose(["uniform-noise"]))
    for place in (0, 1):
        source = np.asarray(center_crop(resize(scenes[place][0], 256), 224))
        seed = picture_seed(0, "uniform-noise", str(scenes.keys[place]))
        wanted = ssmclip.distort(source, "uniform-noise", "0.35", seed=seed)
        np.testing.assert_array_equal(np.asarray(pictures[place][0]), wanted)
