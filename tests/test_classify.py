"""Labels of pictures against the model called by hand, NumPy's softmax and timm's class names; bad input in words."""

import http.server
import io
import json
import re
import socketserver
import struct
import sys
import threading
import time
import zlib

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch.nn.functional import normalize

import ssmclip
from ssmclip.__main__ import main
from ssmclip.data.images import BadImage
from ssmclip.data.sources import download, picture_paths, read_picture
from ssmclip.models import save_model
from ssmclip.models.classifier import classes_of
from ssmclip.models.names import Model, find

LABELS = ["a dog", "a cat", "<b>a bird</b>"]


def noise(seed: int, size=(40, 36)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), dtype=np.uint8))


def encoded(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def bomb(side: int) -> bytes:
    """A PNG that claims side x side pixels in few bytes, written by hand: Pillow would need the memory."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    parts = {b"IHDR": header, b"IDAT": zlib.compress(b"\0" * 1000), b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(kind, data) for kind, data in parts.items())


@pytest.fixture
def clip(tiny_clip) -> Model:
    return Model(*tiny_clip, label="tiny")


@pytest.fixture
def run(tiny_clip, tiny_config, tmp_path):
    save_model(tiny_clip[0], tiny_config, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    noise(0).save(folder / "a.png")
    noise(1).save(folder / "deep" / "b.jpg")
    return folder


def by_hand(clip: Model, images: list[Image.Image], prompts: list[list[str]]) -> np.ndarray:
    """Radford et al. 2021, figure 1: one picture and one prompt at a time, the softmax in NumPy."""
    network, preprocess, tokenizer = clip
    with torch.no_grad():
        classes = [
            normalize(sum(normalize(network.encode_text(tokenizer([p])), dim=-1) for p in texts), dim=-1)
            for texts in prompts
        ]
        features = [normalize(network.encode_image(preprocess(image)[None]), dim=-1) for image in images]
        scale = network.logit_scale.exp().item()
    logits = scale * np.array([[(f @ c.T).item() for c in classes] for f in features], dtype=np.float64)
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def test_probabilities_are_those_computed_by_hand(clip):
    images = [noise(i) for i in range(5)]
    templates = ["a photo of {}.", "{} in the rain"]
    expected = by_hand(clip, images, [[template.format(label) for template in templates] for label in LABELS])
    rows = list(ssmclip.classify(clip, images, LABELS, templates, 3, batch_size=2))
    assert [row.picture for row in rows] == [f"picture {i}" for i in range(1, 6)]
    for row, line in zip(rows, expected, strict=True):
        assert [guess.label for guess in row.guesses] == [LABELS[i] for i in np.argsort(-line)]
        np.testing.assert_allclose([guess.probability for guess in row.guesses], np.sort(line)[::-1], rtol=1e-4)


def test_top_k_keeps_the_first_and_changes_no_probability(clip):
    (whole,), (best,) = (list(ssmclip.classify(clip, noise(0), LABELS, k=k)) for k in (9, 1))
    assert len(whole.guesses) == 3
    assert best.guesses == whole.guesses[:1]
    assert sum(guess.probability for guess in whole.guesses) == pytest.approx(1)


@pytest.mark.parametrize("name", ["timm:resnet18", "timm:vmamba_tiny_s1l8"])
def test_a_classifier_gives_its_own_classes(name, tmp_path):
    """The head of an encoder of 1,000 classes are ImageNet's: its names are those that timm gives by number."""
    torch.manual_seed(0)
    model = find(name, image_size=64)
    with torch.no_grad():
        logits = model.network(model.preprocess(noise(3))[None])[0].numpy().astype(np.float64)
    powers = np.exp(logits - logits.max())
    (row,) = ssmclip.classify(model, noise(3), k=4)
    best = np.argsort(-logits)[:4]
    info = timm.data.ImageNetInfo()
    assert [guess.label for guess in row.guesses] == [info.index_to_description(int(i)) for i in best]
    np.testing.assert_allclose([g.probability for g in row.guesses], (powers / powers.sum())[best], rtol=1e-4)


def test_classes_of_another_head_are_numbered_unless_its_configuration_names_them():
    network = timm.create_model("resnet18", num_classes=3).eval()
    preprocess = find("timm:resnet18").preprocess
    for label_names, label_descriptions, words in (
        (None, None, {"class 0", "class 1", "class 2"}),
        (["ant", "bee", "cow"], None, {"ant", "bee", "cow"}),
        (["ant", "bee", "cow"], {"bee": "honey bee"}, {"ant", "honey bee", "cow"}),
        (["ant", "bee", "cow"], ["an ant", "a bee", "a cow"], {"an ant", "a bee", "a cow"}),
        (["n01440764", "bee", "n02085620"], None, {"tench, Tinca tinca", "bee", "Chihuahua"}),  # WordNet's ids
    ):
        network.pretrained_cfg = {"label_names": label_names, "label_descriptions": label_descriptions}
        model = Model(network, preprocess, None, "mine", classes=classes_of(network))
        (row,) = ssmclip.classify(model, noise(0))
        assert {guess.label for guess in row.guesses} == words


def test_a_broken_picture_keeps_its_place_among_the_others(clip):
    pictures = {"a": noise(0), "broken": b"no picture", "bomb": bomb(20_000), "b": encoded(noise(1))}
    rows = {row.picture: row for row in ssmclip.classify(clip, pictures, LABELS, batch_size=3)}
    assert list(rows) == list(pictures)
    assert rows["broken"].unreadable.startswith("broken image: not in one of the formats")
    assert rows["bomb"].unreadable.startswith("image too large: ")
    (alone,) = ssmclip.classify(clip, noise(1), LABELS)
    assert [g.label for g in rows["b"].guesses] == [g.label for g in alone.guesses]
    np.testing.assert_allclose(
        [g.probability for g in rows["b"].guesses], [g.probability for g in alone.guesses], rtol=1e-4
    )


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        ([], "no labels given: name at least one"),
        (["", " "], "no labels given: name at least one"),
        (["a", ""], "label 2 of 2 is empty: remove it"),
        (["a dog", "b", "a dog ", "b"], "given more than once: 'a dog', 'b'"),
        ([f"label {i}" for i in range(5000)], "at most 1,000 labels (got 5,000)"),
        (None, "tiny is a CLIP, which knows no classes of its own"),
    ],
)
def test_labels_that_cannot_be_chosen_from_are_refused_at_once(clip, labels, told):
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        ssmclip.classify(clip, [], labels, max_labels=1000)
    assert "\n" not in str(error.value)


def test_labels_for_a_classifier_and_an_encoder_without_a_head_are_refused():
    network, preprocess, _ = find("timm:resnet18", image_size=64)
    network.reset_classifier(0)
    with pytest.raises(ValueError, match="reads no text and knows its own classes"):
        ssmclip.classify(Model(network, preprocess, None, "r"), [], LABELS)
    with pytest.raises(ValueError, match="without a head"):
        ssmclip.classify(Model(network, preprocess, None, "r"), [])


def test_thousands_of_labels_are_embedded_and_said_to_be(clip, caplog):
    labels = [f"label {i}" for i in range(1001)]
    with caplog.at_level("INFO", logger="ssmclip"):
        (row,) = ssmclip.classify(clip, noise(0), labels, k=1)
    assert row.guesses[0].label in labels
    assert "1,001 prompts" in caplog.text


# ---- where pictures come from


class Serving(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        content = encoded(noise(0))
        if self.path == "/slow.png":
            self.send_response(200)
            self.end_headers()
            for _ in range(40):  # a byte now and then: no single wait is long
                try:
                    self.wfile.write(b"\x89")
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.05)
            return
        if self.path.startswith("/to:"):
            self.send_response(302)
            self.send_header("Location", self.path[4:])
            self.end_headers()
            return
        if self.path != "/a.png":
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Serving) as serving:
        serving.daemon_threads = True
        threading.Thread(target=serving.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{serving.server_address[1]}"
        serving.shutdown()


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")


def test_a_picture_is_the_same_from_a_path_an_address_and_bytes(server, tmp_path):
    noise(0).save(tmp_path / "a.png")
    for source in (tmp_path / "a.png", str(tmp_path / "a.png"), f"{server}/a.png", f"{server}/to:/a.png", noise(0)):
        assert np.array_equal(read_picture(source), noise(0))
    assert np.array_equal(read_picture(encoded(noise(0))), noise(0))


@pytest.mark.parametrize(
    ("path", "how", "told"),
    [
        ("/b.png", {}, "unreachable address: {}/b.png: 404 Not Found"),
        ("/a.png", {"max_bytes": 1000}, "too many bytes: {}/a.png has more than 1,000"),
        ("/slow.png", {"max_bytes": 10}, "too many bytes"),  # without a length in its header
        ("/slow.png", {"timeout_s": 0.3}, "address too slow: {}/slow.png took more than 0.3 s"),
        ("/to:ftp://127.0.0.1/a.png", {}, "unknown url type: ftp"),
        ("/to:file:///etc/passwd", {}, "unreachable address"),
    ],
)
def test_an_address_is_read_within_bounds(server, path, how, told):
    start = time.monotonic()
    with pytest.raises(BadImage) as error:
        download(f"{server}{path}", **how)
    assert told.format(server) in str(error.value)
    assert time.monotonic() - start < 1.5


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/a.png", "http://[", "https://127.0.0.1:1/a.png"]
)
def test_other_addresses_are_refused_in_words(url):
    with pytest.raises(BadImage, match=r"^(unsupported|unreachable) address: .*"):
        read_picture(url)


def test_folders_are_searched_and_nothing_comes_twice(pictures, tmp_path):
    first, second = str(pictures / "a.png"), str(pictures / "deep" / "b.jpg")
    assert picture_paths([second, pictures, "-", second]) == [second, first, "-"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no pictures in .*empty; supported formats: jpg"):
        picture_paths([tmp_path / "empty"])
    with pytest.raises(ValueError, match="no pictures given"):
        picture_paths([])


# ---- the command


def test_the_command_says_what_the_function_says(run, pictures, tmp_path, capsys):
    (tmp_path / "labels.txt").write_text("a dog\n\na cat, asleep\n", encoding="utf-8")
    status = main(["classify", str(pictures), "--labels", str(tmp_path / "labels.txt"), "--model", str(run), "--json"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    expected = list(ssmclip.classify(ssmclip.load(run), sorted(pictures.rglob("*.*")), ["a dog", "a cat, asleep"]))
    assert status == 0
    assert [line["picture"] for line in lines] == [row.picture for row in expected]
    for line, row in zip(lines, expected, strict=True):
        assert line["model"] == "run"
        assert [(g["label"], g["probability"]) for g in line["guesses"]] == [
            (g.label, pytest.approx(g.probability)) for g in row.guesses
        ]


def test_the_command_reads_standard_input_and_an_address(run, server, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(encoded(noise(0)))))
    labels = ",".join(LABELS)
    assert main(["classify", "-", f"{server}/a.png", "--labels", labels, "--model", str(run), "--top-k", "2"]) == 0
    first, second = capsys.readouterr().out.split(f"{server}/a.png\n")
    assert first == f"-\n{second}"
    assert len(second.splitlines()) == 2
    assert all("%  " in line for line in second.splitlines())


def test_the_command_names_and_counts_broken_pictures(run, pictures, capsys):
    (pictures / "half.png").write_bytes(encoded(noise(2))[:200])
    arguments = ["classify", str(pictures), str(pictures / "gone.png"), "--labels", "a,b", "--model"]
    assert main([*arguments, f"{run},again={run}"]) == 1
    out, err = capsys.readouterr()
    assert "2 of 4 pictures could not be read" in err
    assert f"{pictures / 'half.png'}\n  could not be read: broken image" in out
    assert f"{pictures / 'gone.png'}\n  could not be read: missing image file" in out
    assert main([*arguments, str(run), "--json"]) == 1
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [bool(line.get("unreadable")) for line in lines] == [False, False, True, True]
    assert [bool(line["guesses"]) for line in lines] == [True, True, False, False]


@pytest.mark.parametrize(
    ("labels", "told"),
    [("", "no labels given"), ("a,b,a", "given more than once: 'a'"), (None, "give the labels to choose from")],
)
def test_the_command_says_what_is_wrong_with_the_labels_in_one_line(run, pictures, labels, told, capsys):
    given = [] if labels is None else ["--labels", labels]
    assert main(["classify", str(pictures), "--model", str(run), *given]) == 1
    err = capsys.readouterr().err
    assert told in err
    assert len(err.splitlines()) == 1
