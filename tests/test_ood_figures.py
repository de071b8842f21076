"""Figures of models beside people show the rows they were given, people in the page's ink."""

import re
from dataclasses import replace

import pytest
from matplotlib.colors import same_color
from PIL import Image

from ssmclip.data.images import thumbnail
from ssmclip.report import FIGURES, drawings, read_store, write_report
from ssmclip.report.figures import humans as ood_figures
from ssmclip.report.style import INK, styles
from ssmclip.rows import Result, write_rows

SMALL = thumbnail(Image.new("RGB", (96, 96), (250, 20, 20)))
MODELS = ["A", "b <i>", "humans"]
KAPPA = {"A": 0.2, "b <i>": 0.3, "humans": 0.4}
LEVELS = {
    "contrast": ["c100", "c50", "c05"],
    "eidolonI": ["1-10-10", "64-10-10"],
    "uniform-noise": ["0.0", "0.35", "0.9"],
}
DISTORTIONS = LEVELS | {"imagenet-c/fog": ["undistorted", "1", "5"]}


def interval(value: float) -> tuple[float, float, float]:
    return value, value - 0.05, value + 0.04


def make_rows() -> list[Result]:
    rows = []
    for place, model in enumerate(MODELS):
        others = {"with": {other: 0.5 for other in MODELS[:2] if other != model}} if model != "humans" else {}
        for label in ("17 data sets", "16 data sets, without cue conflict"):
            for metric, value in (("ood_accuracy", 0.6), ("accuracy_difference", 0.1), ("observed_consistency", 0.7)):
                rows.append(Result(model, "ood", metric, *interval(value + place / 10), 99, where={"average": label}))
            rows.append(
                Result(
                    model,
                    "ood",
                    "error_consistency",
                    *interval(KAPPA[model]),
                    99,
                    where={"average": label},
                    extra={"title": "OOD"} | others,
                )
            )
        for name, levels in LEVELS.items():
            rows += [
                Result(model, f"ood/{name}", "accuracy", *interval(0.9 - i / 5 - place / 20), where={"level": level})
                for i, level in enumerate(levels)
            ]
            rows.append(Result(model, f"ood/{name}", "ood_accuracy", 0.5))
        small = {} if place else {"stimuli": {"0": SMALL}}
        rows.append(Result(model, "ood/edge", "ood_accuracy", *interval(0.3 + place / 10), 160, extra=small))
        for name, levels in DISTORTIONS.items() if model != "humans" else ():
            shown = {"stimuli": dict.fromkeys(levels, SMALL)} if not place and name != "eidolonI" else {}
            about = {"title": f"CIFAR-10, {name}", "chance": 0.1}
            task = f"distorted/cifar10/{name}"
            rows += [
                Result(
                    model,
                    task,
                    "top1",
                    *interval(0.3 - i / 20),
                    99,
                    where={"level": level},
                    extra=about | ({} if i else shown),
                )
                for i, level in enumerate(levels)
            ]
            rows.append(
                Result(model, task, "top1", *interval(0.2), 99, where={"average": "mean over levels"}, extra=about)
            )
            rows.append(
                Result(model, task, "top1_retained", 0.7, where={"average": "mean over levels"}, n=99, extra=about)
            )
        extra = {"per_category": {"cat": 0.1 + place / 10, "dog": None if place else 0.7}}
        rows.append(Result(model, "ood/cue-conflict", "shape_bias", 0.4 + place / 10, n=1280, extra=extra))
    return rows


ROWS = make_rows()


@pytest.fixture
def drawn(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS, {})
    found = drawings(read_store([tmp_path / "rows.jsonl"]))
    return {name: [one for one in found if type(one) is cls] for name, cls in FIGURES.items()}


def select(metric: str, task: str = "", condition: str = "") -> set[tuple]:
    return {
        (row.model, row.value)
        for row in ROWS
        if row.metric == metric and row.task.startswith(task) and row.condition.startswith(condition)
    }


def test_every_figure_has_these_rows(drawn):
    mine = {name for name, cls in FIGURES.items() if cls.__module__ == ood_figures.__name__}
    assert mine == {name for name, found in drawn.items() if found}


def test_accuracy_over_level_has_a_panel_for_each_set_and_a_line_for_each_model(drawn):
    one, _ = drawn["ood_accuracy_by_level"]
    assert {(p["model"], p["value"]) for p in one.frame()} == select("accuracy")
    panels = {axes.get_title(loc="left"): axes for axes in one.plot().axes}
    assert set(panels) - {""} == set(LEVELS)
    for name, levels in LEVELS.items():
        lines = {line.get_label(): line for line in panels[name].lines}
        assert set(lines) == set(MODELS)
        for model in MODELS:
            expected = [r.value for r in ROWS if (r.model, r.task, r.metric) == (model, f"ood/{name}", "accuracy")]
            assert list(lines[model].get_ydata()) == expected
        assert [tick.get_text() for tick in panels[name].get_xticklabels()] == [x.split("-")[0] for x in levels]
        assert same_color(lines["humans"].get_color(), INK)
        assert lines["A"].get_marker() != lines["b <i>"].get_marker()
        assert lines["A"].get_color() == styles(MODELS)["A"].colour
        band = panels[name].collections[0].get_paths()[0].vertices[:, 1]
        assert (band.min(), band.max()) == pytest.approx((min(lines["humans"].get_ydata()) - 0.05, 0.8 + 0.04))


def test_a_data_set_that_was_distorted_has_a_figure_of_its_own(drawn):
    _, own = drawn["ood_accuracy_by_level"]
    assert own.title == "CIFAR-10, distorted: top-1 accuracy by level of distortion"
    panels = {axes.get_title(loc="left"): axes for axes in own.plot().axes}
    assert list(panels) == list(DISTORTIONS)
    for name, levels in DISTORTIONS.items():
        lines = {line.get_label(): list(line.get_ydata()) for line in panels[name].lines}
        falling = [0.3 - i / 20 for i in range(len(levels))]
        assert [lines[model] for model in MODELS[:2]] == [falling, falling]
        assert [0.1, 0.1] in lines.values()  # guessing
        assert panels[name].get_ylim()[1] < 0.4  # low accuracies fill the panel


def test_example_stimuli_are_at_their_levels(drawn):
    published, own = drawn["stimuli"]
    assert [(cell["set"], cell["level"]) for cell in published.frame()] == [("edge", "0")]
    assert own.title == "CIFAR-10, distorted: one image per level"
    expected = [(name, level) for name in DISTORTIONS if name != "eidolonI" for level in DISTORTIONS[name]]
    assert [(cell["set"], cell["level"]) for cell in own.frame()] == expected
    shown = [axes for axes in own.plot().axes if axes.images]
    assert [axes.get_title() for axes in shown] == [level for _, level in expected]
    assert {axes.texts[0].get_text() for axes in shown if axes.texts} == set(DISTORTIONS) - {"eidolonI"}
    assert abs(shown[0].images[0].get_array()[5, 5].astype(int) - [250, 20, 20]).max() < 4
    rows = [replace(row, extra={"stimuli": {"0": "no picture"}}) for row in ROWS if "stimuli" in row.extra]
    with pytest.raises(ValueError, match="must be a small JPEG"):
        ood_figures.Stimuli("", rows, {}).plot()


def test_overall_bars_are_the_averages(drawn):
    first, second = drawn["ood_overall"]
    assert "17 data sets" in first.title
    assert "16 data sets" in second.title
    for metric, axes in zip(ood_figures.MEASURES, first.plot().axes, strict=True):
        shown = {p["model"]: p["value"] for p in first.frame() if p["metric"] == metric}
        assert set(shown.items()) == select(metric, "ood", "17")
        names = [tick.get_text() for tick in axes.get_yticklabels()]
        widths = [bar.get_width() for bar in axes.patches]
        assert dict(zip(names, widths, strict=True)) == pytest.approx(shown)


def test_the_rest_are_their_rows(drawn):
    (sets,), (bias,), (matrix,) = drawn["ood_sets"], drawn["shape_bias"], drawn["consistency_matrix"]
    assert {(p["model"], p["value"]) for p in sets.frame()} == select("ood_accuracy", "ood/edge")
    assert {(p["model"], p["all"]) for p in bias.frame()} == select("shape_bias")
    assert {(p["category"], p["shape_bias"]) for p in bias.frame() if p["model"] == "A"} == {("cat", 0.1), ("dog", 0.7)}
    cells = {(cell["model"], cell["other"]): cell["kappa"] for cell in matrix.frame()}
    assert cells["humans", "humans"] == 0.4
    assert cells["A", "humans"] == cells["humans", "A"] == 0.2
    assert cells["A", "b <i>"] == 0.5
    assert ("A", "A") not in cells
    image = matrix.plot().axes[0].images[0].get_array()
    assert image[0, 0] == 0.4


def test_the_page_shows_them_and_no_table_of_levels(tmp_path):
    write_rows(tmp_path / "rows.jsonl", ROWS, {})
    page = write_report([tmp_path / "rows.jsonl"], tmp_path).read_text()
    assert len(re.findall("<svg", page)) == 9
    assert "squared accuracy difference" in page
    assert "level=" not in page
    assert "top-1 accuracy retained above chance" in page
    assert "b <i>" not in page


def test_models_without_intervals_and_averages_are_drawn(tmp_path):
    rows = [row for row in ROWS if row.task != "ood"]
    rows += [Result("A", "ood/edge", "error_consistency", 0.2, extra={"with": {}})]
    write_rows(
        tmp_path / "rows.jsonl",
        [Result(r.model, r.task, r.metric, r.value, where=r.where, extra=r.extra) for r in rows],
    )
    found = drawings(read_store([tmp_path / "rows.jsonl"]))
    assert [type(one).__name__ for one in found] == [
        "AccuracyByLevel",
        "AccuracyByLevel",
        "Stimuli",
        "Stimuli",
        "WithoutLevels",
        "ShapeBias",
        "ConsistencyMatrix",
    ]
    assert all(one.plot().axes for one in found)
