"""The report shows the rows it was given, no more and no less, on a page that needs nothing but itself."""

import argparse
import base64
import io
import math
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageColor
from scipy.stats import gaussian_kde

import ssmclip.report
from ssmclip.cli import report as command
from ssmclip.report import FIGURES, drawings, read_store, table, update_readme, write_report
from ssmclip.report.figures.base import Drawing
from ssmclip.report.figures.curvature import bandwidth, kernel_density
from ssmclip.report.style import COLOURS, styles
from ssmclip.report.table1 import table1
from ssmclip.report.tables import blocks, notes
from ssmclip.report.words import summary
from ssmclip.rows import Result, write_rows

HOSTILE = '<script>alert("1")</script> & $\\frac{$'
CLASSES = ["cat", "dog", "<b>fish</b>"]


def jpeg(level: int, side: int = 12) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side), (level, 90, 200)).save(buffer, "JPEG")
    return base64.b64encode(buffer.getvalue()).decode()


def classification(model: str, value: float, counts: list[list[int]]) -> list[Result]:
    """What evaluation writes of a classification task."""
    totals = [sum(line) for line in counts]
    accuracies = [counts[i][i] / totals[i] for i in range(3)]
    extra = {
        "title": "Three animals",
        "kind": "classification",
        "chance": 1 / 3,
        "partial": {"used": 60, "of": 1000},
        "per_class": [
            {"name": name, "accuracy": accuracy, "n": n}
            for name, accuracy, n in zip(CLASSES, accuracies, totals, strict=True)
        ],
        "confusion": {"names": CLASSES, "counts": counts},
        "thumbnails": {"3": jpeg(3), "5": jpeg(5)},
        "image_to_text": [
            {"image": "3", "truth": ["cat"], "found": [{"item": "dog", "score": 0.31, "right": False}]},
            {"image": "5", "truth": ["dog"], "found": [{"item": "dog", "score": 0.52, "right": True}]},
        ],
        "similarity": {"images": ["3", "5"], "texts": ["cat", "dog"], "scores": [[0.3, 0.31], [0.1, 0.52]]},
    }
    return [
        Result(model, "animals", "top1", value, value - 0.05, value + 0.05, 60, extra=extra),
        Result(model, "animals", "mean_per_class", value + 0.01, value - 0.05, value + 0.06, 60),
    ]


def retrieval(model: str, value: float) -> list[Result]:
    hit = {"item": "0", "score": 0.4, "right": True}
    extra = {
        "title": "Photographs",
        "kind": "retrieval",
        "chance": 0.01,
        "thumbnails": {"0": jpeg(0), "1": jpeg(1)},
        "image_to_text": [
            {
                "image": "0",
                "truth": ["a | b", "c"],
                "found": [
                    {"item": "a | b", "score": 0.4, "right": True},
                    {"item": "<i>x</i>", "score": 0.2, "right": False},
                ],
            }
        ],
        "text_to_image": [{"text": "a | b", "truth": "0", "found": [hit, {"item": "1", "score": 0.3, "right": False}]}],
    }
    return [
        Result(model, "photos", f"{way}_recall@{k}", value * k / 10, value * k / 12, value * k / 9, n, extra=more)
        for way, n in (("image_to_text", 100), ("text_to_image", 500))
        for k, more in ((1, extra if way == "image_to_text" else {}), (10, {"chance": 0.1}))
    ]


def training(model: str, start: float) -> list[Result]:
    rows = []
    for step in range(10, 60, 10):
        rows += [
            Result(model, "train", "loss", start / step, where={"step": step}),
            Result(model, "train", "images_per_s", start * step, where={"step": step}),
            Result(model, "train", "lr", 0.1, where={"step": step}),
        ]
    return [*rows, Result(model, "animals", "top1", start / 10, where={"step": 50}, n=60)]


def landscape(model: str, sign: float) -> list[Result]:
    """What analysis writes: eigenvalues and a density per batch, over training, and two surfaces."""
    rows = []
    for batch in range(6):
        where = {"batch": batch, "tower": "whole"}
        rows += [
            Result(
                model,
                "hessian",
                f"by_magnitude_{i}",
                sign * (10 - i) * (-1) ** batch,
                where=where,
                extra={"residual": 1e-4 / i, "products": 30, "found_after": 3 * i},
            )
            for i in range(1, 6)
        ]
        rows += [
            Result(
                model,
                "hessian",
                f"by_magnitude_{i}",
                sign * (9.9 - i),
                where={**where, "protocol": "park-kim"},
                extra={"residual": 0.01 * i, "products": 60},
            )
            for i in range(1, 6)
        ]
        spectrum = {"nodes": [[-2.0 * sign, 0.5, 9.0]], "weights": [[0.25, 0.5, 0.25]], "size": 100}
        rows.append(Result(model, "hessian", "negative_mass", 0.2, where=where, n=1, extra=spectrum))
        rows += [
            Result(model, "hessian", f"{end}_1", value * (step + batch), where={"step": step, **where})
            for step in (0, 10)
            for end, value in (("largest", 2.0), ("smallest", -1.0))
        ]
    rows.append(
        Result(
            model, "hessian", "negative_share", 0.5, 0.4, 0.6, 6, where={"tower": "whole"}, extra={"title": "Hessian"}
        )
    )
    places = (-1.0, -0.5, 0.0, 0.5, 1.0)
    rows += [Result(model, "surface_1d", "loss", sign * x * x, where={"x": x}) for x in places]
    return rows + [
        Result(model, "surface_2d", "loss", x * x + sign * y, where={"x": x, "y": y}) for x in places for y in places
    ]


ROWS = [
    *classification("CLIP-A", 0.75, [[15, 5, 0], [5, 15, 0], [0, 5, 15]]),
    *retrieval("CLIP-A", 0.6),
    *training("CLIP-A", 5.0),
    *(Result("CLIP-A", "efficiency", "macs", 3.0 * side**2, where={"image": side}) for side in (32, 64)),
    *classification(HOSTILE, 0.60, [[12, 8, 0], [8, 12, 0], [0, 8, 12]]),
    *retrieval(HOSTILE, 0.5),
    *training(HOSTILE, 6.0),
    *landscape("CLIP-A", 1.0),
    *landscape(HOSTILE, 2.0),
]
RUN = {"commit": "abc123", "device": "cpu", "cpu": "Some CPU", "cores": 2, "seed": 7, "versions": {"torch": "2.15"}}


@pytest.fixture
def rows_file(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    write_rows(path, ROWS, RUN)
    return path


@pytest.fixture
def drawn(rows_file) -> dict[str, list[Drawing]]:
    found = drawings(read_store([rows_file]))
    return {name: [d for d in found if type(d) is cls] for name, cls in FIGURES.items()}


def rows_of(metric: str, condition: str = "") -> list[Result]:
    return [row for row in ROWS if row.metric == metric and row.condition.startswith(condition)]


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The page of ROWS."""
    folder = tmp_path_factory.mktemp("report")
    write_rows(folder / "rows.jsonl", ROWS, RUN)
    path = write_report([folder / "rows.jsonl"], folder / "out")
    assert sorted(path.parent.iterdir()) == [path, path.with_name("report_files")]
    text = path.read_text()
    assert str(folder) not in text
    return text


class Page(HTMLParser):
    """Tags that must close do; what the page would load; its text."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str):
        super().__init__()
        self.open, self.loads, self.ids, self.tags, self.words = [], [], [], [], []
        self.feed(html)
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.handle_startendtag(tag, attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        for name, value in attributes:
            assert not name.startswith("on"), f"{tag} has a handler {name}"
            if name in ("src", "href", "xlink:href", "srcset", "data", "action", "poster"):
                self.loads.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def test_every_figure_draws_what_the_rows_say(drawn):
    # People's trials, memory at one size, what a model looks at, and the table of 26 data sets need rows of their own:
    # test_ood_figures.py, test_efficiency.py, test_saliency.py, test_report_page.py, and below.
    elsewhere = {name for name, cls in FIGURES.items() if cls.__module__ == "ssmclip.report.figures.humans"}
    elsewhere |= {"accuracy_per_parameter", "memory", "overview", "saliency"}
    assert {name for name, found in drawn.items() if found} == set(FIGURES) - elsewhere
    for found in drawn.values():
        for one in found:
            assert one.frame()
            assert one.plot().axes


def test_no_axis_shows_the_source_of_a_formula(html):
    assert "mathdefault" not in html  # matplotlib's own labels of logarithmic axes, where formulas are not drawn


def test_landscapes_are_the_rows(drawn):
    for found, usual in zip(drawn["hessian_eigenvalues"], (False, True), strict=True):
        values = [entry["value"] for entry in found.frame() if entry["model"] == "CLIP-A"]
        mine = [row for row in landscape("CLIP-A", 1.0) if "magnitude" in row.metric]
        assert sorted(values) == sorted(row.value for row in mine if ("protocol" in row.where) == usual)
    (protocols,) = drawn["hessian_protocols"]
    mine = [entry for entry in protocols.frame() if entry["model"] == "CLIP-A"]
    lanczos, power = ([e for e in mine if (e["protocol"] == "Lanczos") == wanted] for wanted in (True, False))
    assert [(e["products"], e["residual"]) for e in lanczos] == [(15, 1e-4)] * 6
    assert [(e["products"], e["residual"]) for e in power] == [(60, 0.05)] * 6
    (density,) = drawn["hessian_density"]
    mine = [entry for entry in density.frame() if entry["model"] == "CLIP-A"]
    x, y = (np.array([entry[key] for entry in mine]) for key in ("eigenvalue", "density"))
    assert np.trapezoid(y, x) == pytest.approx(1, rel=1e-3)
    assert np.trapezoid(y * x, x) == pytest.approx(0.25 * -2 + 0.5 * 0.5 + 0.25 * 9, rel=1e-3)
    (training,) = drawn["hessian_training"]
    assert {"model": "CLIP-A", "end": "largest", "step": 10, "median": 25.0, "batches": 6} in training.frame()
    x, y, loss = drawn["surface_contour"][0].grid()
    np.testing.assert_allclose(loss, x**2 + y[:, None])
    values = np.random.default_rng(0).normal(size=200)
    at = np.linspace(-3, 3, 9)
    silverman = gaussian_kde(values, bw_method=bandwidth(values) / values.std(ddof=1))
    np.testing.assert_allclose(kernel_density(values.tolist(), at), silverman(at), rtol=1e-6)


def test_tables_have_no_line_for_every_batch():
    text = table(landscape("CLIP-A", 1.0))
    assert "50.0 % (40.0–60.0)" in text
    assert "batch=" not in text
    assert "x=" not in text


def test_curves_are_the_rows_of_the_steps(drawn):
    loss, validation = drawn["training_curves"]
    assert [(f["model"], f["step"], f["value"]) for f in loss.frame()] == [
        (row.model, row.where["step"], row.value) for row in rows_of("loss", "step=")
    ]
    assert [f["value"] for f in validation.frame()] == [row.value for row in rows_of("top1", "step=")]
    lines = loss.plot().axes[0].lines
    np.testing.assert_allclose(
        [line.get_ydata() for line in lines], np.reshape([r.value for r in rows_of("loss", "step=")], (2, 5))
    )
    assert [line.get_label() for line in lines] == ["CLIP-A", HOSTILE]


def test_bars_are_the_rows_with_their_intervals(drawn):
    (accuracy,), (recall,) = drawn["zero_shot"], drawn["retrieval"]
    for figure, rows in (
        (accuracy, [row for row in rows_of("top1") if row.plain]),
        (recall, [row for row in ROWS if "recall" in row.metric]),
    ):
        assert [(f["model"], f["value"], f["ci_low"], f["ci_high"], f["n"], f["chance"]) for f in figure.frame()] == [
            (row.model, row.value, row.ci_low, row.ci_high, row.n, row.extra.get("chance")) for row in rows
        ]
        axes = figure.plot().axes[0]
        assert sorted(patch.get_width() for patch in axes.patches) == sorted(row.value for row in rows)
        whiskers = [tuple(line.get_xdata()) for line in axes.lines if line.get_linestyle() == "-"]
        assert sorted(whiskers) == sorted((row.ci_low, row.ci_high) for row in rows)
    assert [f["group"] for f in recall.frame()][:2] == ["image to text R@1", "image to text R@10"]


def test_throughput_is_the_median_and_the_middle_half(drawn):
    for entry in drawn["throughput"][0].frame():
        speeds = [row.value for row in rows_of("images_per_s") if row.model == entry["model"]]
        expected = np.quantile(speeds, [0.25, 0.5, 0.75])
        assert [entry["low"], entry["median"], entry["high"]] == pytest.approx(expected)
        assert entry["steps"] == len(speeds)


def test_classes_and_confusions_are_those_of_the_rows(drawn):
    (by_class,) = drawn["per_class"]
    expected = [
        (row.model, entry["name"], entry["accuracy"]) for row in ROWS for entry in row.extra.get("per_class", [])
    ]
    assert [(f["model"], f["class"], f["accuracy"]) for f in by_class.frame()] == expected
    labels = [label.get_text() for label in by_class.plot().axes[0].get_yticklabels()]
    assert labels == ["<b>fish</b>", "cat", "dog"]  # all equal: by name
    assert [len(d.rows) for d in drawn["confusion"]] == [1, 1]
    for figure in drawn["confusion"]:
        counts = figure.rows[0].extra["confusion"]["counts"]
        assert [f["count"] for f in figure.frame()] == [count for line in counts for count in line]
        image = figure.plot().axes[0].images[0].get_array()
        np.testing.assert_allclose(image, np.array(counts) / np.sum(counts, axis=1, keepdims=True))


def test_many_classes_show_the_best_and_the_worst(tmp_path):
    classes = [{"name": f"c{i:02}", "accuracy": i / 100, "n": 5} for i in range(50)]
    write_rows(
        tmp_path / "rows", [Result("A", "t", "top1", 0.5, extra={"kind": "classification", "per_class": classes})]
    )
    (by_class,) = [d for d in drawings(read_store([tmp_path / "rows"])) if isinstance(d, FIGURES["per_class"])]
    assert "15 best and worst of 50" in by_class.title
    labels = [label.get_text() for label in by_class.plot().axes[0].get_yticklabels()]
    assert labels == [f"c{i:02}" for i in [*range(15), *range(35, 50)]]


def test_pictures_carry_their_scores(drawn):
    similarity = drawn["similarity"][0]
    assert [f["score"] for f in similarity.frame()] == [0.3, 0.31, 0.1, 0.52]
    assert np.asarray(similarity.plot().axes[0].images[0].get_array()).tolist() == [
        [0.3, 0.1],
        [0.31, 0.52],
    ]  # a row a text
    animals, _, photos, _ = drawn["examples"]
    assert [(f["query"], f["item"], f["rank"], f["right"]) for f in animals.frame()] == [
        ("3", "dog", 1, False),
        ("5", "dog", 1, True),
    ]
    assert [f["way"] for f in photos.frame()] == ["image_to_text"] * 2 + ["text_to_image"] * 2


def test_the_page_stands_alone_and_escapes_what_rows_say(html, drawn):
    page = Page(html)
    assert not {"link", "iframe", "object", "embed", "b", "i", "base", "form"} & set(page.tags)
    assert all(re.match(r"data:image/|#|report_files/[a-z0-9-]+\.(svg|csv|jsonl)$", load) for load in page.loads)
    assert not re.search(r"url\((?!#)", html)
    assert "@import" not in html
    addresses = set(re.findall(r"https?://[^\"'<> ]+", html))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}  # names, loaded by nobody
    assert len(page.ids) == len(set(page.ids))
    referred = {load[1:] for load in page.loads if load.startswith("#")} | set(re.findall(r"url\(#([^)]*)\)", html))
    assert referred <= set(page.ids)
    assert HOSTILE in page.text
    assert "<b>fish</b>" in page.text
    assert page.tags.count("svg") == sum(len(found) for name, found in drawn.items() if name != "examples")
    assert 'name="viewport"' in html


def test_the_page_says_every_number_with_its_interval_and_how_it_was_measured(html):
    text = Page(html).text
    for row in ROWS:
        if row.plain:
            assert f"{100 * row.value:.1f} % {100 * row.ci_low:.1f}–{100 * row.ci_high:.1f}" in text
    for said in ("abc123", "Some CPU", "seed 7", "torch 2.15", "partial: 60 of 1,000 images", "rows.jsonl"):
        assert said in text


def test_the_page_is_the_same_each_time(html, rows_file, tmp_path):
    assert write_report([rows_file], tmp_path).read_text() == html


def test_figures_without_rows_are_left_out(tmp_path):
    write_rows(
        tmp_path / "rows",
        [Result("A", "scan", "time_ms", 1.5, where={"batch": 8}, n=3), Result("A", "scan", "gap", math.nan)],
    )
    html = write_report([tmp_path / "rows"], tmp_path).read_text()
    page = Page(html)
    assert not {"svg", "img"} & set(page.tags)
    assert "Figures" not in page.text
    assert "batch=8 time ms n = 3 1.5" in page.text
    assert "not a number" in page.text


def test_words_say_how_well_and_who_is_ahead():
    said = dict(summary([row for row in ROWS if row.task != "train"]))
    animals = [f"{s.model} {s.text}" for s in said["Three animals"]]
    assert animals[0] == (
        "CLIP-A classifies 75.0 % of 60 images correctly (95 % interval 70.0–80.0; chance level 33.3 %; "
        "partial: 60 of 1,000 images)"
    )
    assert animals[2] == f"CLIP-A is better than {HOSTILE}: their intervals do not overlap"
    photos = [f"{s.model} {s.text}" for s in said["Photographs"]]
    assert photos[0].startswith("CLIP-A retrieves a correct caption in the top 10 for 60.0 % of 100 images")
    assert "cannot be distinguished" in photos[2]


def test_models_keep_their_look_and_can_be_told_apart_in_grey():
    looks = styles([f"m{i}" for i in range(16)])
    assert len(set(looks.values())) == 16
    assert [looks[f"m{i}"].colour for i in range(8)] == list(COLOURS)
    assert styles(["m0", "other"])["m0"] == looks["m0"]
    grey = [np.dot(ImageColor.getrgb(colour), [0.299, 0.587, 0.114]) for colour in COLOURS[:2]]
    assert abs(grey[0] - grey[1]) > 60  # of 255: the two a comparison mostly has


def test_the_last_of_several_equal_measurements_counts(tmp_path):
    write_rows(tmp_path / "a", [Result("A", "t", "top1", 0.1), Result("A", "t", "loss", 2.0, where={"step": 1})])
    write_rows(tmp_path / "b", [Result("A", "t", "top1", 0.2), Result("A", "t", "loss", 2.0, where={"step": 1})])
    store = read_store([tmp_path / "a", tmp_path / "b"])
    assert [row.value for row in store.rows] == [0.2, 2.0]
    assert store.replaced == 1
    (tmp_path / "run").mkdir()
    write_rows(tmp_path / "run" / "a", [])
    assert [s.name for s in read_store([tmp_path / "a", tmp_path / "run" / "a"]).sources][1] == "run/a"
    assert (
        "1 numbers occur more than once"
        in Page(write_report([tmp_path / "a", tmp_path / "b"], tmp_path).read_text()).text
    )


def test_two_training_runs_of_one_name_are_not_one_curve(tmp_path):
    for lr in ("lr1", "lr2"):
        write_rows(tmp_path / lr / "rows.jsonl", training("mine", float(lr[2:])), RUN | {"model": "CLIP-VMamba-Nano"})
    files = [tmp_path / lr / "rows.jsonl" for lr in ("lr1", "lr2")]
    with pytest.raises(ValueError, match=r"lr1/rows.jsonl and .*lr2/rows.jsonl are two training runs called 'mine'"):
        read_store(files)
    assert read_store([files[0], files[0]]).replaced == 0
    write_rows(files[1], training("other", 2.0), RUN | {"model": "CLIP-VMamba-Nano"})
    assert read_store(files).models == ["mine", "other"]


def test_the_readme_table_is_the_rows(rows_file, tmp_path):
    lines = [re.split(r" (?<!\\)\| ", line.strip("| ")) for line in table(ROWS).splitlines()]
    assert lines[0][:3] == ["data set", "measure", "n"]
    assert lines[2] == ["Three animals", "top-1 accuracy", "60", "75.0 % (70.0–80.0)", "60.0 % (55.0–65.0)"]
    assert lines[-1][1:] == ["images per second", "5", "150", "180"]
    assert "<script>" not in table(ROWS)
    assert r"a \| b" in table([Result("a | b", "t", "top1", 0.5)])

    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n\n<!-- results -->\nold\n<!-- /results -->\n\nThe end.\n")
    new = update_readme(readme, [rows_file])
    assert readme.read_text() == new
    assert new.startswith("# Mine\n\n<!-- results -->\n" + table(ROWS))
    assert new.endswith("<!-- /results -->\n\nThe end.\n")
    assert "CLIP-A, Three animals: partial: 60 of 1,000 images." in new
    assert "`rows.jsonl`: commit abc123, PyTorch 2.15, cpu, Some CPU, 2 cores, seed 7." in new
    assert "old" not in new
    assert update_readme(readme, [rows_file]) == new


@pytest.mark.parametrize(
    "text", ["no markers", "<!-- /results --> <!-- results -->", "<!-- results -->" * 2 + "<!-- /results -->"]
)
def test_a_readme_without_its_markers_is_left_alone(rows_file, tmp_path, text):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    with pytest.raises(ValueError, match="the table goes between"):
        update_readme(readme, [rows_file])
    assert readme.read_text() == text


def run(*words):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return command.run(parser.parse_args([str(word) for word in words]))


def test_the_command_writes_what_it_is_asked_for(rows_file, tmp_path, capsys):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- results --><!-- /results -->")
    assert run(rows_file, "--out", tmp_path / "out", "--readme", readme) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out' / 'report.html'}\n{readme}\n"
    assert "75.0 %" in readme.read_text()
    with pytest.raises(ValueError, match="nothing to write"):
        run(rows_file)


def test_bad_input_is_named(rows_file, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"rows file not found: .*nowhere\.jsonl"):
        run(tmp_path / "nowhere.jsonl", "--out", tmp_path)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with pytest.raises(ValueError, match=r"line 1: not a result row"):
        run(rows_file, tmp_path / "picture.png", "--out", tmp_path)
    write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(ValueError, match=r"no rows in .*empty\.jsonl"):
        run(tmp_path / "empty.jsonl", "--out", tmp_path)
    with pytest.raises(OSError, match=r"rows\.jsonl"):
        run(rows_file, "--out", rows_file)
    assert not list(tmp_path.glob("**/report.html*"))


HIT = {"item": "a", "score": 1.0, "right": True}


@pytest.mark.parametrize(
    ("extra", "why"),
    [
        ({"per_class": [{"name": "cat"}]}, "figure 'per_class' draws: KeyError"),
        ({"similarity": {"images": 3}}, "figure 'similarity' draws"),
        ({"kind": "classification", "chance": "low"}, "the page shows"),
        ({"image_to_text": [{"image": "1", "found": [HIT]}], "thumbnails": {}}, "the page shows"),
        (
            {"image_to_text": [{"image": "1", "truth": [], "found": [HIT]}], "thumbnails": {"1": "<"}},
            "must be a small JPEG",
        ),
        ({"image_to_text": [{"image": "1", "truth": [], "found": [HIT]}], "thumbnails": {"1": jpeg(1, 2000)}}, "2000"),
    ],
)
def test_extras_that_are_not_what_a_figure_draws_are_refused(tmp_path, extra, why):
    write_rows(tmp_path / "rows", [Result("A", "t", "top1", 0.5, extra=extra)])
    with pytest.raises(ValueError, match=why):
        write_report([tmp_path / "rows"], tmp_path)


def test_the_report_imports_no_torch():
    """In an interpreter where the package's own __init__, which registers models, is left out."""
    code = (
        "import sys, types; package = types.ModuleType('ssmclip'); "
        f"package.__path__ = [{str(Path(ssmclip.report.__file__).parents[1])!r}]; sys.modules['ssmclip'] = package; "
        "import ssmclip.report, ssmclip.cli.report; print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def table1_rows(model: str, values: dict[str, float], parameters: float = 50e6) -> list[Result]:
    extra = {"kind": "classification", "parameters": {"image": parameters, "all": 2 * parameters}}
    metric = {"pets": "mean_per_class", "hateful_memes": "roc_auc"}
    return [Result(model, task, metric.get(task, "top1"), v, n=10, extra=extra) for task, v in values.items()]


def test_table_1_stands_beside_the_published_rows(tmp_path):
    """Against the numbers of the paper, typed off here: Food-101, Pets and the averages over those two."""
    rows = table1_rows("mine", {"food101": 0.6, "pets": 0.3, "cifar10": 0.1}) + table1_rows(
        "other", {"food101": 0.1, "pets": 0.334}
    )
    comparison = table1(rows)
    lines = {line.model: line for line in comparison.lines}
    assert len(comparison.columns) == 26
    assert [line.cells[0].value for line in comparison.lines] == [48.5, 49.4, 46.5, 52.7, 50.6, 59.5, 60.0, 10.0]
    assert [line.cells[8].value for line in comparison.lines] == [30.2, 31.3, 31.0, 33.4, 28.5, 27.9, 30.0, 33.4]
    assert [line.model for line in comparison.lines if line.cells[0].best] == ["mine"]
    assert [line.model for line in comparison.lines if line.cells[8].best] == ["CLIP-SiMBA-L", "other"]
    assert (lines["mine"].wins, lines["other"].wins, comparison.shared) == (1, 1, 2)
    assert lines["mine"].average is None
    assert lines["CLIP-ViT-L"].shared == pytest.approx((59.5 + 27.9) / 2)
    assert lines["CLIP-SiMBA-L"].average == pytest.approx(36.7, abs=0.05)
    write_rows(tmp_path / "rows.jsonl", rows, RUN)
    text = Page(write_report([tmp_path / "rows.jsonl"], tmp_path).read_text()).text
    assert "Comparison with the published table" in text
    assert "arXiv:2404.19394" in text
    (picture,) = [d for d in drawings(read_store([tmp_path / "rows.jsonl"])) if d.title.startswith("Parameters")]
    assert {(p["model"], p["parameters"], round(p["average"], 2)) for p in picture.frame()} >= {
        ("mine", 50.0, 45.0), ("CLIP-VMamba-S", 50.0, 40.35), ("CLIP-ViT-L", 307.0, 43.7)}  # fmt: skip
    assert sorted(line.get_xdata()[0] for line in picture.plot().axes[0].lines) == [30, 50, 50, 50, 66.6, 84, 89, 307]
    assert table1(table1_rows("mine", {"food101": 0.6})) is None


def test_long_families_have_tables_of_their_own_with_the_rest_folded(tmp_path):
    """Each task's first number is seen, everything else is in the fold, and nothing is lost or said twice."""
    metrics = ("top1", "top5", "mean_per_class", "macro_f1")
    kinds = ("contrast", "high-pass", "low-pass", "rotation")
    about = {name: {"title": f"Digits, all, {name}", "partial": {"used": 2, "of": 3}} for name in kinds}
    rows = [
        Result(model, f"distorted/digits/{name}", metric, 0.1, where={"average": "mean over levels"}, extra=about[name])
        for model in ("A", "B")
        for name in kinds
        for metric in metrics
    ]
    rows += [Result("A", "digits", "top1", 0.9), Result("B", "digits", "top1", 0.8)]
    rows += [Result("plain", "scan", "latency_ms", 1.0)]
    rows += [Result("plain", "text", metric, 1.0) for metric in ("latency_ms", "speedup")]
    found = blocks(rows, ["A", "B", "plain"])
    assert [(block.title, block.models) for block in found] == [
        ("Digits, all, distorted", ["A", "B"]),
        ("", ["A", "B"]),
        ("", ["plain"]),
    ]
    assert [(len(block.shown), len(block.folded)) for block in found] == [(4, 12), (1, 0), (3, 0)]
    assert [(line.title, line.metric) for line in found[0].shown] == [(name, "top1") for name in kinds]
    assert [(line.title, line.metric) for line in found[0].folded] == [(k, m) for k in kinds for m in metrics[1:]]
    assert [cell.model for line in found[0].folded for cell in line.cells] == ["A", "B"] * 12
    assert notes(rows) == [(model, "Digits, all, distorted", "partial: 2 of 3 images") for model in ("A", "B")]
    single = blocks([Result("A", "scan", "latency_ms", 1.0, where={"length": n}) for n in range(20)], ["A"])
    assert [(block.title, len(block.shown), len(block.folded)) for block in single] == [("scan", 12, 8)]
    write_rows(tmp_path / "rows", rows)
    html = write_report([tmp_path / "rows"], tmp_path).read_text()
    folds = re.findall(r"<details><summary>(\d+) more</summary>(.*?)</details>", html, re.DOTALL)
    assert [(count, inside.count("<tr>")) for count, inside in folds] == [("12", 13)]
