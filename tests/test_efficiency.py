"""What is measured against what must come out: memory that is known, runs that must fail, rows that must not repeat."""

import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from ssmclip.__main__ import main
from ssmclip.analyze.cost import measure as measuring
from ssmclip.analyze.cost.efficiency import in_fresh_process, sweep
from ssmclip.analyze.cost.macs import count_macs
from ssmclip.analyze.cost.measure import Job, measure
from ssmclip.models import names as towers
from ssmclip.registry import UnknownName
from ssmclip.report import FIGURES, drawings, read_store
from ssmclip.report.figures.efficiency import crossing
from ssmclip.rows import Result, read_rows, write_rows

MEASURED = {
    "memory_mb": 100.0,
    "memory_is": "resident memory",
    "batch": {"median": 0.5, "low": 0.4, "high": 0.8, "n": 9},
    "single": {"median": 0.25, "low": 0.2, "high": 0.3, "n": 7},
    "energy_j": 12.0,
}


class Hog(nn.Module):
    """Takes 40,000,000 bytes more than its input, twice that at its peak, and gives one number."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, images):
        first = torch.ones(10_000_000)
        return (first * self.weight).sum()[None]


@pytest.fixture
def hog(monkeypatch):
    monkeypatch.setattr(towers, "build_model", lambda name, size, length: Hog())


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is exact on Linux alone")
def test_memory_is_what_the_run_takes(hog):
    found = measure(Job("hog", image_size=(8, 8), seconds=0.0))
    assert found["memory_is"] == "resident memory"
    assert found["memory_mb"] == pytest.approx(80, abs=3)
    assert found["batch"]["n"] >= 3
    assert found["batch"]["low"] <= found["batch"]["median"] <= found["batch"]["high"]


@pytest.mark.skipif(sys.platform != "linux", reason="memory is limited on Linux alone")
def test_what_does_not_fit_says_so_and_the_sweep_goes_on(tmp_path):
    settings = {"seconds": 0.0, "memory_limit": 300_000_000, "batch_size": 8}
    rows = sweep(
        {"tiny": "test_convnext"},
        [2048, 32],
        [],
        tmp_path / "rows",
        settings=settings,
        modes=["inference"],
        measure=lambda job: in_fresh_process(job) if job.image_size == (2048, 2048) else measure(job),
    )
    large, small = ([r for r in rows if r.condition == f"image={side}"] for side in (2048, 32))
    (failure,) = [row for row in large if row.metric == "fits"]
    assert failure.value == 0
    assert "out of memory" in failure.extra["why"]
    assert {row.metric for row in small} >= {"macs", "parameters", "inference_memory_mb", "latency_ms", "images_per_s"}


def test_a_killed_process_is_a_failure_with_its_reason(monkeypatch):
    monkeypatch.setattr(
        sys, "executable", "/bin/sh"
    )  # "sh -m ssmclip.analyze.cost.measure" reads its commands from a file
    assert "failed" in in_fresh_process(Job("test_vmamba", image_size=(8, 8)))


def test_rows_are_the_measurements_in_their_units(tmp_path):
    jobs = []
    rows = sweep(
        {"mine": "CLIP-ViT-Nano"},
        [96, (96, 192)],
        [77],
        tmp_path / "rows",
        settings={"batch_size": 4},
        measure=lambda job: jobs.append(job) or MEASURED,
    )
    by = {(row.condition, row.metric): row for row in rows}
    assert [(j.image_size, j.length, j.training) for j in jobs] == [
        (size, length, training)
        for size, length in [((96, 96), None), ((96, 192), None), (None, 77)]
        for training in (False, True)
    ]
    assert by["image=96", "images_per_s"].value == 4 / 0.5
    assert by["image=96", "images_per_s"].extra["low"] == 4 / 0.8
    assert by["77 tokens", "texts_per_s"].value == 4 / 0.5
    assert by["77 tokens", "training_texts_per_s"].n == 9
    assert (by["image=96", "latency_ms"].value, by["image=96", "latency_ms"].n) == (250, 7)
    assert by["image=96", "training_memory_mb"].value == 100
    assert by["image=96", "energy_j"].value == 3
    count = count_macs("CLIP-ViT-Nano", (96, 192), text_length=77)
    assert by["image=96x192", "macs"].value == count.image.total
    assert by["77 tokens", "macs"].value == count.text.total
    assert by["77 tokens", "macs"].extra["parts"]["attention"] == count.text.attention
    assert by["image=96x192", "parameters"].value + by["77 tokens", "parameters"].value + 1 == count.parameters
    assert by["image=96x192", "long_sequence_ratio"].value == pytest.approx(6 * 12 / (6 * 192))
    assert by["77 tokens", "long_sequence_ratio"].extra == {"threshold": 12 * 128, "side": None}


def test_what_is_there_is_not_measured_again(tmp_path):
    out, jobs = tmp_path / "rows", []

    def interrupted(job):
        jobs.append(job.image_size[0])
        if job.image_size[0] == 64:
            raise KeyboardInterrupt
        return MEASURED

    def run(measure):
        return sweep({"a": "test_vmamba"}, [32, 64, 96], [], out, modes=["inference"], measure=measure)

    with pytest.raises(KeyboardInterrupt):
        run(interrupted)
    run(lambda job: jobs.append(job.image_size[0]) or MEASURED)
    assert jobs == [32, 64, 64, 96]
    keys = [(row.condition, row.metric) for row in read_rows(out)[1]]
    assert len(keys) == len(set(keys)) == 3 * 6


def test_what_was_only_counted_is_measured_and_not_counted_again(tmp_path):
    out, jobs = tmp_path / "rows", []

    def measure(job):
        jobs.append(job)
        return {name: found for name, found in MEASURED.items() if name != "single" or not job.training}

    def run(modes):
        jobs.clear()
        sweep({"a": "test_vmamba"}, [32], [], out, modes=modes, measure=measure)
        return [job.training for job in jobs]

    assert [run(modes) for modes in ([], ["inference"], ["inference", "training"], ["training"])] == [
        [],
        [False],
        [True],
        [],
    ]
    keys = [row.metric for row in read_rows(out)[1]]
    assert len(keys) == len(set(keys)) == 2 + 4 + 3


def test_a_failed_mode_is_not_tried_again(tmp_path):
    jobs = []

    def run():
        measure = lambda job: jobs.append(job) or {"failed": "killed"}  # noqa: E731
        settings = {"memory_limit": 10**9}  # what is free changes by itself
        return sweep(
            {"a": "test_vmamba"}, [32], [], tmp_path / "rows", settings=settings, modes=["training"], measure=measure
        )

    run()
    assert [(row.metric, row.extra["why"]) for row in run() if row.metric == "fits"] == [("fits", "killed")]
    assert len(jobs) == 1


def test_a_size_one_model_cannot_take_is_a_row(tmp_path):
    rows = sweep({"vit": "vit_nano_patch16", "vmamba": "test_vmamba"}, [100], [], tmp_path / "rows", modes=[])
    assert [(row.model, row.metric) for row in rows][:2] == [("vit", "fits"), ("vmamba", "macs")]
    assert "must be a multiple of the patch, 16 (got 100 x 100): try 96, 112" in rows[0].extra["why"]
    models = {name: name for name in ("open_clip:RN50", "test_vit")}
    rows = sweep(models, [(64, 128)], [], tmp_path / "others", modes=[])
    assert [(row.model, row.metric) for row in rows[:2]] == [("open_clip:RN50", "fits"), ("test_vit", "macs")]
    assert "64 x 128" in rows[0].extra["why"]


@pytest.mark.parametrize(
    ("first", "then", "tried"),
    [
        ({"failed": "took more than 9 s", "timed_out": True}, {"memory_limit": 10**9}, 2),
        ({"failed": "out of memory"}, {"memory_limit": 10**9}, 1),
        ({"failed": "out of memory"}, {"memory_limit": 10**9 - 1}, 1),
        ({"failed": "out of memory"}, {"memory_limit": 10**9 + 1}, 2),
        ({"failed": "out of memory"}, {"memory_limit": 10**9, "device": "cuda"}, 2),
    ],
)
def test_what_did_not_fit_is_tried_again_where_it_may_now(first, then, tried, tmp_path):
    answers, out = iter([first, MEASURED]), tmp_path / "rows"

    def run(models, **settings):
        return sweep(models, [32], [], out, settings=settings, modes=["training"], measure=lambda job: next(answers))

    write_rows(out, [Result("a", "other task", "fits", 0.0, where={"image": 32})], {"seed": 7})
    run({"a": "test_vmamba"}, **{**then, "memory_limit": 10**9})
    rows = run({"a": "test_vmamba"}, **then)
    metrics = [(row.task, row.metric) for row in rows]
    assert len(metrics) == len(set(metrics))
    assert ("other task", "fits") in metrics
    assert (("efficiency", "fits") in metrics) == (tried == 1)
    assert (("efficiency", "training_images_per_s") in metrics) == (tried == 2)
    assert read_rows(out)[0] == {"seed": 7}


@pytest.mark.parametrize(("before", "now", "tried"), [(10, 12, 1), (10, 13, 2), (10, 5, 1)])
def test_memory_that_has_become_free_is_a_reason_to_try_again(before, now, tried, monkeypatch, tmp_path):
    free, jobs = tmp_path / "meminfo", []
    monkeypatch.setattr(measuring, "FREE_MEMORY", free)

    def run():
        measure = lambda job: jobs.append(job.memory_limit) or {"failed": "out of memory"}  # noqa: E731
        return sweep({"a": "test_vmamba"}, [32], [], tmp_path / "rows", modes=["inference"], measure=measure)

    free.write_text(f"MemTotal: 90000000 kB\nMemAvailable: {before}000000 kB\n")
    run()
    free.write_text(f"MemTotal: 90000000 kB\nMemAvailable: {now}000000 kB\n")
    (row,) = [row for row in run() if row.metric == "fits"]
    assert jobs == [before * 1024 * 900_000, now * 1024 * 900_000][:tried]
    assert row.extra["memory_limit"] == jobs[-1]


def test_a_size_a_model_could_not_take_is_counted_once_it_can(tmp_path):
    out = tmp_path / "rows"
    write_rows(out, [Result("a", "efficiency", "fits", 0.0, where={"image": 32}, extra={"why": "no such layer yet"})])
    rows = sweep({"a": "test_vmamba"}, [32], [], out, modes=[])
    assert [row.metric for row in rows] == ["macs", "parameters"]
    assert rows[0].value == count_macs("test_vmamba", 32).image.total


@pytest.mark.parametrize(("name", "other"), [("batch_size", 16), ("precision", "bfloat16"), ("device", "cuda")])
@pytest.mark.parametrize("answer", [MEASURED, {"failed": "out of memory"}])
def test_rows_of_other_settings_are_refused_before_anything_is_measured(name, other, answer, tmp_path):
    out, jobs = tmp_path / "rows", []

    def run(modes=("inference",), **settings):
        measure = lambda job: jobs.append(job) or answer  # noqa: E731
        return sweep({"a": "test_vmamba"}, [32], [], out, settings=settings, modes=modes, measure=measure)

    default = getattr(Job(""), name)
    run()
    run(**{name: default})
    with pytest.raises(ValueError, match=f"contains rows with {name} {default} instead of {other}: give another --out"):
        run(**{name: other})
    run(modes=[], **{name: other})  # counts depend on none of them
    assert len(jobs) == 1


def test_a_larger_batch_goes_on_though_latency_is_of_one_image(tmp_path):
    def run(measure):
        settings = {"batch_size": 4}
        return sweep(
            {"a": "test_vmamba"}, [32], [], tmp_path / "rows", settings=settings, modes=["inference"], measure=measure
        )

    rows = run(lambda job: MEASURED)
    assert [row.extra["batch_size"] for row in rows if row.metric == "latency_ms"] == [1]
    assert run(pytest.fail) == rows


def test_a_size_out_of_time_is_measured_by_the_next_command(tmp_path, capsys):
    out = tmp_path / "rows"
    command = ["analyze", "efficiency", "--model", "test_convnext", "--sizes", "32", "--no-training", "--out", str(out)]
    assert main([*command, "--seconds", "0", "--timeout", "0.01"]) == 0
    assert "took more than 0.01 s" in capsys.readouterr().out
    assert main([*command, "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert "images_per_s" in said
    assert "fits" not in said
    assert main([*command, "--precision", "bfloat16"]) == 1
    assert f"{out} contains rows with precision float32 instead of bfloat16" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "CLIP-VMamba-Nanno", "--lengths", "77"], "CLIP-VMamba-Nano"),
        (["--models", "test_vmamb", "--sizes", "32"], "test_vmamba"),
        (["--models", "test_vmamba", "--lengths", "0"], "must be at least 1 token (got 0)"),
        (["--models", "test_vmamba", "--sizes", "0"], "must be pixels or HEIGHTxWIDTH"),
        (
            ["--models", "test_vmamba", "--sizes", "big"],
            "image size must be pixels or HEIGHTxWIDTH, all above 0 (got 'big')",
        ),
        (["--models", "test_vmamba", "--batch-size", "0"], "at least 1"),
        (["--models", "test_vmamba,test_vmamba"], "LABEL="),
    ],
)
def test_bad_input_is_told_in_one_line(arguments, says, tmp_path, capsys):
    out = tmp_path / "rows"
    assert main(["analyze", "efficiency", *arguments, "--out", str(out), "--count-only"]) == 1
    assert says in capsys.readouterr().err
    assert not out.exists()


def test_energy_is_the_counters_difference(monkeypatch, tmp_path, hog):
    counter = tmp_path / "intel-rapl:0"
    counter.mkdir()
    (tmp_path / "intel-rapl:0:0").mkdir()
    monkeypatch.setattr(measuring, "POWER", tmp_path)
    used = iter([5e6, 11e6])
    monkeypatch.setattr(Path, "read_text", lambda self: str(next(used)))
    found = measuring._timed(lambda: None, Job("hog", seconds=0.0))
    assert found["energy_j"] == pytest.approx(6 / found["batch"]["n"])
    monkeypatch.undo()
    monkeypatch.setattr(measuring, "POWER", tmp_path / "none")
    found = measuring._timed(lambda: None, Job("hog", seconds=0.0))
    assert "energy_j" not in found
    assert found["no_energy"] == f"no counter in {tmp_path / 'none'}"


def test_energy_of_a_card_is_nvmls_counter(monkeypatch):
    used, asked = iter([2_000, 5_000]), []
    nvml = types.SimpleNamespace(
        NVMLError=type("NVMLError", (Exception,), {}),
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByUUID=asked.append,
        nvmlDeviceGetTotalEnergyConsumption=lambda card: next(used),
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="ab-cd"))
    found = measuring._timed(lambda: None, Job("hog", device="cuda:1", seconds=0.0))
    assert found["energy_j"] == pytest.approx(3 / found["batch"]["n"])
    assert asked == ["GPU-ab-cd"] * 2

    def unsupported(card):
        raise nvml.NVMLError

    nvml.nvmlDeviceGetTotalEnergyConsumption = unsupported
    assert "NVML" in measuring._timed(lambda: None, Job("hog", device="cuda:1", seconds=0.0))["no_energy"]


def test_lines_that_only_touch_do_not_cross():
    def line(*values):
        return list(zip((1, 10, 100), values, strict=True))

    flat = line(5.0, 5.0, 5.0)
    for other in (flat, line(5.0, 6.0, 7.0), line(3.0, 4.0, 5.0), line(4.0, 5.0, 4.0)):
        assert crossing(flat, other) is None
    assert crossing(flat, line(4.0, 5.0, 6.0)) == 10  # through a point of both
    # log y is a straight line from log 4 to log 9 between 1 and 10
    assert crossing(flat, line(4.0, 9.0, 9.0)) == pytest.approx(10 ** (math.log(5 / 4) / math.log(9 / 4)))


def test_figures_fit_growth_and_find_the_crossing(tmp_path):
    """a grows with the pixels, b with their square; they are equal at 512 pixels a side."""
    sides = [128, 256, 1024, 2048]
    rows = [
        Result(model, "efficiency", "macs", 3.0 * (side / 512) ** (2 * power), where={"image": side})
        for model, power in (("a", 1), ("b", 2))
        for side in sides
    ]
    rows += [Result("b", "efficiency", "macs", 5.0, where={"image": side, "attention": "plain"}) for side in sides[:2]]
    rows += [Result("a", "efficiency", "macs", float(length), where={"tokens": length}) for length in (77, 256)]
    write_rows(tmp_path / "rows", rows)
    image, text = [d for d in drawings(read_store([tmp_path / "rows"])) if type(d) is FIGURES["efficiency"]]
    assert image.growth() == pytest.approx({"a": 1, "b": 2, "b (plain attention)": 0})
    assert text.growth() == pytest.approx({"a": 1})
    assert text.crossings() == []
    found = {(c["first"], c["second"]): c["x"] for c in image.crossings()}
    assert found["a", "b"] == pytest.approx(512)
    assert found["a", "b (plain attention)"] is None
    assert {c["lower"] for c in image.crossings()} == {None, "a", "b"}  # both below 5 at the sizes they share
    axes = image.plot().axes[0]
    assert "a below b (plain attention) throughout" in axes.get_xlabel()
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "log")
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == ["a: pixels^1.00", "b: pixels^2.00", "b (plain attention): pixels^0.00"]
    np.testing.assert_allclose(axes.lines[0].get_xdata(), sides)
    assert axes.texts[0].get_text().strip() == "512"


def test_memory_side_by_side_is_that_of_climps_size(tmp_path):
    """896 pixels where they were measured, each beside the least."""
    memory = [("a", {}, (10.0, 40.0)), ("b", {}, (30.0, 200.0)), ("b", {"attention": "plain"}, (90.0, 800.0))]
    rows = [
        Result(model, "efficiency", "inference_memory_mb", value, where={"image": side, **how})
        for model, how, values in memory
        for side, value in zip((896, 1024), values, strict=True)
    ]
    rows += [Result("a", "efficiency", "training_memory_mb", 1.0, where={"image": 896})]  # nothing to compare with
    write_rows(tmp_path / "rows", rows)
    (drawn,) = [d for d in drawings(read_store([tmp_path / "rows"])) if type(d) is FIGURES["memory"]]
    assert "896" in drawn.title
    assert [(e["line"], e["value"], e["times"]) for e in drawn.frame()] == [
        ("a", 10, 1),
        ("b", 30, 3),
        ("b (plain attention)", 90, 9),
    ]
    axes = drawn.plot().axes[0]
    assert [bar.get_width() for bar in axes.patches] == [10, 30, 90]
    assert [text.get_text().strip() for text in axes.texts] == ["10", "30 (3.0x)", "90 (9.0x)"]


def test_a_clip_is_built_at_the_length_asked_for():
    with pytest.raises(UnknownName):
        towers.reads_text("vmamba_tny")
    assert towers.reads_text("open_clip:ViT-B-32")
    assert not towers.reads_text("vmamba_nano")
    long = count_macs("CLIP-VMamba-Nano", 64, text_length=1024).text
    assert long.attention == 4 * 2 * 128 * 1024**2
