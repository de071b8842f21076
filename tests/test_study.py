"""A study of one's own models, test sets, judges and metrics, each added from outside the package."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import cohen_kappa_score
from sklearn.neighbors import NearestCentroid

from ssmclip.evaluate import Settings, Study, Task, evaluate
from ssmclip.evaluate.distorted import choose
from ssmclip.evaluate.embeddings.embed import embed_images
from ssmclip.evaluate.judge import JUDGES, Judge, Right
from ssmclip.evaluate.statistics.metrics import METRICS, metric
from ssmclip.evaluate.tasks import DistortedTask, open_tasks
from ssmclip.registry import UnknownName
from ssmclip.report import words
from ssmclip.rows import Result, read_rows
from ssmclip.rows.metrics import SHOWN

FEW = Settings(batch_size=16, examples=0)
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 60), "blue": (40, 60, 220)}


class Patches:
    """A data set that the package has never seen: patches of one colour, with noise."""

    def __init__(self, n=30, name="patches"):
        random = np.random.default_rng(0)
        self.card = SimpleNamespace(name=name, title="Patches", kind="classification", metric="top1", test_size=n)
        self.labels = [i % len(COLOURS) for i in range(n)]
        self.classnames, self.templates = tuple(COLOURS), ("a patch of {}",)
        self.keys, self.files = [f"{name}/{i}" for i in range(n)], ()
        colours = np.array(list(COLOURS.values()))[self.labels, None, None]
        noisy = colours + random.normal(0, 60, (n, 40, 40, 3))
        self.pictures = [Image.fromarray(one) for one in noisy.clip(0, 255).astype(np.uint8)]

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.pictures[i], self.labels[i]


@pytest.fixture
def centroids():
    """A judge that knows no words: the class whose mean embedding is nearest, by another library."""

    @JUDGES.register("centroids")
    class Centroids(Judge):
        kind = "classification"
        headline = "top1"

        def __init__(self, clip, test_set, settings):
            super().__init__(clip, test_set, settings)
            seen = embed_images(clip, test_set, settings)
            self.classes = NearestCentroid().fit(seen.features.numpy(), seen.labels.numpy())

        def right(self, seen):
            return Right(torch.from_numpy(self.classes.predict(seen.features.numpy())) == seen.labels, None)

        def rows(self, seen, task, metrics=()):
            hits = self.right(seen).hits.double()
            return [Result(self.clip.label, task, "top1", hits.mean().item(), n=len(hits))]

    yield
    del JUDGES._items["centroids"]


@pytest.fixture
def kappa():
    @metric("kappa", "Cohen's kappa", fraction=False, chance=lambda classes: 0.0)
    def agreement(scores, target, weights=None):
        """Cohen's kappa (1960)."""
        guess = scores.argmax(1)
        weights = torch.ones(len(target), dtype=torch.float64) if weights is None else weights.double()
        classes = range(scores.shape[1])
        n = weights.sum(-1)
        observed = (weights @ (guess == target).double()) / n
        expected = sum((weights @ (guess == c).double()) * (weights @ (target == c).double()) for c in classes) / n**2
        return (observed - expected) / (1 - expected)

    yield
    del METRICS._items["kappa"], SHOWN._items["kappa"]


def parts(clip):
    return clip.model, clip.preprocess, clip.tokenizer


def test_a_test_set_of_ones_own_is_an_object(vit):
    patches = Patches()
    rows = evaluate(*parts(vit), [Task(patches)], "", model_name="m", examples=0)
    with torch.no_grad():
        texts = vit.model.encode_text(vit.tokenizer([f"a patch of {name}" for name in COLOURS]), normalize=True)
        images = torch.stack([vit.preprocess(picture) for picture in patches.pictures])
        guesses = (vit.model.encode_image(images, normalize=True) @ texts.T).argmax(1)
    assert (rows[0].task, rows[0].metric, rows[0].n) == ("patches", "top1", 30)
    assert rows[0].value == pytest.approx((guesses == torch.tensor(patches.labels)).double().mean().item())


def test_a_judge_is_one_class(vit, centroids, tmp_path):
    task = Task(Patches(), judge="centroids")
    study = Study(
        {"m": parts(vit)}, [task, DistortedTask(task, choose(["rotation"]))], FEW, out=tmp_path / "rows.jsonl"
    )
    rows = study.rows()
    seen = embed_images(vit, task.test_set, FEW)
    by_hand = NearestCentroid().fit(seen.features, seen.labels).score(seen.features, seen.labels)
    assert rows[0].value == pytest.approx(by_hand)
    assert {row.task for row in rows} == {"patches", "distorted/patches/rotation"}
    assert read_rows(tmp_path / "rows.jsonl")[1] == rows
    with pytest.raises(UnknownName, match="unknown judge 'centroid'; did you mean 'centroids'"):
        Study({"m": parts(vit)}, [Task(Patches(), judge="centroid")], FEW).rows()


def test_a_metric_is_one_function(vit, kappa):
    rows = evaluate(*parts(vit), [Task(Patches(), metrics=("kappa", "top1"))], "", model_name="m", examples=0)
    seen = embed_images(vit, Patches(), FEW)
    texts = vit.model.encode_text(vit.tokenizer([f"a patch of {name}" for name in COLOURS]), normalize=True)
    guesses = (seen.features @ texts.T).argmax(1)
    assert [row.metric for row in rows] == ["kappa", "top1"]
    assert rows[0].value == pytest.approx(cohen_kappa_score(seen.labels, guesses))
    assert rows[0].ci_low < rows[0].value < rows[0].ci_high
    assert (words.metric_name("kappa"), words.number(0.123, "kappa")) == ("Cohen's kappa", "0.123")


def test_each_model_is_opened_once_and_alone(vit, monkeypatch):
    opened = []

    def load(name, **how):
        opened.append(name)
        return parts(vit)

    monkeypatch.setattr("ssmclip.evaluate.models.find", load)
    sets = [Task(Patches()), Task(Patches(name="others"))]
    rows = Study({"A": "first", "B": "second"}, sets, FEW).rows()
    assert opened == ["first", "second"]
    order = [(row.model, row.task) for row in rows if not row.against]
    assert list(dict.fromkeys(order)) == [("A", "patches"), ("A", "others"), ("B", "patches"), ("B", "others")]
    both = [row for row in rows if row.against]
    assert {(row.model, row.against, row.value) for row in both} == {("A", "B", 0.0)}


def test_rows_are_kept_when_a_later_task_fails(vit, tmp_path):
    class Broken(Patches):
        def __getitem__(self, i):
            raise RuntimeError("the disk is gone")

    out = tmp_path / "rows.jsonl"
    study = Study({"m": parts(vit)}, [Task(Patches()), Task(Broken(name="broken"))], FEW, out=out)
    with pytest.raises(RuntimeError, match="the disk is gone"):
        study.rows()
    assert {row.task for row in read_rows(out)[1]} == {"patches"}


def test_names_and_distorted_names_open_the_same_test_set():
    plain, distorted = open_tasks(["digits", "distorted:digits"], "", how=choose(["rotation"]))
    assert distorted.task is plain
    assert (plain.name, plain.judge, distorted.name) == ("digits", "", "distorted:digits")
