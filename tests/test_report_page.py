"""The report's page as its readers use it: names that attack it, its files, and a browser."""

import base64
import csv
import hashlib
import io
import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import test_ood_figures
import test_report
from ssmclip.report import FIGURES, drawings, read_store, write_report
from ssmclip.report.figures.overview import Overview
from ssmclip.rows import Result, write_rows
from test_report import Page, jpeg, table1_rows

ATTACK = (
    "<script>alert(1)<\\script> \"><img src=x onerror=alert(1)> ' onload='alert(1) --> ]]> </style></svg> {{7*7}} "
    "javascript:alert(1) &lt;b&gt; $x$ \x01 currentColor <!--"
)
KEPT = ("kind", "judge")  # words that decide how a row is shown: with others there would be no figure
NAMES_AS_KEYS = ("thumbnails", "stimuli", "per_category", "with")


def costly(model: str, top1: float, parameters: int, macs: int | None, task: str = "imagenet") -> Result:
    extra = {
        "kind": "classification",
        "judge": "classifier",
        "image_size": [224, 224],
        "parameters": {"image": parameters, "all": parameters},
        "title": f"Title of {task}",
    }
    more = {"macs": macs} if macs else {}
    return Result(model, task, "top1", top1, top1 - 0.03, top1 + 0.04, 1000, extra=extra | more)


def looked_at(model: str) -> Result:
    maps = [{"title": "map", "values": [[0.0, 1.0], [0.5, 0.2]]}]
    shown = {"query": "a cat", "name": "cat.jpg", "method": "rollout", "picture": jpeg(9), "span": None, "maps": maps}
    return Result(model, "saliency", "target_score", 0.5, extra={"saliency": shown})


def make_rows() -> list[Result]:
    """Rows of every kind of figure, table and note."""
    rows = [*test_report.ROWS, *test_ood_figures.ROWS, looked_at("A")]
    rows += table1_rows("A", {"food101": 0.6, "pets": 0.3})
    for place, model in enumerate(("A", "B")):
        rows += [costly(model, 0.5 + place / 10, 5_000_000 + 1_000_000 * place, 1_000_000_000 + place)]
        rows += [Result(model, "efficiency", "inference_memory_mb", 10.0 + place, where={"image": 896})]
        rows += [Result(model, "efficiency", "latency_ms", 10.0 + n, where={"tokens": n}) for n in (77, 256)]
    noted = {"doubts": ["a doubt"], "said": "a remark", "same_names": ["cat", "cats"], "unreadable": 2}
    return [*rows, Result("A", "noted", "odd_metric", 0.5, extra=noted | {"title": "Noted"})]


def attacked(value, key: str = ""):
    """Return the value with the attack in every text, but for pictures and KEPT."""
    if isinstance(value, dict):
        name = attacked if key in NAMES_AS_KEYS else str
        return {name(k): attacked(v, k) for k, v in value.items()}
    if isinstance(value, list):
        return [attacked(item, key) for item in value]
    if isinstance(value, str) and key not in KEPT and not value.startswith("/9j/"):
        return f"{value} {ATTACK}"
    return value


def attacking(row: Result) -> Result:
    metric = f"{row.metric} {ATTACK}" if row.metric == "odd_metric" else row.metric
    task = f"{row.task} {ATTACK}" if row.task in ("animals", "photos", "noted") else row.task
    model = row.model if row.model == "humans" else f"{row.model} {ATTACK}"
    names = {key: attacked(value) for key, value in row.where.items() if key in ("level", "average", "tower")}
    return replace(row, model=model, task=task, metric=metric, where=row.where | names, extra=attacked(row.extra))


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> dict[str, Path]:
    """The page of harmless rows, and of the same with the attack in every name."""
    written = {}
    for name, rows in (("harmless", make_rows()), ("attacked", [attacking(row) for row in make_rows()])):
        folder = tmp_path_factory.mktemp(name)
        run = {"commit": "abc", "device": "cpu", "cpu": "Some CPU", "cores": 2, "versions": {"torch": "2.15"}}
        write_rows(folder / "in.jsonl", rows, run if name == "harmless" else attacked(run))
        written[name] = write_report([folder / "in.jsonl"], folder)
    return written


def test_names_that_attack_change_nothing_but_text(pages):
    shown = {type(drawn) for drawn in drawings(read_store([pages["attacked"].parent / "in.jsonl"]))}
    assert shown == {cls for _, cls in FIGURES.items()}
    harmless, page = (Page(pages[name].read_text()) for name in ("harmless", "attacked"))
    assert set(page.tags) == set(harmless.tags)
    counted = ("script", "img", "image", "a", "style", "svg", "figure", "table", "meta", "button", "details")
    assert {tag: page.tags.count(tag) for tag in counted} == {tag: harmless.tags.count(tag) for tag in counted}
    assert page.tags.count("script") == 1
    assert "<script>alert(1)<\\script>" in page.text
    assert "{{7*7}}" in page.text
    assert len(page.ids) == len(set(page.ids))
    referred = {load[1:] for load in page.loads if load.startswith("#")}
    assert referred <= set(page.ids)


def test_only_the_pages_own_script_may_run(pages):
    html = pages["attacked"].read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    assert f"script-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy.replace("style-src 'unsafe-inline'", "")


@pytest.mark.parametrize("name", ["harmless", "attacked"])
def test_every_link_leads_to_a_file_and_every_figure_has_its_numbers(pages, name):
    folder = pages[name].with_name("report_files")
    linked = [load for load in Page(pages[name].read_text()).loads if not load.startswith(("#", "data:"))]
    assert Counter(linked) == Counter(f"report_files/{file.name}" for file in folder.iterdir())
    assert all(re.fullmatch(r"[a-z0-9-]+\.(svg|csv|jsonl)", file.name) for file in folder.iterdir())
    for file in folder.glob("*.svg"):
        root = ElementTree.parse(file).getroot()
        parts = [part.tag.rpartition("}")[2] for part in root.iter()]
        assert not {"script", "foreignObject", "a", "img"} & set(parts)
        assert not [key for part in root.iter() for key in part.attrib if key.startswith("on")]
        assert "var(" not in file.read_text()
    found = drawings(read_store([folder.with_name("in.jsonl")]))
    tables = [
        list(csv.DictReader(io.StringIO(file.read_bytes().decode(), newline=""))) for file in folder.glob("*.csv")
    ]
    expected = [[{k: "" if v is None else str(v) for k, v in e.items()} for e in d.frame()] for d in found]
    assert sorted(map(str, tables)) == sorted(map(str, expected))


def test_the_rows_can_be_downloaded_whole(pages):
    folder = pages["attacked"].parent
    assert read_store([folder / "report_files" / "rows.jsonl"]).rows == read_store([folder / "in.jsonl"]).rows
    first = json.loads((folder / "report_files" / "rows.jsonl").read_text().splitlines()[0])
    assert first["run"]["files"]["in.jsonl"]["commit"].startswith("abc")


def test_files_are_the_same_each_time(pages, tmp_path):
    write_report([pages["attacked"].parent / "in.jsonl"], tmp_path)
    for file in sorted(tmp_path.rglob("*.*")):
        assert file.read_bytes() == (pages["attacked"].parent / file.relative_to(tmp_path)).read_bytes()


def test_the_overview_compares_models_on_what_all_of_them_were_measured_on(tmp_path):
    rows = [
        costly("A", 0.6, 5_000_000, 400_000_000),
        costly("B", 0.4, 7_000_000, None),
        costly("C", 0.2, 9_000_000, None, "cifar10"),
    ]
    rows += [costly("A", 0.9, 5_000_000, None, "cifar10"), costly("A", 0.1, 5_000_000, None, "dtd")]
    rows += [costly("B", 0.3, 7_000_000, None, "dtd")]
    rows += [costly(model, 1.0, 5_000_000, None, "linear:dtd") for model in "AB"]
    rows += [Result("D", "imagenet", "top1", 0.99, extra={"kind": "classification"})]
    write_rows(tmp_path / "rows", rows)
    (overview,) = [drawn for drawn in drawings(read_store([tmp_path / "rows"])) if isinstance(drawn, Overview)]
    assert overview.title == "Accuracy against cost: mean of 2 data sets"
    points = [(p["model"], p["accuracy"], p["parameters_m"], p["gmacs"], p["ci_low"]) for p in overview.frame()]
    assert points == [("A", pytest.approx(0.35), 5.0, 0.4, None), ("B", pytest.approx(0.35), 7.0, None, None)]
    parameters, macs = overview.plot().axes
    assert [line.get_xdata().tolist() for line in parameters.lines] == [[5.0], [7.0]]
    assert [list(line.get_xdata()) for line in macs.lines] == [[0.4], []]


def test_an_overview_of_one_model_or_of_odd_costs_is_left_out(tmp_path):
    odd = costly("B", 0.4, 7_000_000, None)
    for parameters in ({}, {"parameters": {"all": 3}}, {"parameters": {"image": -1}}, {"parameters": 5}):
        extra = {"kind": "classification"} | parameters
        write_rows(tmp_path / "rows", [costly("A", 0.6, 5_000_000, 400_000_000), replace(odd, extra=extra)])
        assert not [d for d in drawings(read_store([tmp_path / "rows"])) if isinstance(d, Overview)]


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize(("models", "repeats"), [(1, 12), (40, 1)])
def test_no_layout_collapses_under_long_or_many_names(tmp_path, models, repeats):
    """A legend that the layout had to fit into the figure would leave no room for its axes."""
    names = [f"m{i} x-" * repeats for i in range(models)]
    rows = [row for name in names for row in test_report.training(name, 5.0)]
    rows += [replace(row, model=row.model * repeats) for row in test_ood_figures.ROWS if "level" in row.where]
    write_rows(tmp_path / "rows.jsonl", rows)
    assert write_report([tmp_path / "rows.jsonl"], tmp_path).stat().st_size < 1_000_000


def columns(table, place: int) -> list[str]:
    return [" ".join(text.split()) for text in table.locator(f"tbody td:nth-child({place})").all_inner_texts()]


def test_in_a_browser_tables_sort_the_theme_changes_and_no_attack_runs(pages, browser):
    asked, wrong = [], []
    tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("dialog", lambda dialog: wrong.append(dialog.message))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.goto(f"{pages['attacked'].as_uri()}#figures")
    assert 0 <= tab.locator("#figures").bounding_box()["y"] < 900

    ground = "getComputedStyle(document.body).backgroundColor"
    assert tab.evaluate(ground) == "rgb(255, 255, 255)"
    text = "getComputedStyle(document.querySelector('figure svg text')).fill"
    inks = [tab.evaluate(text)]
    tab.click("#theme")
    assert tab.evaluate(ground) == "rgb(20, 23, 27)"
    inks.append(tab.evaluate(text))
    assert np.diff([int(re.search(r"\d+", ink)[0]) for ink in inks]) > 150  # dark on light, light on dark
    tab.click("#theme")
    assert tab.evaluate(ground) == "rgb(255, 255, 255)"

    table = tab.locator("table").first
    head = table.locator("thead th").nth(2)
    head.locator("button").click()
    values = [float(re.match("[-0-9.,]+", text)[0].replace(",", "")) for text in columns(table, 3) if text]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) > 2
    assert columns(table, 3)[-1] == "" or all(columns(table, 3))
    assert all(columns(table, 1))  # a sorted line says what it is of
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    table.locator("thead button").first.click()
    assert head.get_attribute("aria-sort") is None
    assert columns(table, 1) == tab.evaluate(
        "names => [...names].sort((a, b) => a.localeCompare(b))", columns(table, 1)
    )
    assert not wrong
    assert not [url for url in asked if not url.startswith(("file:", "data:"))]
