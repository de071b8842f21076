"""The Triton kernels: the tests of every back end in Triton's interpreter, and the real sizes on a GPU."""

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import test_ssd
from ssmclip import ops
from ssmclip.ops import selective_scan
from test_ops import TOLERANCE, error, map_inputs, random_inputs, true_results, upstream_for

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
FILES = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("ops", "ssd", "causal_conv")]
# Lengths of one position, part of a chunk, several chunks; part of a block of channels and several; groups; 1 to 16
# states; both types of the state; half precision; arguments left out; no, growing and vanishing states; maps of one
# chunk and several; nothing at all.
INTERPRETED = """
    (values and ((1-24-1-1 and dtype0) or 4-9-7-4 or (1-40-49-16 and dtype1))) or (half and scan and not map)
    or (optional and (True-optional0 or False-optional4)) or large_steps_forget_and_do_not or growing or nothing
    or (four_loops and dtype0 and (3-5-24-1 or 9-8-8-1)) or (takes_any_strides and map)
    or (fewer_directions and ((dtype0 and 5-3-10-4) or silent))
    or (values and ((1-4-6-1-3 and dtype0) or (1-2-3-300-40 and dtype1))) or steps_are_clamped
    or (optional and (optional0-20 or optional4-20))
    or (padded_convolution and ((True-True and (1-4 or 70-3)) or (False-False and 3-4))) or rounded_about_once
"""


def test_the_interpreter_passes_the_tests_of_every_back_end():
    # A process of its own: Triton reads the variable where a kernel is defined.
    wanted = f"triton and ({' '.join(INTERPRETED.split())})"
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES, "-k", wanted],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr
    assert int(re.search(r"(\d+) passed", result.stdout).group(1)) >= 37


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, PyTorch sees none")
@pytest.mark.parametrize(("width", "length", "states"), [(96, 3136, 1), (768, 49, 1), (768, 197, 16), (1536, 256, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_real_sizes_equal_the_float64_loop(width, length, states, dtype):
    inputs = random_inputs(2, 1, width, length, states)
    wanted = true_results(inputs)
    given = {name: x.to("cuda", dtype).requires_grad_() for name, x in inputs.items()}
    got = selective_scan(**given, delta_softplus=True, return_last_state=True, backend="triton")
    upstream = [x.to("cuda") for x in upstream_for([x.cpu() for x in got])]
    grads = torch.autograd.grad(got, given.values(), upstream)
    again = torch.autograd.grad(
        selective_scan(**given, delta_softplus=True, return_last_state=True), given.values(), upstream
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True))
    tolerance = max(TOLERANCE[dtype], TOLERANCE[torch.float32])
    errors = [error(g.cpu(), w) for g, w in zip((*got, *grads), wanted, strict=True)]
    assert max(errors) < (tolerance if dtype == torch.float32 else 1e-2)


def real_inputs(operator):
    if operator == "cross_selective_scan":
        return map_inputs(2, 56, 56, 192, 1)
    if operator == "ssd":
        return test_ssd.random_inputs(2, 1, 24, 64, 77, 128)
    shapes = {"x": (2, 1536, 77), "weight": (1536, 4), "bias": (1536,)}
    return {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, PyTorch sees none")
@pytest.mark.parametrize("operator", ["cross_selective_scan", "ssd", "causal_conv1d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_real_sizes_equal_the_definition_in_float64(operator, dtype):
    run = functools.partial(getattr(ops, operator), **({"dt_softplus": True} if operator == "ssd" else {}))
    given = {name: x.to("cuda", dtype).requires_grad_() for name, x in real_inputs(operator).items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    results = []
    for leaves, backend in ((given, "triton"), (given, "triton"), (exact, "reference")):
        y = run(**leaves, backend=backend)
        upstream = torch.sin(torch.arange(y.numel(), device="cuda")).view(y.shape).to(y.dtype)
        results.append((y, *torch.autograd.grad(y, leaves.values(), upstream)))
    got, again, wanted = results
    assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    tolerance = 2e-5 if dtype == torch.float32 else 2e-2
    assert max(error(g, w) for g, w in zip(got, wanted, strict=True)) < tolerance


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize("gpu_here", [False, True])
def test_kernels_compile_for_a_card_that_need_not_be_there(gpu_here):
    # sm_90, at VMamba's and Mamba's sizes, through the launch the operators themselves make; nothing spilled.
    code = f"""
import json
import sys
import torch
torch.cuda.is_available = lambda: {gpu_here}
torch.cuda.get_device_name = lambda: "a card"
sys.path.insert(0, {str(BENCHMARKS)!r})
import gpu
gpu.SHAPES = {{name: gpu.SHAPES[name] for name in ("causal_conv1d", "cross_selective_scan")}}
gpu.SHAPES["cross_selective_scan"] = [], gpu.SHAPES["cross_selective_scan"][1][:1]
sys.argv = ["gpu.py", "--part", "registers"]
gpu.main()
wide = gpu.make_inputs("ssd", dict(batch=1, length=33, heads=2, width=64, state=256), torch.float32)
found = []
with gpu.Compiled(found):
    gpu.call("ssd", "triton", wide).sum().backward()
for which, counts in found:
    where = {{"operator": "ssd", "pass": which}}
    print(json.dumps(dict(where=where, metric="shared_bytes", value=counts["shared_bytes"])))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = {}
    for row in map(json.loads, done.stdout.splitlines()):
        found[row["where"]["pass"], row["where"]["operator"], row["metric"]] = row["value"]
    for operator in ("causal_conv1d", "cross_selective_scan"):
        for which in ("forward", "backward"):
            assert 0 < found[which, operator, "registers"] <= 255
            assert found[which, operator, "stack_bytes"] == 0
    for which in ("forward", "backward"):  # what a block may have on sm_86 and sm_89
        assert 0 < found[which, "ssd", "shared_bytes"] <= 101_376
