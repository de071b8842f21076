"""Probes against scikit-learn, and against the definitions written out as loops."""

import math

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier

from ssmclip.evaluate import Settings
from ssmclip.evaluate.probes.draws import draw_shots, hold_out
from ssmclip.evaluate.probes.fewshot import FewShot
from ssmclip.evaluate.probes.knn import Neighbours, votes
from ssmclip.evaluate.probes.linear import Linear, search, strength
from ssmclip.evaluate.probes.logistic import Regression
from ssmclip.evaluate.probes.probe import Labelled, Splits, read_probe
from ssmclip.evaluate.probes.sgd import LinearSGD
from ssmclip.evaluate.tasks import open_tasks, split_name
from ssmclip.models.frozen import FeatureEncoder
from ssmclip.registry import UnknownName

WIDTH = 12


def images(n: int, classes: int, seed: int = 0) -> Labelled:
    """Features of overlapping classes, of unequal variance along their axes."""
    draws = np.random.default_rng(seed)
    labels = np.arange(n) % classes
    means = np.random.default_rng(99).standard_normal((classes, WIDTH))
    features = (means[labels] + draws.standard_normal((n, WIDTH))) / np.sqrt(1 + np.arange(WIDTH)) + 0.3
    return Labelled(torch.from_numpy(features.astype(np.float32)), torch.from_numpy(labels))


def splits(train: Labelled, validation: Labelled | None = None, classes: int = 4) -> Splits:
    test = images(60, classes, seed=7)
    return Splits(train, validation, test.features, test.classes, [f"class {label}" for label in range(classes)])


def sklearn_fit(train: Labelled, C: float) -> LogisticRegression:
    # Its L-BFGS stops at the smallest C before the intercepts have moved.
    model = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    return model.fit(train.features.double().numpy(), train.labels.numpy())


@pytest.mark.parametrize("classes", [2, 4])
@pytest.mark.parametrize("C", [0.01, 1.0, 30.0])
def test_a_fit_is_scikit_learns(classes, C):
    train, test = images(120, classes), images(50, classes, seed=3)
    ours = Regression(train.features.numpy(), train.labels.numpy(), classes).fit(C)
    theirs = sklearn_fit(train, C).predict_proba(test.features.double().numpy())
    chances = torch.from_numpy(ours.scores(test.features.numpy())).softmax(1).numpy()
    assert ours.converged
    np.testing.assert_allclose(chances, theirs, atol=1e-4)


def test_a_fit_on_fewer_images_than_features_is_scikit_learns():
    train, test = images(9, 3), images(50, 3, seed=3)
    ours = Regression(train.features.numpy(), train.labels.numpy(), 3).fit(1.0)
    theirs = sklearn_fit(train, 1.0).predict_proba(test.features.double().numpy())
    np.testing.assert_allclose(torch.from_numpy(ours.scores(test.features.numpy())).softmax(1), theirs, atol=1e-4)


def test_the_linear_probe_tests_once_what_scikit_learn_would_choose():
    train, validation = images(120, 4), images(80, 4, seed=5)
    given = splits(train, validation)
    (answer,) = Linear().answers(given, 0)
    for C, accuracy in answer.about["sweep"]:
        score = sklearn_fit(train, C).score(validation.features.double().numpy(), validation.labels.numpy())
        assert abs(score - accuracy) <= 1 / len(validation) + 1e-12  # an image on the border may fall either way
    best = max(accuracy for _, accuracy in answer.about["sweep"])
    assert answer.about["C"] == min(C for C, accuracy in answer.about["sweep"] if accuracy == best)
    both = train.joined(validation)
    theirs = sklearn_fit(both, answer.about["C"]).predict(given.test.double().numpy())
    assert (answer.scores.argmax(1).numpy() == theirs).all()
    assert answer.about["chosen_on"] == "the validation split"


def test_the_search_finds_a_peak_of_the_whole_grid():
    for place in range(97):
        found = search(lambda C, peak=place: -abs(math.log10(C) - math.log10(strength(peak))))
        assert found.C == strength(place)
        assert len(found.tried) <= 15


def test_without_a_validation_split_a_fifth_of_each_class_is_held_out():
    (answer,) = Linear().answers(splits(images(120, 4)), 0)
    assert (answer.about["n_train"], answer.about["n_validation"]) == (96, 24)
    kept, held = hold_out(images(120, 4).labels, 0)
    assert sorted(torch.cat([kept, held]).tolist()) == list(range(120))
    assert torch.bincount(images(120, 4).labels[held]).tolist() == [6, 6, 6, 6]


def test_votes_are_dinos_as_a_loop():
    train, test = images(40, 4), images(15, 4, seed=3)
    counted = votes(test.features, train.features, train.labels, 4, k=7, temperature=0.07)
    for place, row in enumerate(test.features.double()):
        cosines = [float(row @ other / (row.norm() * other.norm())) for other in train.features.double()]
        nearest = sorted(range(40), key=lambda other: -cosines[other])[:7]
        expected = [0.0] * 4
        for other in nearest:
            expected[int(train.labels[other])] += math.exp(cosines[other] / 0.07)
        np.testing.assert_allclose(counted[place], expected, rtol=1e-4)


def test_neighbours_are_scikit_learns():
    train = images(200, 4)
    given = splits(train)
    (answer,) = Neighbours(k=20).answers(given, 0)
    theirs = KNeighborsClassifier(
        20, metric="cosine", algorithm="brute", weights=lambda distances: np.exp((1 - distances) / 0.07)
    ).fit(train.features.double().numpy(), train.labels.numpy())
    shares = answer.scores / answer.scores.sum(1, keepdim=True)
    np.testing.assert_allclose(shares, theirs.predict_proba(given.test.double().numpy()), atol=1e-5)


def test_few_shots_are_scikit_learns_on_the_same_draws():
    train = images(120, 4)
    given = splits(train)
    answers = FewShot(shots=4).answers(given, seed=10)
    assert [answer.seed for answer in answers] == [10, 11, 12]
    for answer in answers:
        drawn, rest = draw_shots(train.labels, 4, given.tested, given.names, answer.seed)
        assert torch.bincount(train.labels[drawn]).tolist() == [4, 4, 4, 4]
        assert not set(drawn.tolist()) & set(rest.tolist())
        theirs = sklearn_fit(train.at(drawn), answer.about["C"]).predict(given.test.double().numpy())
        assert (answer.scores.argmax(1).numpy() == theirs).all()


def test_sgd_is_torchs():
    train = images(50, 4)
    probe = LinearSGD(epochs=3, batch=16)
    weight, bias = probe.train(train.features, train.labels, 4, seed=2)
    generator = torch.Generator().manual_seed(2)
    layer = torch.nn.Linear(WIDTH, 4)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(4, WIDTH, generator=generator))
        layer.bias.zero_()
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1 * 16 / 256, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    for _ in range(3):
        for batch in torch.randperm(50, generator=generator).split(16):
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(layer(train.features[batch]), train.labels[batch]).backward()
            optimizer.step()
        schedule.step()
    torch.testing.assert_close(weight, layer.weight.detach())
    torch.testing.assert_close(bias, layer.bias.detach())


@pytest.mark.parametrize("name", ["linear", "knn-1", "fewshot-1", "linear-sgd"])
def test_one_class_is_refused(name):
    train = images(30, 4)
    with pytest.raises(ValueError, match=r"at least 2 classes \(got 1: 'class 1'\)"):
        read_probe(name).answers(splits(train.at((train.labels == 1).nonzero().flatten())), 0)


def test_a_class_without_training_images_is_never_answered():
    train = images(80, 4)
    train = train.at((train.labels != 2).nonzero().flatten())
    for name in ("linear", "knn", "linear-sgd"):
        (answer,) = read_probe(name).answers(splits(train), 0)
        assert answer.scores.shape == (60, 4)
        assert 2 not in answer.scores.argmax(1)


def test_fewer_images_than_shots_or_neighbours_are_named():
    with pytest.raises(ValueError, match=r"16 training images of each class are needed, and 'class 0' has 5"):
        FewShot(16).answers(splits(images(20, 4)), 0)
    with pytest.raises(ValueError, match=r"20 neighbours need as many training images \(got 12\)"):
        Neighbours().answers(splits(images(12, 4)), 0)
    with pytest.raises(ValueError, match="no image is left to choose the penalty on"):
        Linear().answers(splits(images(4, 4)), 0)


@pytest.mark.parametrize(
    ("name", "error", "message"),
    [
        ("nearest", UnknownName, "nearest"),
        ("fewshot", ValueError, "needs a number, the shots"),
        ("linear-3", ValueError, "takes no number"),
        ("knn-0", ValueError, r"k must be at least 1 \(got 0\)"),
        ("fewshot-0", ValueError, r"shots must be at least 1 \(got 0\)"),
    ],
)
def test_names_of_probes_are_checked(name, error, message):
    with pytest.raises(error, match=message):
        read_probe(name)


def test_an_unknown_kind_of_task_names_the_probes():
    with pytest.raises(UnknownName, match="linear"):
        split_name("lineal:cifar10")


def class_folders(root, *parts, n=6):
    draws = np.random.default_rng(0)
    for part in parts:
        for name, level in (("dark", 40), ("light", 200)):
            folder = root / part / name
            folder.mkdir(parents=True)
            for place in range(n):
                pixels = np.clip(draws.normal(level, 10, (16, 16, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{place}.png")
    return f"folder:{root}"


def test_a_test_split_without_a_training_split_is_refused(tmp_path):
    with pytest.raises((FileNotFoundError, ValueError), match="train"):
        open_tasks([f"linear:{class_folders(tmp_path, 'test')}"], tmp_path)


def test_rows_count_what_scikit_learn_gets_right_on_the_features_before_the_projection(tmp_path, vit):
    name = class_folders(tmp_path, "train", "test", n=12)
    seen = {}
    for part in ("train", "test"):
        files = sorted((tmp_path / part).glob("*/*.png"))
        pixels = torch.stack([vit.preprocess(Image.open(file)) for file in files])
        with torch.no_grad():
            before = vit.network.visual
            kept, before.proj = before.proj, None
            seen[part] = before(pixels).double().numpy()
            before.proj = kept
    labels = np.repeat([0, 1], 12)
    neighbours = KNeighborsClassifier(3, metric="cosine", weights=lambda far: np.exp((1 - far) / 0.07))
    (task,) = open_tasks([f"knn-3:{name}"], tmp_path)
    rows = {row.metric: row for row in task.rows(vit, Settings(examples=0))}
    assert rows["top1"].value == neighbours.fit(seen["train"], labels).score(seen["test"], labels)
    assert (rows["top1"].extra["width"], rows["top1"].extra["n_train"]) == (32, 24)


def test_rows_of_few_shots_have_the_mean_and_each_draw(tmp_path, vit):
    (task,) = open_tasks([f"fewshot-2:{class_folders(tmp_path, 'train', 'test')}"], tmp_path)
    rows = [row for row in task.rows(vit, Settings(examples=0)) if row.metric == "top1"]
    assert [row.where.get("seed") for row in rows] == [None, 0, 1, 2]
    assert rows[0].value == pytest.approx(np.mean([row.value for row in rows[1:]]), abs=1e-12)


def test_features_of_a_timm_classifier_are_those_before_it():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=5).eval()
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = FeatureEncoder(network).encode_image(pixels)
        torch.testing.assert_close(network.head(features), network(pixels))
    with pytest.raises(ValueError, match="only a CLIP has the features embedding"):
        FeatureEncoder(network, "embedding")


def test_clip_mambas_protocol_trains_by_sgd(tmp_path):
    (task,) = open_tasks([f"linear:{class_folders(tmp_path, 'train', 'test')}"], tmp_path, protocol="clip-mamba")
    assert isinstance(task.probe, LinearSGD)
    assert (task.probe.epochs, task.probe.batch, task.probe.rate(0)) == (90, 128, 0.05)
