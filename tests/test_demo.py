"""The page of `ssmclip demo`: its answers against the models called by hand, over HTTP, and in a real browser."""

import base64
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ssmclip.__main__ import main
from ssmclip.analyze.cost.macs import count_macs
from ssmclip.data.distortions import distort
from ssmclip.data.images import BadImage, open_image
from ssmclip.data.synthetic import HELD_OUT
from ssmclip.demo import packaged
from ssmclip.demo.answers import (
    Hit,
    Refusal,
    Subject,
    at_size,
    classified,
    compared,
    distorted,
    looked_at,
    make_gallery,
    open_gallery,
    open_subjects,
    searched,
)
from ssmclip.demo.inputs import Limits, labels_in, picture_in
from ssmclip.demo.shown import as_html
from ssmclip.evaluate.search.embedder import Embedder
from ssmclip.evaluate.search.index import build_index
from ssmclip.models.names import find
from test_classify import bomb, encoded, noise

HOSTILE = "<b>bold</b> <img src=x onerror=alert(1)> ${1+1} {{7*7}}"
COLOURED = [" ".join(("a", *pair)) for pair in HELD_OUT]


@pytest.fixture(scope="module")
def demo() -> Subject:
    """The package's own model."""
    (subject,) = open_subjects({"CLIMP-Demo": str(packaged.FOLDER)})
    return subject


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawn") / "pictures"
    packaged.draw_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def index(pictures) -> Path:
    """What `ssmclip embed` writes."""
    file = pictures.with_name("index.parquet")
    build_index(pictures, Embedder(str(packaged.FOLDER)), file)
    return file


def drawn(pictures: Path, colour: str, shape: str) -> Image.Image:
    return open_image(pictures / f"{colour}-{shape}.png")


def unit(model, picture: Image.Image) -> torch.Tensor:
    """By open_clip's interface alone."""
    with torch.no_grad():
        return model.network.encode_image(model.preprocess(picture)[None], normalize=True)[0]


# ---- The package's own model


def test_the_packaged_model_is_small_and_names_what_it_has_not_seen(demo, pictures):
    assert sum(file.stat().st_size for file in packaged.FOLDER.iterdir()) < 4_000_000
    right = 0
    for colour, shape in HELD_OUT:
        (answer,) = classified([demo], drawn(pictures, colour, shape), COLOURED)
        right += answer.guesses[0].label == f"a {colour} {shape}"
    assert right >= 0.7 * len(HELD_OUT)


def test_the_packaged_tokenizer_is_that_of_the_captions_and_no_path_is_kept(tmp_path):
    packaged.write_tokenizer(tmp_path / "tokenizer.json")
    assert (tmp_path / "tokenizer.json").read_bytes() == packaged.TOKENIZER.read_bytes()
    config = json.loads((packaged.FOLDER / "open_clip_config.json").read_text())
    assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == "tokenizer.json"
    assert config["model_cfg"]["text_cfg"]["mamba"]["vocab_size"] >= len(packaged.vocabulary())


# ---- What visitors give


def test_labels_are_lines_or_a_list_and_there_may_be_a_thousand():
    assert labels_in("a dog, a cat") == ["a dog", "a cat"]
    assert labels_in("red, green\n\n a cat \n") == ["red, green", "a cat"]
    assert labels_in("") is labels_in(" \n ") is labels_in(None) is None
    with pytest.raises(ValueError, match=r"at most 1,000 labels .got 5,000.: choose fewer"):
        labels_in("\n".join(f"label {i}" for i in range(5000)))
    with pytest.raises(ValueError, match=r"at most 1,000 characters .got 9,999.: shorten it"):
        labels_in("a" * 9999)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"no picture", "broken image: not in one of the formats"),
        (bomb(20_000), "image too large: "),
        (encoded(noise(0, (900, 9))), "one side must be at most 20 times the other .got 900 x 9."),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "broken image"),
        (b"", "broken image"),
    ],
)
def test_a_bad_picture_is_refused_in_a_sentence(tmp_path, content, says):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImage, match=says):
        picture_in(tmp_path / "a.png")


def test_no_picture_and_too_many_bytes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="no picture given: drop one into the box"):
        picture_in(None)
    (tmp_path / "a.png").write_bytes(encoded(noise(0)))
    assert picture_in(tmp_path / "a.png").size == noise(0).size
    with pytest.raises(BadImage, match=r"at most 100 .got"):
        picture_in(tmp_path / "a.png", Limits(bytes=100))


# ---- Answers


def test_every_model_answers_and_a_refusal_stands_in_its_place(demo):
    subjects = (demo, *open_subjects({"vit": "timm:test_vit"}))
    clip, vit = classified(subjects, noise(0), None)
    assert clip == Refusal("CLIMP-Demo", clip.why)
    assert "give the labels" in clip.why
    with torch.no_grad():
        logits = subjects[1].model.network(subjects[1].model.preprocess(noise(0))[None])[0].double()
    assert vit.guesses[0].probability == pytest.approx(logits.softmax(0).max().item(), rel=1e-5)
    clip, same = classified(subjects, noise(0), ["red", "blue"])
    assert same == vit
    assert sum(guess.probability for guess in clip.guesses) == pytest.approx(1)


def test_similarity_is_the_cosine_of_the_embeddings(demo):
    left, right, text = noise(0), noise(1), "a red circle"
    with torch.no_grad():
        words = demo.model.network.encode_text(demo.model.tokenizer([text]), normalize=True)[0]
    for sides, expected in (
        ((("", left), ("", right)), unit(demo.model, left) @ unit(demo.model, right)),
        ((("", left), (text, None)), unit(demo.model, left) @ words),
        (((text, None), (text, None)), torch.tensor(1.0)),
    ):
        (answer,) = compared([demo], *sides)
        assert answer.cosine == pytest.approx(expected.item(), abs=1e-5)


def test_an_encoder_compares_pictures_and_no_texts():
    subjects = open_subjects({"vit": "timm:test_vit"})
    network, preprocess, _ = subjects[0].model
    with torch.no_grad():
        a, b = (
            network.forward_head(network.forward_features(preprocess(noise(i))[None]), pre_logits=True)[0]
            for i in (0, 1)
        )
    (answer,) = compared(subjects, ("", noise(0)), ("", noise(1)))
    assert answer.cosine == pytest.approx(torch.cosine_similarity(a, b, dim=0).item(), abs=1e-5)
    (answer,) = compared(subjects, ("", noise(0)), ("a dog", None))
    assert answer == Refusal("vit", "vit reads no text: give pictures, or take a CLIP")


@pytest.mark.parametrize("side", [("", None), ("a dog", noise(0))])
def test_a_side_is_one_thing(demo, side):
    with pytest.raises(ValueError, match="right side: give a picture or a text"):
        compared([demo], ("a dog", None), side)


def test_search_finds_the_picture_itself_and_what_a_text_names(demo, pictures, index):
    gallery = open_gallery(index, [demo])
    assert gallery.embedder.clip.network is demo.model.network
    (first, *_) = searched(gallery, "", drawn(pictures, "blue", "star"))
    assert (first.path, first.score) == ("blue-star.png", pytest.approx(1, abs=1e-5))
    scores = {
        path: vector @ gallery.embedder.encode_texts("a red circle").numpy()[0]
        for path, vector in zip(gallery.index.paths, gallery.index.vectors, strict=True)
    }
    hits = searched(gallery, "a red circle", None, k=3)
    assert [hit.path for hit in hits] == sorted(scores, key=scores.get, reverse=True)[:3]
    shown = Image.open(io.BytesIO(base64.b64decode(hits[0].picture)))
    original = open_image(pictures / hits[0].path).resize(shown.size, Image.Resampling.NEAREST)
    assert np.abs(np.asarray(shown, float) - np.asarray(original, float)).mean() < 8


def test_an_index_opens_its_own_model_where_none_is_given(pictures, index):
    gallery = open_gallery(index)
    assert gallery.embedder.clip.label == str(packaged.FOLDER)
    assert searched(gallery, "", drawn(pictures, "blue", "star"))[0].path == "blue-star.png"


def test_pictures_that_are_gone_are_named_and_none_left_is_an_error(demo, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copy")
    gallery = make_gallery(tmp_path / "copy", demo, tmp_path / "index.parquet")
    (tmp_path / "copy" / "blue-star.png").unlink()
    hits = {hit.path: hit for hit in searched(gallery, "a blue star", None, k=1000)}
    assert "missing image file" in hits["blue-star.png"].missing
    assert [path for path, hit in hits.items() if hit.missing] == ["blue-star.png"]
    shutil.rmtree(tmp_path / "copy")
    with pytest.raises(ValueError, match=r"none of the 12 nearest pictures can be opened any more.*ssmclip embed"):
        searched(gallery, "a blue star", None)


@pytest.mark.parametrize("path", ["../secret.png", "/secret.png", "deep/../../secret.png"])
def test_an_index_does_not_lead_out_of_its_folder(demo, pictures, tmp_path, path):
    shutil.copytree(pictures, tmp_path / "in")
    noise(0).save(tmp_path / "secret.png")
    gallery = make_gallery(tmp_path / "in", demo, tmp_path / "index.parquet")
    gallery.index.paths[:] = [path.replace("/secret", f"{tmp_path}/secret", path[0] == "/")] * len(gallery.index.paths)
    with pytest.raises(ValueError, match="outside the folder of the index"):
        searched(gallery, "a blue star", None)


def test_resolution_has_the_prediction_of_that_size_and_its_cost(demo):
    jobs = []

    def measure(job):
        jobs.append(job)
        return {"memory_mb": 12.0, "single": {"median": 0.5}}

    (cost,) = at_size([demo], noise(0), ["red", "blue"], 96, measure)
    expected = classified(
        [Subject(demo.name, find(demo.name, label="CLIMP-Demo", image_size=96))], noise(0), ["red", "blue"]
    )
    assert cost.prediction == expected[0]
    assert (cost.latency_ms, cost.memory_mb) == (500, 12)
    assert cost.macs == count_macs(demo.model.network, 96).image.total
    assert [job.image_size for job in jobs] == [(96, 96)]
    (refused,) = at_size(
        [demo], noise(0), ["red"], 96, lambda job: {"failed": "killed by signal 9: most likely out of memory"}
    )
    assert "does not fit into memory at 96 px" in refused.why
    (slow,) = at_size([demo], noise(0), ["red"], 96, lambda job: {"failed": "took more than 120 s"})
    assert slow.unmeasured == "took more than 120 s"


def test_a_distorted_picture_is_that_of_ssmclip_distort(demo):
    shown = distorted([demo], noise(0, (300, 260)), ["red", "blue"], "contrast", "c10")
    assert shown.before.size == shown.after.size == (224, 224)
    np.testing.assert_array_equal(np.asarray(shown.after), distort(np.asarray(shown.before), "contrast", 0.1))
    (pair,) = shown.answers
    assert pair == tuple(classified([demo], picture, ["red", "blue"])[0] for picture in (shown.before, shown.after))
    with pytest.raises(ValueError, match="the level of contrast must be"):
        distorted([demo], noise(0), ["red"], "contrast", "much")
    with pytest.raises(ValueError, match="power-equalisation needs amplitude"):
        distorted([demo], noise(0), ["red"], "power-equalisation", "pow")


@pytest.mark.parametrize("method", ["similarity", "scan", "receptive-field", "text-scan"])
def test_every_method_of_explanation_is_drawn(demo, method):
    from ssmclip.demo.shown import looked_at as as_page

    answers = looked_at([demo], noise(0), HOSTILE, method, (0.2, 0.8))
    assert not isinstance(answers[0], Refusal), answers
    page = as_page(answers)
    assert tags(page).count("svg") == 1
    assert not {"b", "img", "script"} & set(tags(page))


def tags(page: str) -> list[str]:
    """The elements of a page, as Python's own parser sees them."""
    found = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: found.append(tag)
    parser.feed(page)
    return found


def test_what_is_shown_is_escaped():
    page = as_html("searched", [Hit(HOSTILE, 0.5, missing=HOSTILE)])
    assert not {"b", "img"} & set(tags(page))
    assert page.count("&lt;b&gt;bold&lt;/b&gt;") == 2


# ---- The command


def test_a_port_in_use_is_a_sentence(capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 1
    assert (
        capsys.readouterr().err
        == f"ssmclip demo: port {port} cannot be used (Address already in use): give another, or 0 for any\n"
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--port", "70000"], "the port must be from 0 to 65535 (got 70000)"),
        (["--index", "none.parquet"], "index not found: none.parquet; make one with `ssmclip embed"),
        (["--model", "runs/none"], "no such file or folder: runs/none"),
        (["--distortions", "none.py:mine"], "none.py not found"),
    ],
)
def test_mistakes_are_sentences(words, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", "--port", "0", *words]) == 1
    assert says in capsys.readouterr().err


@pytest.fixture
def opened(monkeypatch) -> list:
    """The sessions that a command would serve; it ends at once."""
    sessions = []
    monkeypatch.setattr("ssmclip.demo.server.build_app", lambda session, uploads: sessions.append(session))
    monkeypatch.setattr("ssmclip.demo.server.serve", lambda app, listening: None)
    return sessions


def test_without_arguments_it_opens_on_the_packaged_model_and_pictures(opened, capsys):
    assert main(["demo", "--port", "0"]) == 0
    assert "shows CLIMP-Demo; Ctrl-C stops it" in capsys.readouterr().out
    (session,) = opened
    assert len(session.examples) == packaged.TO_TRY
    assert {path.removesuffix(".png") for path in session.gallery.index.paths} >= {"-".join(pair) for pair in HELD_OUT}
    assert list(session.labels) == list(packaged.LABELS)


def test_an_index_whose_folder_is_gone_is_said_on_the_command_line(opened, capsys, pictures, tmp_path):
    shutil.copytree(pictures, tmp_path / "copy")
    build_index(tmp_path / "copy", Embedder(str(packaged.FOLDER)), tmp_path / "index.parquet")
    shutil.rmtree(tmp_path / "copy")
    assert main(["demo", "--port", "0", "--index", str(tmp_path / "index.parquet"), "--labels", "a dog,a cat"]) == 0
    said = capsys.readouterr()
    assert f"index.parquet are gone: there is no folder {tmp_path}/copy" in said.err
    assert f"shows {packaged.FOLDER};" in said.out
    assert opened[0].labels == ["a dog", "a cat"]


def test_without_gradio_it_says_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr("ssmclip.demo.server.find_spec", lambda name: None)
    assert main(["demo"]) == 1
    assert capsys.readouterr().err == "ssmclip demo: the demo needs Gradio: pip install 'ssmclip[demo]'\n"


# ---- Over HTTP

gradio = pytest.importorskip("gradio")


# Writes down what the process connects to or looks up that is not this machine.
WATCHED = """
import socket, sys
log, *words = sys.argv[1:]
def watch(name, address_of):
    original = getattr(*name)
    def watched(*args, **how):
        address = address_of(args)
        if address not in ("127.0.0.1", "localhost", "::1", None):
            print(address, file=open(log, "a"))
        return original(*args, **how)
    setattr(*name, watched)
connected = lambda args: args[1][0] if isinstance(args[1], tuple) else None
watch((socket.socket, "connect"), connected)
watch((socket.socket, "connect_ex"), connected)
watch((socket, "getaddrinfo"), lambda args: args[0])
from ssmclip.__main__ import main
sys.exit(main(words))
"""


class Served:
    """A page in a process of its own."""

    def __init__(self, folder: Path, *words: str):
        self.foreign = folder / "foreign.txt"
        command = [sys.executable, "-c", WATCHED, str(self.foreign), "demo", "--port", "0", *words]
        self.stderr = folder / "stderr.txt"
        with self.stderr.open("w") as stderr:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stderr, text=True)
        line = self.process.stdout.readline()
        assert line.startswith("http"), self.stderr.read_text()
        self.address, self.line = line.split()[0], line
        self.dependencies = json.loads(self.get("/config"))["dependencies"]
        self.asked = 0
        self.uploads = Path(self.upload(encoded(noise(0)))["path"]).parents[1]

    def get(self, path: str, **headers: str) -> str:
        request = urllib.request.Request(self.address + path, headers=headers)
        return urllib.request.urlopen(request, timeout=30).read().decode("utf-8", "replace")

    def post(self, path: str, content: bytes, kind: str = "application/json") -> str:
        request = urllib.request.Request(self.address + path, content, {"Content-Type": kind})
        return urllib.request.urlopen(request, timeout=30).read().decode()

    def upload(self, content: bytes, name: str = "a.png") -> dict:
        head = f'--x\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + content + b"\r\n--x--\r\n"
        (path,) = json.loads(self.post("/gradio_api/upload", body, "multipart/form-data; boundary=x"))
        return file_data(path)

    def ask(self, function: str, *values: object) -> str:
        """Return a tab's answer, as the page would get it."""
        (number,) = (i for i, made in enumerate(self.dependencies) if made["api_name"] == function)
        self.asked += 1
        question = {"data": values, "fn_index": number, "session_hash": f"test{self.asked}"}
        self.post("/gradio_api/queue/join", json.dumps(question).encode())
        events = self.get(f"/gradio_api/queue/data?session_hash=test{self.asked}").split("\n\n")
        messages = [json.loads(event.removeprefix("data: ")) for event in events if event.strip()]
        (done,) = (message for message in messages if message["msg"] == "process_completed")
        return done["output"]["data"][0] if done["success"] else f"REFUSED {json.dumps(done)}"


def file_data(path: str) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


@pytest.fixture(scope="module")
def page(tmp_path_factory, pictures, index):
    folder = tmp_path_factory.mktemp("served")
    models = f"one={packaged.FOLDER},two=timm:test_vit"
    served = Served(folder, "--model", models, "--index", str(index), "--labels", "a red circle,a blue star")
    yield served
    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(30) == 130
    served.process.stdout.close()
    assert not served.foreign.exists(), served.foreign.read_text()
    assert not list(served.uploads.parent.glob(f"{served.uploads.name}*"))
    assert "an answer failed" not in served.stderr.read_text()


def status(call, *arguments, **how) -> int:
    try:
        call(*arguments, **how)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    return 200


def test_it_says_where_it_is_and_what_it_shows(page):
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+ shows one, two; Ctrl-C stops it\n", page.line)


@pytest.mark.parametrize("way", ["", "/", "//", "/../", "/%2e%2e/", "/..%2f..%2f"])
def test_no_file_of_this_machine_is_served(page, pictures, index, tmp_path, way):
    secret = tmp_path / "secret.png"
    noise(0).save(secret)
    uploads = Path(page.upload(encoded(noise(1)))["path"]).parent
    shown = str(pictures / "blue-star.png")
    for path in (
        secret,
        shown,
        index,
        "/etc/passwd",
        packaged.TOKENIZER,
        Path(__file__),
        f"{uploads}/../../../etc/passwd",
    ):
        for start in ("/gradio_api/file=", "/file=", "/file/", "/static/", "/assets/", "/gradio_api/file/"):
            assert status(page.get, f"{start}{way}{path}".replace(" ", "%20")) in (400, 403, 404, 405), (
                start,
                way,
                path,
            )


def test_an_upload_is_served_and_looked_at_and_no_other_file(page, tmp_path):
    upload = page.upload(encoded(noise(1)))
    assert status(page.get, f"/gradio_api/file={upload['path']}") == 200
    noise(77).save(tmp_path / "secret.png")
    assert "a red circle" in page.ask("classify", upload, "a red circle", "{}")
    secret = (tmp_path / "secret.png").read_bytes()
    for path in (
        f"{tmp_path}/secret.png",
        f"{upload['path']}/../../..{tmp_path}/secret.png",
        "http://127.0.0.1:1/a.png",
    ):
        for name in ("/etc/passwd", path):
            assert page.ask("classify", file_data(name), "a red circle", "{}").startswith("REFUSED")
            assert page.ask("classify", file_data(name) | {"is_stream": True}, "a", "{}").startswith("REFUSED")
            assert page.ask("classify", upload, file_data(name), "{}").startswith("REFUSED")
    kept = [file for file in page.uploads.rglob("*") if file.is_file()]
    assert upload["path"] in map(str, kept)
    assert not [file for file in kept if file.read_bytes() in (secret, Path("/etc/passwd").read_bytes())]


def test_what_is_too_long_is_refused_before_it_is_kept(page):
    assert status(page.upload, b"x" * 30_000_000) == 413
    with pytest.raises(urllib.error.HTTPError) as refused:
        page.post("/gradio_api/queue/join", b" " * 30_000_000)
    with refused.value as error:
        assert error.code == 413
        assert error.read() == b"a request must have at most 21,000,000 bytes: save a smaller picture"
    host, port = page.address.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as connection:  # a length that is not declared
        connection.sendall(
            b"POST /gradio_api/queue/join HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
        )
        for _ in range(22):
            connection.sendall(b"100000\r\n" + b" " * 0x100000 + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        answer = connection.recv(100)
    assert answer.startswith(b"HTTP/1.1 413 ")


def test_only_this_machine_reaches_it_under_its_own_name(page):
    assert status(page.get, "/config", Host="evil.example") == 400
    assert status(page.get, "/config", Host="localhost") == 200
    port = int(page.address.rpartition(":")[2])
    listening = Path("/proc/net/tcp").read_text() if Path("/proc/net/tcp").exists() else f"0100007F:{port:04X}"
    assert f"0100007F:{port:04X}" in listening
    assert f"00000000:{port:04X}" not in listening


def test_it_fetches_nothing_for_a_visitor(page):
    for path in ("/gradio_api/proxy=http://127.0.0.1:1/a", "/proxy=https://example.org/a", "/gradio_api/monitoring"):
        assert status(page.get, path) in (400, 403, 404, 405), path


def test_the_page_refers_to_no_other_host_that_the_browser_would_ask(page):
    with urllib.request.urlopen(page.address, timeout=30) as answer:
        policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "http" not in policy


@pytest.mark.parametrize(
    ("content", "labels", "says"),
    [
        (b"no picture", "a", "broken image"),
        (bomb(20_000), "a", "image too large"),
        (bomb(9_000), "a", "at most 40,000,000 pixels (got 9000 x 9000)"),
        (None, "a", "no picture given: drop one into the box"),
        (encoded(noise(0)), "", "give the labels to choose from"),
        (encoded(noise(0)), "\n".join(map(str, range(5000))), "at most 1,000 labels (got 5,000): choose fewer"),
        (encoded(noise(0)), "a, a", "every label must be given once"),
        (encoded(noise(0)), HOSTILE, "&lt;b&gt;bold&lt;/b&gt; &lt;img src=x onerror=alert(1)&gt; ${1+1} {{7*7}}"),
    ],
)
def test_bad_input_is_a_sentence_of_the_page(page, content, labels, says):
    answer = page.ask("classify", None if content is None else page.upload(content), labels, "{}")
    assert says in answer
    assert "<b>" not in answer
    assert "Traceback" not in answer


def test_every_tab_answers(page, pictures):
    upload = page.upload((pictures / "blue-star.png").read_bytes())
    assert ">1.0000<" in page.ask("compare", "", upload, "", upload)
    assert "ms</td>" in page.ask("resolution", upload, "red, blue", 64)
    assert page.ask("resolution", upload, "red, blue", 9999).startswith("REFUSED")
    assert page.ask("distort", upload, "red, blue", "contrast", "c30").count("<img") == 2
    assert "the level of contrast must be" in page.ask("distort", upload, "red, blue", "contrast", "much")
    assert page.ask("look", upload, "a blue star", "similarity", 0.5, 0.5).count("<svg") == 1
    assert page.ask("search", "", upload).index("blue-star.png") < page.ask("search", "a ring", None).index("ring.png")


# ---- In a browser

FOREVER = 20_000  # milliseconds; on a quiet machine everything takes less than two seconds


@pytest.fixture(scope="module")
def tab(browser, page):
    """The page on a desktop, opened once; at the end: what it asked for, and what was wrong."""
    asked, wrong = [], []
    opened = browser.new_page(viewport={"width": 1200, "height": 900})
    opened.set_default_timeout(FOREVER)
    opened.on("request", lambda request: asked.append(request.url))
    opened.on("pageerror", lambda error: wrong.append(str(error)))
    opened.on("dialog", lambda dialog: wrong.append(dialog.message))
    opened.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    opened.goto(page.address)
    opened.wait_for_selector("#classify-run")
    yield opened
    foreign = [url for url in asked if not url.startswith((page.address, "data:", "blob:"))]
    assert not foreign
    assert not wrong


def drop(tab, box: str, file: Path) -> None:
    """Drop a file onto a box, as from a desktop."""
    content = base64.b64encode(file.read_bytes()).decode()
    script = """([content, name]) => {
        const bytes = Uint8Array.from(atob(content), letter => letter.charCodeAt(0));
        const dropped = new DataTransfer();
        dropped.items.add(new File([bytes], name, {type: "image/png"}));
        return dropped;
    }"""
    dropped = tab.evaluate_handle(script, [content, file.name])
    tab.locator(f"{box} button").first.dispatch_event("drop", {"dataTransfer": dropped})
    tab.wait_for_selector(f"{box} img")


def answer_of(tab, name: str) -> str:
    """Press a tab's button and return the text that answers, once it is no longer that of an earlier question."""
    shown = f"#{name}-answer .prose > *"
    tab.evaluate("shown => document.querySelectorAll(shown).forEach(part => part.classList.add('before'))", shown)
    tab.locator(f"#{name}-run").click()
    tab.wait_for_selector(f"{shown}:not(.before)")
    return tab.locator(f"#{name}-answer").inner_text()


def test_a_picture_dropped_and_labels_typed_give_the_right_label_on_top(tab, pictures):
    drop(tab, "#classify-picture", pictures / "blue-star.png")
    tab.locator("#classify-labels textarea").fill(f"a red circle\na blue star\n{HOSTILE}")
    answer = answer_of(tab, "classify")
    first = tab.locator("#classify-answer .guesses").first.locator(".label").all_inner_texts()
    assert first[:1] == ["a blue star"], answer
    assert HOSTILE in first
    assert tab.locator("#classify-answer .card h3").all_inner_texts() == ["one", "two"]
    assert "%" in answer


def test_a_search_shows_the_picture(tab):
    tab.get_by_role("tab", name="Search").click()
    tab.locator("#search-text textarea, #search-text input").fill("a blue star")
    answer_of(tab, "search")
    assert "star.png" in tab.locator("#search-answer .hit").first.inner_text()
    widths = tab.locator("#search-answer .hit img").evaluate_all("images => images.map(image => image.naturalWidth)")
    assert len(widths) == 12
    assert min(widths) > 0


def test_a_broken_picture_is_an_error_in_words(tab, tmp_path):
    tab.get_by_role("tab", name="Compare").click()
    (tmp_path / "broken.png").write_bytes(encoded(noise(0))[:100])
    drop(tab, "#compare-picture-left", tmp_path / "broken.png")
    assert "broken image" in answer_of(tab, "compare")


def test_on_a_phone_nothing_is_wider_than_the_screen(browser, page, pictures):
    phone = browser.new_page(viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True)
    phone.set_default_timeout(FOREVER)
    phone.goto(page.address)
    phone.wait_for_selector("#classify-run")
    phone.locator("#classify-picture input[type=file]").set_input_files(str(pictures / "blue-star.png"))
    phone.wait_for_selector("#classify-picture img")
    phone.locator("#classify-labels textarea").fill("a_label_without_blanks_" * 10 + "\na blue star")
    answer_of(phone, "classify")
    assert phone.evaluate("document.documentElement.scrollWidth") <= 360
    answer = phone.locator("#classify-answer .label").all()
    for part in [*answer, *phone.locator("#classify-run, #classify-picture, #classify-labels").all()]:
        box = part.bounding_box()
        assert 0 <= box["x"] <= box["x"] + box["width"] <= 360
