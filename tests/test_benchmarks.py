"""What the benchmarks decide and count, apart from what they time."""

import importlib.util
import math
import resource
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.stats import binom

from ssmclip.config.overrides import changed_fields
from ssmclip.evaluate.statistics.paired import marked
from ssmclip.ops import selective_scan
from ssmclip.ops.memory import LARGE_PAGE, NEVER_KEPT, PAGE, want_large_pages
from ssmclip.rows import Result, read_rows, write_rows
from ssmclip.rows.condition import CASE, SEED, parse

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.fixture(scope="module")
def scan():
    with imported("scan") as module:
        yield module


@pytest.fixture(scope="module")
def gpu():
    with imported("gpu") as module:
        yield module


@contextmanager
def imported(name):
    sys.path.insert(0, str(BENCHMARKS))  # as for a script, whose folder is the first
    try:
        spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))
        sys.modules.pop(name)


def test_bytes_of_a_scan_are_those_of_its_tensors(scan):
    inputs = scan.make_inputs(scan.Shape(2, 24, 64, 16))
    y = selective_scan(**inputs, delta_softplus=True)
    streamed = sum(inputs[name].nbytes for name in ("u", "delta", "B", "C")) + y.nbytes
    assert scan.scan_work(2, 24, 64, 16, backward=False).bytes == streamed
    leaves = [x.requires_grad_() for x in inputs.values()]
    y = selective_scan(**inputs, delta_softplus=True)
    saved = next(x for x in y.grad_fn.saved_tensors if x is not None and x.shape == (2, 2, 16, 24))
    grads = dict(zip(inputs, torch.autograd.grad(y, leaves, torch.ones_like(y)), strict=True))
    again = sum(inputs[name].nbytes + grads[name].nbytes for name in ("u", "delta", "B", "C")) + y.nbytes
    both = scan.scan_work(2, 24, 64, 16, backward=True).bytes
    assert both == streamed + again + 2 * saved.nbytes


def test_slow_peers_run_once_and_hopeless_ones_not_at_all(scan):
    small, large = scan.Shape(1, 8, 100, 16), scan.Shape(1, 8, 400, 16)
    forecast = scan.Forecast()
    assert forecast.seconds("loop", True, small) == 0
    forecast.add("loop", True, small, 2.0)
    assert forecast.seconds("loop", True, large) == 2.0 * 4 * 4  # each step's gradient is as long as the sequence
    assert "would take about 32 s" in scan.left_out("loop", large, True, 3.0, forecast)
    assert scan.left_out("loop", large, True, 4.0, forecast) == ""  # not ten times the best
    assert scan.left_out("loop", large, True, math.inf, forecast) == ""  # nothing else to compare with
    assert "GiB of memory" in scan.left_out("mambapy", scan.Shape(10**6, 1000, 1000, 16), False, 1.0, forecast)
    assert scan.repetitions_of(0.5, 1.0, 7) == (7, "")
    assert scan.repetitions_of(3.0, 1.0, 7) == (3, "")
    assert scan.repetitions_of(0.5, 0.04, 7)[0] == 1
    assert scan.repetitions_of(11.0, math.inf, 7)[0] == 1


def test_a_benchmark_knows_what_its_rows_tell(scan):
    shape = scan.SHAPES[0]
    row = scan.Result("loop", "scan", "latency_ms", 1500.0, where=parse(shape.condition(True))[0], n=1)
    absent = scan.Result("mambapy", "scan", "latency_ms", math.nan, where=parse(shape.condition(True))[0], n=0)
    forecast = scan.Forecast()
    forecast.remember([row, absent], scan.SHAPES)
    assert forecast.seconds("loop", True, shape) == 1.5
    assert forecast.seconds("mambapy", True, shape) == 0


@pytest.mark.parametrize("card", ["NVIDIA H200", "none: Triton's interpreter"])
def test_every_card_has_a_file_of_its_own(gpu, card, monkeypatch, tmp_path):
    """On a machine with a GPU everything is measured, though the interpreter's rows are there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gpu, "GPU", card == "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: card)
    monkeypatch.setattr(gpu, "in_fresh_process", lambda part, seconds: [Result(part, "gpu", "ran", 1.0)])
    interpreted = [Result(part, "gpu", "ran", 1.0) for part in gpu.PARTS]
    write_rows("results/gpu.jsonl", interpreted, {"card": "none: Triton's interpreter"})
    before = Path("results/gpu.jsonl").read_bytes()
    monkeypatch.setattr(sys, "argv", ["gpu.py"])
    gpu.main()
    gpu.main()
    assert Path("results/gpu.jsonl").read_bytes() == before
    if card != "NVIDIA H200":
        assert [path.name for path in Path("results").iterdir()] == ["gpu.jsonl"]
        return
    run, rows = read_rows("results/gpu_nvidia_h200.jsonl")
    assert (run["card"], [row.model for row in rows]) == (card, list(gpu.PARTS))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", "results/gpu.jsonl"])
    with pytest.raises(SystemExit, match=r"another card \(none: .* this is NVIDIA H200: give another --out"):
        gpu.main()


@pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(), reason="this system has no large pages to give"
)
def test_new_memory_comes_in_large_pages():
    x = torch.empty(32 * LARGE_PAGE // 4)  # more than an allocator keeps for later
    want_large_pages(x)
    assert page_faults(lambda: x.fill_(1)) < x.nbytes / PAGE / 4


def page_faults(run) -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


FAULTS_OF_TENSORS = """
import resource, torch
from ssmclip.ops.memory import keep_freed_memory
def page_faults(count):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(count):
        torch.ones({elements})
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(int(keep_freed_memory()), page_faults(32), page_faults(16))
"""


def test_freed_memory_is_kept_for_the_next_tensor():
    # In a process of its own: where an allocation has failed before, glibc turns to memory that it does not keep.
    code = FAULTS_OF_TENSORS.format(elements=2 * NEVER_KEPT // 4)  # twice as many bytes as are kept without asking
    kept, _, faults = map(int, subprocess.check_output([sys.executable, "-c", code]).split())
    if not kept:
        pytest.skip("this C library has no mallopt")
    assert faults < 10  # an aligned block needs more room than one leaves: the first ones leave several behind


@pytest.fixture(scope="module")
def pair():
    with imported("controlled_pair") as module:
        yield module


def test_runs_of_the_controlled_pair_differ_in_one_field_each(pair):
    base = pair.config_of(pair.VMAMBA, pair.ALL, 0)
    fields = {"colour augmentation": "data.augment.colors", "moving average": "ema.decay"}
    fields["gathered gradients"] = "loss.gather_with_grad"
    for part, field in fields.items():
        assert list(changed_fields(base, pair.config_of(pair.VMAMBA, f"without {part}", 0))) == [field]
    assert sorted(changed_fields(base, pair.config_of(pair.VMAMBA, pair.NONE, 0))) == sorted(fields.values())
    for encoder in (pair.NO_SCAN, pair.VIT):
        assert list(changed_fields(base, pair.config_of(encoder, pair.ALL, 2))) == ["seed", "model.name"]
    folders = {pair.folder_of(Path(), encoder, condition, seed) for seed, encoder, condition in pair.every_run()}
    assert len(folders) == 45


def made_up(pair, seeds):
    """Rows of 1,000 images: a VMamba has the first 130 right or 150, a ViT 60 or 100, without all parts and with."""
    for seed in seeds:
        for encoder, (least, most) in {pair.VMAMBA: (130, 150), pair.NO_SCAN: (130, 150), pair.VIT: (60, 100)}.items():
            for condition in pair.CONDITIONS:
                right = torch.arange(1000) < (most if condition == pair.ALL else least)
                where = {CASE: condition, SEED: seed}
                extra = marked(right, [str(i) for i in range(1000)])
                value = right.float().mean().item()
                yield Result(encoder, pair.TASK, pair.METRIC, value, n=1000, where=where, extra=extra)


def test_the_recipes_share_is_the_vits_gain_over_the_published_lead(pair, tmp_path):
    """A lead of 150 - 60 images, of which the ViT gains 40 by the recipe. Of 40 of 1,000 images in which two models
    differ the interval is binomial."""
    file = tmp_path / "rows.jsonl"
    write_rows(file, made_up(pair, (0, 2)))
    pair.compare(file)
    pair.compare(file)  # replaces what it has made
    rows = [row for row in read_rows(file)[1] if row.task == pair.COMPARED]
    assert len(rows) == 3 * 4 + 2 * 7
    value = {(row.model, row.where[CASE], row.metric): row for row in rows}
    lead = value[pair.VMAMBA, pair.PUBLISHED, pair.DIFFERENCE]
    assert (lead.value, lead.against) == (pytest.approx(0.09), pair.VIT)
    share = value[pair.VMAMBA, pair.PUBLISHED, pair.SHARE]
    assert share.value == pytest.approx(40 / 90)
    assert share.ci_low < 40 / 90 < share.ci_high
    assert value[pair.VMAMBA, "all, for both", pair.DIFFERENCE].value == pytest.approx(0.05)
    gain = value[pair.VIT, "with all, minus with none", pair.DIFFERENCE]
    assert (gain.value, gain.against, gain.extra) == (pytest.approx(0.04), "", {"seeds": 2})
    edges = binom.ppf([0.025, 0.975], 1000, 0.04) / 1000
    assert (gain.ci_low, gain.ci_high) == pytest.approx(tuple(edges), abs=0.0011)
    part = value[pair.VMAMBA, "with moving average, minus without", pair.DIFFERENCE]
    assert part.value == pytest.approx(0.02)


def test_spread_between_seeds_widens_the_interval(pair):
    """Two seeds, one all right and one all wrong: the mean of two draws is 0, 1/2 or 1."""
    means = pair.Means.of({("a", "b"): np.array([[1] * 50, [0] * 50]), ("c", "d"): np.zeros((2, 50))})
    row = means.difference(("a", "b"), ("c", "d"), "x")
    assert (row.value, row.ci_low, row.ci_high) == pytest.approx((0.5, 0.0, 1.0))


def test_the_controlled_pair_needs_a_whole_seed(pair, tmp_path):
    file = tmp_path / "rows.jsonl"
    write_rows(file, list(made_up(pair, [0]))[1:])
    with pytest.raises(ValueError, match=r"must have all 15 runs of a seed \(got 14 runs\): measure first"):
        pair.compare(file)


def test_a_run_whose_rows_are_there_is_not_done_again(pair, tmp_path, shared, monkeypatch, capsys):
    runs = [(0, pair.VIT, pair.NONE), (0, pair.VIT, "without moving average")]
    monkeypatch.setattr(pair, "every_run", lambda: runs[:1])
    monkeypatch.setenv("SSMCLIP_DATA", str(shared / "data"))
    changes = ["steps=2", "warmup_steps=1", "batch_size=8", "image_sizes=[[0,16]]", "device=cpu"]
    out, where = tmp_path / "rows.jsonl", tmp_path / "runs"
    pair.measure(where, out, changes)
    first = out.read_bytes()
    monkeypatch.setattr(pair, "every_run", lambda: runs)
    with monkeypatch.context() as killed:
        killed.setattr(pair, "Study", None)  # after training
        with pytest.raises(TypeError):
            pair.measure(where, out, changes)
    assert out.read_bytes() == first
    pair.measure(where, out, changes)
    pair.measure(where, out, changes)
    assert out.read_bytes().startswith(first)
    assert capsys.readouterr().out.count("seed 0:") == 2
    rows = read_rows(out)[1]
    assert [(row.where[CASE], row.metric) for row in rows] == [
        (condition, metric) for _, _, condition in runs for metric in pair.METRICS
    ]
    assert all(row.n and row.where[SEED] == 0 for row in rows)
    with pytest.raises(ValueError, match=r"must be of runs with --set \[\] \(got \['steps=2'"):
        pair.measure(where, out)
