"""How wide vectors are: what decides it, and that every width computes the same."""

import itertools
import json
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from ssmclip.ops import vector_width
from ssmclip.ops.vector_width import (
    VARIABLE,
    WIDTHS,
    kept,
    multiply_adds_per_s,
    vector_bytes,
    wider_if_it_pays,
    widest_register,
)


@pytest.mark.parametrize(
    ("features", "wanted"),
    [
        ({"neon": True}, 16),
        ({"sse4.2": True, "avx": True, "avx2": False}, 16),
        ({"avx": True, "avx2": True, "avx512f": False}, 32),
        ({"avx": True, "avx2": True, "avx512f": True}, 64),
        ({}, 16),
    ],
)
def test_features_bound_the_width(features, wanted):
    assert widest_register(features) == wanted


@pytest.mark.parametrize(("gain", "wanted"), [(2.0, 64), (1.6, 64), (1.1, 32), (0.9, 32)])
def test_wide_vectors_must_pay(gain, wanted):
    assert wider_if_it_pays(lambda widths: {32: 1e9, 64: gain * 1e9})[0] == wanted


@pytest.mark.parametrize("width", WIDTHS)
def test_the_environment_overrides(width):
    assert vector_bytes({VARIABLE: f" {width} "}, None) == width


@pytest.mark.parametrize("width", ["48", "64 bytes", "0", "auto", "64.0"])
def test_other_widths_are_refused_by_name(width):
    with pytest.raises(ValueError, match=rf"SSMCLIP_VECTOR_BYTES must be 16, 32 or 64 \(got '{width}'\)"):
        vector_bytes({VARIABLE: width}, None)


def test_the_choice_is_measured_once_and_kept(tmp_path, monkeypatch):
    measured = []

    def rates(widths):
        measured.append(widths)
        return {32: 1e9, 64: 2e9 / len(measured)}  # what is measured later must not count

    monkeypatch.setattr(vector_width, "widest_register", lambda features: 64)
    monkeypatch.setattr(vector_width, "multiply_adds_per_s", rates)
    assert [vector_bytes({VARIABLE: ""}, tmp_path) for _ in range(3)] == [64, 64, 64]
    assert measured == [(32, 64)]
    [file] = tmp_path.iterdir()
    assert json.loads(file.read_text())["vector_bytes"] == 64
    monkeypatch.setattr(vector_width, "widest_register", lambda features: 32)
    assert vector_bytes({}, tmp_path) == 32  # nothing to measure


@pytest.mark.parametrize("content", ["", "{", "[]", '{"vector_bytes": 48}', '{"vector_bytes": "64"}', "64"])
def test_a_broken_file_is_replaced(tmp_path, content):
    path = tmp_path / "width.json"
    path.write_text(content)
    assert kept(path, lambda: (32, {})) == 32
    assert kept(path, lambda: (64, {})) == 32


def test_of_several_the_first_decides(tmp_path):
    path, barrier, widths = tmp_path / "width.json", threading.Barrier(8), []

    def choose(width):
        def measure():
            barrier.wait()  # all find no file
            return width, {}

        widths.append(kept(path, measure))

    callers = [threading.Thread(target=choose, args=[width]) for width in (32, 64) * 4]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert len(widths) == 8
    assert set(widths) == {kept(path, lambda: (16, {}))}
    assert [p.name for p in tmp_path.iterdir()] == ["width.json"]


def test_where_nothing_can_be_kept_it_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        assert kept(tmp_path / "no folder" / "width.json", lambda: (64, {})) == 64
    assert "measured again in every process" in caplog.text


def test_the_measurement_counts_multiply_adds():
    rounds = 5
    engine, programs = vector_width._compile(WIDTHS)
    chains = [float(k) for k in range(vector_width.CHAINS)]
    for _ in range(rounds):
        chains = [0.5 * c + 1 for c in chains]
    assert [program(rounds) for program in programs.values()] == pytest.approx([sum(chains)] * 3)
    del engine


def test_a_register_of_twice_the_width_is_not_half_as_fast():
    rates = multiply_adds_per_s((16, 32, 64), turns=20)
    assert rates[16] > 1e8
    assert min(rates[32] / rates[16], rates[64] / rates[32]) > 0.7


# Numba keeps one type of vector in a process. Widths of 5, 24 and 200 channels end inside the vectors of some.
CORE = """
import sys
sys.path.insert(0, {tests!r})
import numpy as np, torch
import test_ops as ops
from ssmclip.data.distortions.kernels import blur
from ssmclip.ops import cross_selective_scan, selective_scan
from ssmclip.ops.simd import REGISTER_BYTES
assert REGISTER_BYTES == {width}
torch.set_num_threads(1)
results = {{}}
def save(name, **tensors):
    results.update({{f"{{name}} {{k}}": t.detach().numpy() for k, t in tensors.items()}})
for case in [(1, 5, 37, 1), (2, 24, 70, 16), (1, 200, 33, 3)]:
    inputs = ops.random_inputs(2, *case)
    leaves = ops.as_leaves(inputs, torch.float32)
    got = selective_scan(**leaves, delta_softplus=True, return_last_state=True, backend="cpu")
    grads = torch.autograd.grad(got, leaves.values(), ops.upstream_for(got))
    for g, w in zip((*got, *grads), ops.true_results(inputs), strict=True):
        assert ops.error(g, w) < ops.TOLERANCE[torch.float32], (case, ops.error(g, w))
    save(case, y=got[0], last=got[1], **dict(zip(leaves, grads)))
for case in [(5, 3, 24, 1), (4, 6, 200, 40)]:
    inputs = ops.map_inputs(2, *case)
    exact, leaves = ops.as_leaves(inputs), ops.as_leaves(inputs, torch.float32)
    wanted, got = ops.map_truth(**exact), cross_selective_scan(**leaves, backend="cpu")
    upstream = torch.sin(torch.arange(wanted.numel(), dtype=torch.float64)).view(wanted.shape)
    grads = torch.autograd.grad(got, leaves.values(), upstream.float())
    for g, w in zip((got, *grads), (wanted, *torch.autograd.grad(wanted, exact.values(), upstream)), strict=True):
        assert ops.error(g, w) < ops.TOLERANCE[torch.float32], (case, ops.error(g, w))
    save(case, y=got, **dict(zip(leaves, grads)))
greys = np.random.default_rng(0).random((1, 9, 21))
save("blur", y=torch.from_numpy(blur(greys, np.array([0.4, 0.2, 0.1]), 0.5)))
np.savez({out!r}, **results)
"""


@pytest.fixture(scope="module")
def by_width(tmp_path_factory):
    """The results of a process of each width, which are compared there with a loop in float64."""
    folder, results = tmp_path_factory.mktemp("widths"), {}
    for width in WIDTHS:
        code = CORE.format(tests=str(Path(__file__).parent), width=width, out=str(folder / f"{width}.npz"))
        environment = os.environ | {VARIABLE: str(width)}
        run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        results[width] = dict(np.load(folder / f"{width}.npz"))
    return results


def test_every_width_computes_the_same(by_width):
    """Bit for bit, but for sums over channels."""
    for (_, a), (_, b) in itertools.combinations(by_width.items(), 2):
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith((" B", " C")):
                assert np.linalg.norm(a[name] - b[name]) <= 1e-6 * np.linalg.norm(a[name]), name
            else:
                np.testing.assert_array_equal(a[name], b[name], err_msg=name)
