"""Evaluation against open_clip's classifier, scikit-learn, loops anyone can check, and a model of known mistakes."""

import argparse
import base64
import io
from dataclasses import dataclass, field

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from scipy.stats import hypergeom
from sklearn.metrics import confusion_matrix, recall_score
from torch import nn

from ssmclip.cli import evaluate as command
from ssmclip.evaluate import (
    Model,
    Settings,
    class_embeddings,
    embed_images,
    embed_texts,
    evaluate,
    tasks,
    training_validation,
)
from ssmclip.registry import UnknownName
from ssmclip.rows import read_rows

CLASSES = ["zero", "one", "two", "three", "four", "five"]
TEMPLATES = ["a photo of {}.", "{} indeed", "the {}"]


@dataclass
class Card:
    name: str
    title: str
    kind: str
    metric: str
    test_size: int | None = None


@dataclass
class Pictures:
    """Images of one grey level each; captions or labels as the task needs. Places in `broken` can't be read."""

    levels: list[int]
    labels: list[int] | None = None
    captions: list[list[str]] | None = None
    broken: set[int] = field(default_factory=set)
    classnames: tuple = tuple(CLASSES)
    templates: tuple = tuple(TEMPLATES)
    card: Card | None = None

    def __len__(self):
        return len(self.levels)

    @property
    def keys(self):
        return [f"picture{i}" for i in range(len(self))]

    def __getitem__(self, i):
        if i in self.broken:
            raise OSError("truncated")
        image = Image.new("RGB", (40, 30), (self.levels[i],) * 3)
        return image if self.labels is None else (image, self.labels[i])


class Seer(nn.Module):
    """A CLIP that sees an image's grey level and reads the one class named in a text: its answers are known."""

    def __init__(self):
        super().__init__()
        self.anything = nn.Parameter(torch.zeros(1))
        self.texts_seen = 0

    def encode_image(self, images, normalize=False):
        return nn.functional.one_hot(images[:, 0, 0, 0].round().long(), len(CLASSES)).float() * 3

    def encode_text(self, tokens, normalize=False):
        self.texts_seen += len(tokens)
        return nn.functional.one_hot(tokens[:, 0], len(CLASSES)).float() * 5


def see(image):
    return torch.full((3, 4, 4), float(np.asarray(image)[0, 0, 0]))


def read(texts):
    return torch.tensor([[next(i for i, name in enumerate(CLASSES) if name in text)] for text in texts])


def seer() -> Model:
    return Model(Seer(), see, read, "seer")


@pytest.fixture
def world(monkeypatch):
    """Two data sets of which all answers are known; the seer errs where level != label."""
    levels = [0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5]
    labels = [0, 1, 2, 3, 4, 5, 1, 1, 2, 3, 0, 0]
    sets = {
        "levels": Pictures(levels, labels, card=Card("levels", "Grey levels", "classification", "mean_per_class", 12)),
        "captions": Pictures(
            list(range(6)),
            captions=[[f"a {name}", f"so {name}"] for name in CLASSES],
            card=Card("captions", "Captioned greys", "retrieval", "mean_recall", 6),
        ),
    }

    def load_card(name):
        if name not in sets:
            raise UnknownName("data set", name, sets)
        return sets[name].card

    monkeypatch.setattr(tasks, "load_card", load_card)
    monkeypatch.setattr(tasks, "open_dataset", lambda card, root: sets[card.name])
    return sets


def test_class_embeddings_equal_open_clips_classifier(vit):
    ours = class_embeddings(lambda texts: embed_texts(vit, texts, Settings(batch_size=5)), CLASSES, TEMPLATES)
    theirs = open_clip.build_zero_shot_classifier(vit.model, vit.tokenizer, CLASSES, TEMPLATES)
    torch.testing.assert_close(ours, theirs.T, rtol=1e-5, atol=1e-6)


def test_synonyms_are_averaged_with_the_templates(vit):
    def encode(texts):
        return embed_texts(vit, texts, Settings())

    ours = class_embeddings(encode, [["cat", "kitten"], "dog"], ["a {}", "one {}"])
    mean = encode(["a cat", "one cat", "a kitten", "one kitten"]).double().mean(0)
    torch.testing.assert_close(ours[0].double(), mean / mean.norm(), rtol=1e-5, atol=1e-6)


def test_classes_and_templates_that_say_nothing_are_refused(vit):
    with pytest.raises(ValueError, match=r"every template needs \{\}.*'a photo'"):
        class_embeddings(lambda texts: pytest.fail("encoded"), CLASSES, ["a {}", "a photo"])
    with pytest.raises(ValueError, match=r"at least one class and one template \(got 6 and 0\)"):
        class_embeddings(lambda texts: pytest.fail("encoded"), CLASSES, [])


def test_zero_shot_equals_open_clip_by_hand(vit, world):
    generator = torch.Generator().manual_seed(0)
    dataset = Pictures(torch.randint(256, (40,), generator=generator).tolist(), [i % 6 for i in range(40)])
    dataset.card = Card("levels", "Greys", "classification", "top1")
    world["levels"] = dataset
    rows = evaluate(vit.model, vit.preprocess, vit.tokenizer, ["levels"], "", model_name="vit", batch_size=7)
    with torch.no_grad():
        images = torch.stack([vit.preprocess(dataset[i][0]) for i in range(40)])
        scores = vit.model.encode_image(images, normalize=True) @ open_clip.build_zero_shot_classifier(
            vit.model, vit.tokenizer, CLASSES, TEMPLATES
        )
    top5 = scores.topk(5).indices
    values = {row.metric: row.value for row in rows}
    assert values["top1"] == pytest.approx(np.mean([top5[i, 0] == i % 6 for i in range(40)]))
    assert values["top5"] == pytest.approx(np.mean([i % 6 in top5[i] for i in range(40)]))


def test_classification_rows_hold_what_was_known(world):
    rows = evaluate(Seer(), see, read, ["levels"], "", model_name="seer")
    dataset = world["levels"]
    per_class = recall_score(dataset.labels, dataset.levels, average=None)
    assert [row.metric for row in rows] == ["mean_per_class", "top1", "top5"]  # the card's own metric first
    assert rows[0].value == pytest.approx(per_class.mean())
    assert rows[1].value == pytest.approx(9 / 12)
    assert all(row.n == 12 and row.ci_low <= row.value <= row.ci_high for row in rows)
    extra = rows[0].extra
    assert [c["accuracy"] for c in extra["per_class"]] == pytest.approx(per_class.tolist())
    assert [c["name"] for c in extra["per_class"]] == CLASSES
    assert extra["confusion"]["counts"] == confusion_matrix(dataset.labels, dataset.levels).tolist()
    assert extra["chance"] == pytest.approx(1 / 6)
    assert "partial" not in extra
    for example in extra["image_to_text"]:
        place = int(example["image"])
        assert example["truth"] == [CLASSES[dataset.labels[place]]]
        assert example["found"][0]["item"] == CLASSES[dataset.levels[place]]
        assert example["found"][0]["right"] == (dataset.labels[place] == dataset.levels[place])
        picture = Image.open(io.BytesIO(base64.b64decode(extra["thumbnails"][example["image"]], validate=True)))
        assert picture.format == "JPEG"
        assert max(picture.size) <= 96
        assert np.abs(np.asarray(picture).astype(int) - dataset.levels[place]).max() <= 3


def test_retrieval_equals_a_loop(vit, world):
    generator = torch.Generator().manual_seed(0)
    levels = torch.randint(256, (30,), generator=generator).tolist()
    captions = [[f"caption {i} {j} of level {level}" for j in range(1 + i % 3)] for i, level in enumerate(levels)]
    card = Card("captions", "Greys", "retrieval", "mean_recall", 30)
    world["captions"] = Pictures(levels, captions=captions, card=card)
    rows = evaluate(vit.model, vit.preprocess, vit.tokenizer, ["captions"], "", model_name="vit", batch_size=8)
    values = {row.metric: row for row in rows}

    images = embed_images(vit, world["captions"], Settings()).features
    flat = [(i, caption) for i, of_image in enumerate(captions) for caption in of_image]
    scores = (images @ embed_texts(vit, [caption for _, caption in flat], Settings()).T).numpy()
    recalls = []
    for k in (1, 5, 10):
        hits = [any(flat[j][0] == i for j in np.argsort(-scores[i])[:k]) for i in range(30)]
        assert values[f"image_to_text_recall@{k}"].value == pytest.approx(np.mean(hits))
        back = [flat[j][0] in np.argsort(-scores[:, j])[:k] for j in range(len(flat))]
        assert values[f"text_to_image_recall@{k}"].value == pytest.approx(np.mean(back))
        recalls += [np.mean(hits), np.mean(back)]
        chance = np.mean([1 - hypergeom(len(flat), len(of_image), k).pmf(0) for of_image in captions])
        assert values[f"image_to_text_recall@{k}"].extra["chance"] == pytest.approx(chance)
        assert values[f"text_to_image_recall@{k}"].extra["chance"] == pytest.approx(k / 30)
    assert values["mean_recall"].value == pytest.approx(np.mean(recalls))
    assert values["image_to_text_recall@1"].n == 30
    assert values["text_to_image_recall@1"].n == len(flat)
    assert all(row.ci_low <= row.value <= row.ci_high for row in rows if "recall" in row.metric)

    extra = rows[0].extra
    for example in extra["image_to_text"]:
        i = int(example["image"])
        best = np.argsort(-scores[i])[:5]
        assert example["truth"] == captions[i]
        assert [hit["item"] for hit in example["found"]] == [flat[j][1] for j in best]
        assert [hit["right"] for hit in example["found"]] == [flat[j][0] == i for j in best]
    for example in extra["text_to_image"]:
        j = [caption for _, caption in flat].index(example["text"])
        assert [int(hit["item"]) for hit in example["found"]] == np.argsort(-scores[:, j])[:5].tolist()
        assert {hit["item"] for hit in example["found"]} <= set(extra["thumbnails"])
    rows16 = [int(place) for place in extra["similarity"]["images"]]
    columns = [[caption for _, caption in flat].index(text) for text in extra["similarity"]["texts"]]
    np.testing.assert_allclose(extra["similarity"]["scores"], scores[rows16][:, columns], atol=1e-4)


def test_our_own_model_runs_through_it(tiny_clip, world):
    rows = evaluate(*tiny_clip, ["levels", "captions"], "", model_name="tiny", examples=2)
    assert {row.task for row in rows} == {"levels", "captions"}
    assert all(0 <= row.ci_low <= row.value <= row.ci_high <= 1 for row in rows if row.n)


def test_images_that_cannot_be_read_are_counted_and_not_measured(world, caplog):
    world["levels"].broken |= {0, 7}
    rows = evaluate(Seer(), see, read, ["levels"], "", model_name="seer")
    assert rows[0].n == 10
    assert rows[0].extra["unreadable"] == 2
    assert rows[0].extra["partial"] == {"used": 10, "of": 12}
    assert "2 images could not be read; the first: picture0 (OSError: truncated)" in caplog.text
    world["captions"].broken |= {2}
    rows = evaluate(Seer(), see, read, ["captions"], "", model_name="seer")
    assert [(row.value, row.n) for row in rows[:1]] == [(1.0, 5)]  # captions of the lost image are no candidates
    world["levels"].broken |= set(range(12))
    with pytest.raises(ValueError, match="none of the 12 images could be read; the first: picture0"):
        evaluate(Seer(), see, read, ["levels"], "", model_name="seer")


def test_a_file_cut_short_is_found_when_it_is_decoded(vit):
    whole = io.BytesIO()
    Image.effect_noise((64, 64), 90).convert("RGB").save(whole, "JPEG")
    half = whole.getvalue()[: len(whole.getvalue()) // 2]

    class Files(Pictures):
        def __getitem__(self, i):
            return Image.open(io.BytesIO(half)) if i == 1 else super().__getitem__(i)

    images = embed_images(vit, Files([10, 20, 30]), Settings())
    assert images.index.tolist() == [0, 2]
    assert "truncated" in images.unreadable[1]


def test_embeddings_that_are_not_finite_are_named(world):
    class Overflowing(Seer):
        def encode_image(self, images, normalize=False):
            return super().encode_image(images).masked_fill(images[:, 0, 0, :1] == 4, torch.nan)

    class Unreadable(Seer):
        def encode_text(self, tokens, normalize=False):
            return super().encode_text(tokens).masked_fill(tokens[:, :1] == 3, torch.inf)

    with pytest.raises(
        ValueError, match=r"2 of 12 image embeddings are not finite; the first: 'picture4', 'picture10'"
    ):
        evaluate(Overflowing(), see, read, ["levels"], "", model_name="seer")
    with pytest.raises(ValueError, match=r"3 of 18 text embeddings are not finite; the first: 'a photo of three\.'"):
        evaluate(Unreadable(), see, read, ["levels"], "", model_name="seer")


def test_tasks_and_data_that_make_no_sense_are_refused(world):
    with pytest.raises(UnknownName, match="unknown data set 'level'; did you mean 'levels'"):
        evaluate(Seer(), see, read, ["level"], "", model_name="seer")
    with pytest.raises(ValueError, match="no tasks given"):
        evaluate(Seer(), see, read, [], "", model_name="seer")
    world["captions"].captions[3] = []
    with pytest.raises(ValueError, match=r"1 images have no caption; the first: \['picture3'\]"):
        evaluate(Seer(), see, read, ["captions"], "", model_name="seer")
    with pytest.raises(ValueError, match="no images"):
        embed_images(seer(), Pictures([]), Settings())
    with pytest.raises(ValueError, match="no texts"):
        embed_texts(seer(), [], Settings())
    world["levels"].labels[0] = 6
    with pytest.raises(ValueError, match="labels range from 0 to 6, but there are 6 classes"):
        evaluate(Seer(), see, read, ["levels"], "", model_name="seer")


def test_a_text_is_encoded_once():
    clip = seer()
    features = embed_texts(clip, ["one", "two", "one", "two", "two"], Settings(batch_size=1))
    assert clip.network.texts_seen == 2
    assert features.argmax(dim=1).tolist() == [1, 2, 1, 2, 2]
    assert features.norm(dim=1).tolist() == [1.0] * 5


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, [4, 32, 77]),
        ({"pool_type": "eos", "eos_id": 49407}, [4, 32, 77]),
        ({"no_causal_mask": True}, [77, 77, 77]),
        ({"pool_type": "last"}, [77, 77, 77]),
    ],
)
def test_filling_is_left_out_only_where_it_changes_nothing(change, expected):
    """open_clip's own encode_text of all 77 positions; prompts of four tokens among longer ones."""
    torch.manual_seed(0)
    text = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2} | change
    vision = {"image_size": 32, "patch_size": 16, "width": 16, "layers": 1, "head_width": 16}
    clip = Model(
        open_clip.CLIP(16, vision, text).eval(),
        open_clip.image_transform(32, is_train=False),
        open_clip.SimpleTokenizer(),
        "m",
    )
    texts = ["a dog", "a " * 30, "dog", "a photo of a cat!", "word " * 100]
    widths = []
    clip.network.transformer.register_forward_hook(lambda module, inputs, output: widths.append(inputs[0].shape[1]))
    ours = embed_texts(clip, texts, Settings(batch_size=2))
    assert widths == expected
    with torch.no_grad():
        whole = clip.network.encode_text(clip.tokenizer(texts), normalize=True)
    torch.testing.assert_close(ours, whole, rtol=0, atol=1e-6)


@pytest.mark.parametrize("workers", [0, 2])
def test_embedding_leaves_modes_and_random_state_alone(vit, workers):
    vit.model.train()
    vit.model.visual.eval()
    before = torch.random.get_rng_state()
    images = embed_images(vit, Pictures([0, 50, 100, 150, 200], broken={3}), Settings(batch_size=2, workers=workers))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert vit.model.training
    assert not vit.model.visual.training
    vit.model.eval()
    assert images.index.tolist() == [0, 1, 2, 4]
    expected = vit.model.encode_image(vit.preprocess(Pictures([200])[0])[None], normalize=True)
    torch.testing.assert_close(images.features[3:], expected.detach(), rtol=1e-5, atol=1e-6)


def test_a_subset_is_drawn_by_chance_and_marked(world):
    rows = evaluate(Seer(), see, read, ["levels"], "", model_name="seer", max_images=5, examples=0)
    assert rows[0].n == 5
    assert rows[0].extra["partial"] == {"used": 5, "of": 12}
    assert "thumbnails" not in rows[0].extra
    places = embed_images(seer(), world["levels"], Settings(max_images=5)).index.tolist()
    assert places == embed_images(seer(), world["levels"], Settings(max_images=5)).index.tolist()
    assert places == sorted(places) != [0, 1, 2, 3, 4]


def test_validation_rows_carry_no_pictures(world):
    validate = training_validation(["levels", "captions"], "", max_images=None)
    rows = validate(Model(Seer(), see, read, "seer"), 300)
    assert {row.condition for row in rows} == {""}  # the loop writes the step
    assert [(row.metric, row.value) for row in rows if row.metric == "top1"] == [("top1", 0.75)]
    assert rows[0].extra == {"title": "Grey levels", "kind": "classification", "chance": pytest.approx(1 / 6)}
    assert all(set(row.extra) <= {"title", "kind", "chance"} for row in rows)


def parse(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([*words, "--cache", "none"])  # `read` knows no texts but these data sets'


def test_command_writes_the_rows_of_every_model(world, tmp_path, monkeypatch, capsys):
    loads = []

    def load(name, *, device, image_size, precision):
        loads.append((name, device, image_size, precision))
        return Seer(), see, read

    monkeypatch.setattr("ssmclip.evaluate.models.find", load, raising=False)
    out = tmp_path / "new" / "rows.jsonl"
    words = [
        "--model",
        "A,b=runs/x",
        "--tasks",
        "levels,captions",
        "--out",
        str(out),
        "--image-size",
        "64",
        "--seed",
        "3",
    ]
    assert command.run(parse(*words)) == 0
    described, rows = read_rows(out)
    assert loads == [("A", "cpu", 64, "float32"), ("runs/x", "cpu", 64, "float32")]
    assert described["seed"] == 3
    expected = evaluate(Seer(), see, read, ["levels", "captions"], "", model_name="A", seed=3)
    both = expected + [type(row)(**{**row.__dict__, "model": "b"}) for row in expected]
    assert rows[: len(both)] == both
    assert {(row.model, row.against, row.value) for row in rows[len(both) :]} == {("A", "b", 0.0)}
    assert f"{len(rows)} rows in {out}" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir() if path.suffix != ".lock"] == [out.name]


def test_command_complains_before_it_computes(world, tmp_path, monkeypatch):
    monkeypatch.setattr("ssmclip.evaluate.models.find", lambda *a, **k: pytest.fail("loaded a model"), raising=False)
    out = str(tmp_path / "rows.jsonl")
    with pytest.raises(UnknownName, match="known: captions, levels"):
        command.run(parse("--model", "A", "--tasks", "colours", "--out", out))
    with pytest.raises(ValueError, match="both called 'x'"):
        command.run(parse("--model", "a/x,b/x", "--tasks", "levels", "--out", out))
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        command.run(parse("--model", "A", "--tasks", "levels", "--out", str(tmp_path / "file" / "rows.jsonl")))
    with pytest.raises(IsADirectoryError, match="takes a file"):
        command.run(parse("--model", "A", "--tasks", "levels", "--out", str(tmp_path)))
    for nothing in ("", ","):
        with pytest.raises(
            ValueError, match=r"no tasks given: name at least one; `ssmclip datasets` lists the data sets"
        ):
            command.run(parse("--model", "A", "--tasks", nothing, "--out", out))
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize(
    "option", ["batch-size 0", "workers -1", "max-images 0", "max-images -5", "examples -3", "truncate -3"]
)
def test_numbers_too_small_are_told_before_a_model_is_loaded(world, tmp_path, monkeypatch, option):
    monkeypatch.setattr("ssmclip.evaluate.models.find", lambda *a, **k: pytest.fail("loaded a model"), raising=False)
    name, value = option.split()
    with pytest.raises(ValueError, match=f"^{name.replace('-', '_')} must be at least [01] .got {value}.$"):
        command.run(parse("--model", "A", "--tasks", "levels", "--out", str(tmp_path / "rows"), f"--{name}", value))


def test_rows_of_the_file_stay_until_they_are_measured_anew(world, tmp_path, monkeypatch):
    out = tmp_path / "rows.jsonl"
    monkeypatch.setattr("ssmclip.evaluate.models.find", lambda *a, **k: (Seer(), see, read), raising=False)
    command.run(parse("--model", "A,B", "--tasks", "levels,captions", "--out", str(out)))
    _, whole = read_rows(out)
    world["captions"].broken |= set(range(6))  # as a kill after the first data set
    with pytest.raises(ValueError, match="none of the 6 images"):
        command.run(parse("--model", "A,B", "--tasks", "levels,captions", "--out", str(out)))
    assert read_rows(out)[1] == whole
    command.run(parse("--model", "C", "--tasks", "levels", "--out", str(out)))
    _, rows = read_rows(out)
    assert [row for row in rows if row.model in "AB" and row.against != "C"] == whole
    assert {(row.model, row.condition) for row in rows if row not in whole} == {
        ("A", "minus C"), ("B", "minus C"), ("C", ""),
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"different settings \(max_images was None, is 5\).*another file"):
        command.run(parse("--model", "A", "--tasks", "levels", "--max-images", "5", "--out", str(out)))
    assert read_rows(out)[1] == rows
    out.write_text("notes")
    with pytest.raises(ValueError, match="line 1: not a result row"):
        command.run(parse("--model", "A", "--tasks", "levels", "--out", str(out)))


def test_the_embedded_sets_are_evaluated_as_their_cards_say(tiny_clip, tmp_path):
    rows = evaluate(*tiny_clip, ["digits", "scenes"], tmp_path, model_name="tiny", max_images=20, examples=2)
    digits, scenes = (next(row for row in rows if row.task == task) for task in ("digits", "scenes"))
    assert (digits.metric, digits.n, digits.extra["partial"]) == ("top1", 20, {"used": 20, "of": 360})
    assert len(digits.extra["confusion"]["names"]) == 10
    assert {len(example["found"]) for example in digits.extra["image_to_text"] + scenes.extra["image_to_text"]} == {3}


def test_photographs_and_their_captions_are_evaluated(tiny_clip, shared):
    rows = evaluate(
        *tiny_clip, ["flickr8k"], shared / "data" / "captions", model_name="tiny", max_images=12, examples=2
    )
    counts = {row.metric: row.n for row in rows}
    assert (counts["image_to_text_recall@1"], counts["text_to_image_recall@1"]) == (12, 60)  # five captions each
    assert rows[0].extra["partial"] == {"used": 12, "of": 1000}
    assert [len(example["truth"]) for example in rows[0].extra["image_to_text"]] == [5, 5]
