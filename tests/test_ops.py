"""The operators over all back ends, against a loop in float64 written here and autograd through it."""

import functools
import importlib.util
import math
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch.autograd import forward_ad

from ssmclip.ops import (
    BACKENDS,
    available,
    causal_conv1d,
    cross_merge,
    cross_scan,
    cross_selective_scan,
    selective_scan,
    ssd,
    threads,
    using,
)
from ssmclip.ops.dispatch import choose
from ssmclip.registry import UnknownName

if os.environ.get("TRITON_INTERPRET") == "1":  # see test_triton.py
    import triton_interpreter

    triton_interpreter.install()


def on_the_cpu(op):
    return [name for name, backend in BACKENDS[op].items() if not backend.why_not("cpu")]


SCANS = on_the_cpu("selective_scan")
CROSS = on_the_cpu("cross_selective_scan")
# Relative error allowed, in the Euclidean norm of a whole tensor.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OPTIONAL = ("D", "z", "delta_bias")


def truth(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    """(y, last state) in float64, one channel group at a time, straight from the recurrence."""
    batch, dim, length = u.shape
    groups = B.shape[1]
    ys, states = [], []
    for g in range(groups):
        c = slice(g * dim // groups, (g + 1) * dim // groups)
        step = delta[:, c] if delta_bias is None else delta[:, c] + delta_bias[c, None]
        step = torch.logaddexp(step, torch.zeros(())) if delta_softplus else step
        h = torch.zeros(batch, dim // groups, A.shape[1], dtype=u.dtype)
        y = []
        for t in range(length):
            drive = torch.einsum("bd,bn->bdn", step[..., t] * u[:, c, t], B[:, g, :, t])
            h = torch.exp(torch.einsum("bd,dn->bdn", step[..., t], A[c])) * h + drive
            y.append(torch.einsum("bdn,bn->bd", h, C[:, g, :, t]))
        ys.append(torch.stack(y, -1))
        states.append(h)
    y = torch.cat(ys, 1)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * z / (1 + torch.exp(-z))
    return y, torch.cat(states, 1)


def random_inputs(batch, groups, width, length, states, optional=OPTIONAL, seed=0):
    """float64 inputs whose values bfloat16 holds exactly, so that only the arithmetic can differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().double()

    dim = groups * width
    inputs = {
        "u": draw(batch, dim, length),
        "delta": draw(batch, dim, length) - 1,
        "A": (-torch.exp(draw(dim, states))).bfloat16().double(),
        "B": draw(batch, groups, states, length),
        "C": draw(batch, groups, states, length),
        "D": draw(dim),
        "z": draw(batch, dim, length),
        "delta_bias": draw(dim),
    }
    return {k: v.bfloat16().double() for k, v in inputs.items() if k not in OPTIONAL or k in optional}


def as_leaves(inputs, dtype=torch.float64):
    return {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}


def error(got, wanted):
    wanted = wanted.detach().double()
    return float((got.detach().double() - wanted).norm() / wanted.norm())


def upstream_for(outputs):
    return [torch.sin(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t.dtype) for t in outputs]


def true_results(inputs, softplus=True):
    """y, the last state and all gradients, in float64."""
    exact = as_leaves(inputs)
    wanted = truth(**exact, delta_softplus=softplus)
    return (*wanted, *torch.autograd.grad(wanted, exact.values(), upstream_for(wanted)))


@functools.cache
def true_results_of(*case):
    return true_results(random_inputs(*case))


def compare(scan, inputs, dtype, backend, softplus=True, wanted=None):
    """Largest relative error over y, the last state and all gradients, with the name of where it is."""
    given = as_leaves(inputs, dtype)
    got = scan(**given, delta_softplus=softplus, return_last_state=True, backend=backend)
    grads = torch.autograd.grad(got, given.values(), upstream_for(got))
    wanted = wanted or true_results(inputs, softplus)
    names = ["y", "last", *("grad of " + k for k in inputs)]
    return max((error(g, w), n) for n, g, w in zip(names, (*got, *grads), wanted, strict=True))


# ---- selective_scan


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize(
    ("groups", "width", "length", "states"),
    [
        *[(1, 24, 1, 1), (4, 9, 7, 4), (1, 40, 49, 16), (4, 50, 49, 1), (4, 8, 197, 16), (1, 200, 196, 4)],
        *[(1, 800, 7, 1), (1, 90, 49, 64)],  # so wide that the CPU kernels add the gradients of B and C over blocks
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_float64_loop(backend, groups, width, length, states, dtype):
    case = 2, groups, width, length, states
    worst, where = compare(selective_scan, random_inputs(*case), dtype, backend, wanted=true_results_of(*case))
    assert worst < TOLERANCE[dtype], where


@pytest.mark.parametrize("backend", [b for b in SCANS if b != "reference"])
@pytest.mark.parametrize("states", [1, 16])
def test_long_sequences_stay_accurate(backend, states):
    case = 1, 1, 8, 3136, states
    wanted = true_results_of(*case)
    worst, where = compare(selective_scan, random_inputs(*case), torch.float32, backend, wanted=wanted)
    assert worst < TOLERANCE[torch.float32], where


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_state(backend, dtype):
    inputs = random_inputs(1, 1, 16, 70, 4)
    given = {k: v.to(dtype) for k, v in inputs.items()}
    y, last = selective_scan(**given, delta_softplus=True, return_last_state=True, backend=backend)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    wanted, wanted_last = truth(**{k: v.double() for k, v in given.items()}, delta_softplus=True)
    assert error(y, wanted) < TOLERANCE[dtype]
    assert error(last, wanted_last) < TOLERANCE[torch.float32]
    worst, where = compare(selective_scan, inputs, dtype, backend)
    assert worst < 1e-2, where


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize("optional", [(), ("D",), ("z",), ("delta_bias",), ("D", "delta_bias")])
@pytest.mark.parametrize("softplus", [False, True])
def test_every_optional_argument_can_be_left_out(backend, optional, softplus):
    inputs = random_inputs(2, 2, 12, 20, 4, optional)
    if not softplus:
        inputs["delta"] = inputs["delta"].abs()
        if "delta_bias" in inputs:
            inputs["delta_bias"] = inputs["delta_bias"].abs()
    worst, where = compare(selective_scan, inputs, torch.float32, backend, softplus)
    assert worst < TOLERANCE[torch.float32], where


def test_one_group_may_come_without_its_dimension():
    inputs = random_inputs(2, 1, 8, 11, 4)
    flat = {**inputs, "B": inputs["B"][:, 0], "C": inputs["C"][:, 0]}
    assert torch.equal(selective_scan(**flat), selective_scan(**inputs))


@pytest.mark.parametrize("backend", SCANS)
def test_strides_do_not_matter(backend):
    inputs = random_inputs(2, 2, 16, 40, 4)
    reversed_memory = {
        k: v.permute(*range(v.ndim)[::-1]).contiguous().permute(*range(v.ndim)[::-1]) for k, v in inputs.items()
    }
    every_other = {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in inputs.items()}
    channels_last = {
        k: v.transpose(-1, -2).contiguous().transpose(-1, -2) if v.ndim > 2 else v for k, v in inputs.items()
    }
    for strided in (reversed_memory, every_other, channels_last):
        worst, where = compare(_with_strides_of(strided), inputs, torch.float64, backend)
        assert worst < 1e-12, where
    expanded = {**inputs, "u": inputs["u"][:1].expand(2, -1, -1), "B": inputs["B"][..., :1].expand(-1, -1, -1, 40)}
    wanted, _ = truth(**{k: v.clone() for k, v in expanded.items()}, delta_softplus=True)
    assert error(selective_scan(**expanded, delta_softplus=True, backend=backend), wanted) < 1e-12


def _with_strides_of(strided):
    def scan(*, delta_softplus, return_last_state, backend, **inputs):
        laid_out = {}
        for name, x in inputs.items():
            memory = torch.empty_strided(x.shape, strided[name].stride(), dtype=x.dtype)
            laid_out[name] = memory.copy_(x)
        options = {"delta_softplus": delta_softplus, "return_last_state": return_last_state, "backend": backend}
        return selective_scan(**laid_out, **options)

    return scan


@pytest.mark.parametrize("backend", SCANS)
def test_the_future_changes_nothing(backend):
    inputs = {k: v.float() for k, v in random_inputs(1, 1, 16, 100, 4).items()}
    before = selective_scan(**inputs, delta_softplus=True, backend=backend)
    for name in ("u", "delta", "B", "C", "z"):
        inputs[name] = inputs[name].clone()
        inputs[name][..., 61:] = 7.0
    after = selective_scan(**inputs, delta_softplus=True, backend=backend)
    assert torch.equal(before[..., :61], after[..., :61])
    assert not torch.equal(before[..., 61:], after[..., 61:])


@pytest.mark.parametrize("backend", SCANS)
def test_large_steps_forget_and_do_not_overflow(backend):
    # delta A = -1e4 per step: h is delta B u exactly, y = C B u delta; and the gradients are finite.
    inputs = random_inputs(1, 1, 8, 40, 4, optional=())
    inputs["delta"] = torch.full_like(inputs["delta"], 1e4)
    inputs["A"] = torch.full_like(inputs["A"], -1.0)
    leaves = as_leaves(inputs, torch.float32)
    y = selective_scan(**leaves, backend=backend)
    wanted = 1e4 * inputs["u"] * (inputs["B"] * inputs["C"]).sum(2)
    assert error(y, wanted) < 1e-5
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), leaves.values()))


@pytest.mark.parametrize("backend", SCANS)
def test_growing_states_reach_infinity_and_nan_is_passed_on(backend):
    inputs = {k: v.float() for k, v in random_inputs(1, 1, 16, 12, 2, optional=()).items()}
    grow = {**inputs, "A": torch.ones_like(inputs["A"]), "delta": torch.full_like(inputs["delta"], 40.0)}
    grow |= {"u": torch.ones_like(inputs["u"]), "B": torch.ones_like(inputs["B"]), "C": torch.ones_like(inputs["C"])}
    y = selective_scan(**grow, backend=backend)
    assert torch.isfinite(y[..., :3]).all()
    assert torch.isposinf(y[..., 3:]).all()
    for name in ("u", "delta", "B", "A"):
        spoiled = {**inputs, name: inputs[name].clone()}
        spoiled[name].view(-1)[0] = math.nan
        y = selective_scan(**spoiled, delta_softplus=True, backend=backend)
        assert torch.isnan(y[0, 0, 1:]).all(), name
        assert torch.isfinite(y[0, 8:] if name in ("u", "delta", "A") else y[..., :0]).all(), name


@pytest.mark.parametrize("backend", SCANS)
def test_nan_in_a_channel_does_not_hide_the_decay_of_another(backend):
    # Channels 0 and 8 share a lane of the kernel's registers, which choose their exponential by the largest step.
    delta = torch.full((1, 16, 20), 0.001)
    delta[0, 0, 2], delta[0, 8, 5] = 1.0, math.nan
    ones, A = torch.ones(1, 1, 1, 20), torch.full((16, 1), -500.0)
    y = selective_scan(torch.ones(1, 16, 20), delta, A, ones, ones, backend=backend)
    assert torch.isnan(y[0, 8, 5:]).all()
    torch.testing.assert_close(y[0, 0, 2], torch.tensor(1.0))  # exp(-500) of the state before is nothing


@pytest.mark.parametrize("backend", SCANS)
def test_a_state_of_nothing_stays_nothing_beside_growth_without_bound(backend):
    # exp(40 * 25) is beyond float64 too: whoever multiplies an empty state by it says NaN.
    u = torch.zeros(1, 8, 100)
    u[..., 60:] = 1.0
    ones = torch.ones(1, 1, 2, 100)
    y = selective_scan(u, torch.full_like(u, 40.0), torch.ones(8, 2), ones, ones, backend=backend)
    assert not y[..., :60].any()
    assert torch.equal(y[..., 60], torch.full((1, 8), 80.0))
    assert torch.isposinf(y[..., 65:]).all()


@pytest.mark.parametrize("backend", SCANS)
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(backend, batch, length):
    leaves = as_leaves(random_inputs(batch, 2, 8, length, 4), torch.float32)
    y, last = selective_scan(**leaves, return_last_state=True, backend=backend)
    assert y.shape == (batch, 16, length)
    assert torch.equal(last, torch.zeros(batch, 16, 4))
    grads = torch.autograd.grad(y.sum(), leaves.values(), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_scan_equals_the_original_code(shared):
    fixture = torch.load(shared / "parity" / "ops.pt")["selective_scan"]
    for backend in SCANS:
        y = selective_scan(**fixture["inputs"], delta_softplus=True, backend=backend)
        assert error(y, fixture["output"]) < 1e-12


# ---- derivatives of derivatives


def test_second_derivatives_of_the_automatic_choice():
    leaves = as_leaves(random_inputs(1, 2, 2, 4, 2))

    def scan(*inputs):
        return selective_scan(*inputs, delta_softplus=True, return_last_state=True)

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(scan, tuple(leaves.values()))


@pytest.mark.parametrize("backend", SCANS)
def test_hessian_vector_products_in_float32(backend):
    inputs = random_inputs(2, 1, 8, 30, 4)

    def product(scan, leaves):
        # u feeds delta as well: the derivative has to take both ways.
        y = scan(**{**leaves, "delta": leaves["delta"] + leaves["u"]})
        grads = torch.autograd.grad((y**2).mean() * 1e2, leaves.values(), create_graph=True)
        along = sum((g * torch.cos(torch.arange(g.numel()).view(g.shape))).sum() for g in grads)
        return torch.autograd.grad(along, leaves.values())

    wanted = product(lambda **x: truth(**x, delta_softplus=True)[0], as_leaves(inputs))
    got = product(
        lambda **x: selective_scan(**x, delta_softplus=True, backend=backend), as_leaves(inputs, torch.float32)
    )
    assert max(error(g, w) for g, w in zip(got, wanted, strict=True)) < 1e-4


def test_third_derivatives_agree():
    def third(backend):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(1, 4, 10).requires_grad_()
        other = {k: v for k, v in random_inputs(1, 1, 4, 10, 2, ()).items() if k not in ("u", "delta")}
        value = (selective_scan(x, 2 * x, **other, delta_softplus=True, backend=backend) ** 2).mean()
        for _ in range(3):
            (value,) = torch.autograd.grad((value**2).mean(), x, create_graph=True)
        return value

    assert error(third("cpu"), third("reference")) < 1e-9


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # PyTorch's own call, at the first tangent
@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
@pytest.mark.parametrize("op", list(BACKENDS))
def test_forward_mode_and_function_transforms(op):
    """Registered operators have no tangents: PyTorch takes zeros for them."""
    draw = functools.partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    scan, charts = random_inputs(1, 1, 3, 6, 2), map_inputs(1, 2, 3, 3, 2)
    x, function = {
        "selective_scan": (scan.pop("u"), functools.partial(selective_scan, **scan, delta_softplus=True)),
        "cross_selective_scan": (charts.pop("x"), functools.partial(cross_selective_scan, **charts)),
        "causal_conv1d": (draw(1, 3, 6), functools.partial(causal_conv1d, weight=draw(3, 4))),
        "ssd": (
            draw(1, 6, 2, 3),
            functools.partial(ssd, dt=draw(1, 6, 2).exp(), A=-draw(2).exp(), B=draw(1, 6, 1, 2), C=draw(1, 6, 1, 2)),
        ),
    }[op]  # all of them linear in x
    direction, weights = draw(x.shape), draw(function(x).shape)
    along = function(direction, backend="reference")
    assert error(torch.func.jvp(function, (x,), (direction,))[1], along) < 1e-12
    with forward_ad.dual_level():
        y = function(forward_ad.make_dual(x, direction))
        assert error(forward_ad.unpack_dual(y).tangent, along) < 1e-12
    gradient = torch.func.grad(lambda x: (function(x) * weights).sum())(x)
    assert (gradient * direction).sum() == pytest.approx((along * weights).sum().item(), rel=1e-12)
    both = torch.stack([x, direction])
    assert error(torch.vmap(function)(both)[1], along) < 1e-12
    with pytest.raises(RuntimeError, match="'cpu' cannot run here: it has no derivative"):
        torch.func.jvp(functools.partial(function, backend="cpu"), (x,), (direction,))


# ---- maps

SQUARES = [(1, 1), (3, 5), (7, 4), (1, 6), (5, 1)]
# height, width, channels, states
CHARTS = [(1, 1, 8, 1), (3, 5, 24, 1), (7, 4, 10, 16), (1, 40, 16, 4), (9, 8, 8, 1), (14, 9, 200, 1)]


def sequences_by_hand(x, directions=4):
    """(batch, channels, height, width) -> (batch, directions, channels, length), one position at a time."""
    _, _, height, width = x.shape
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    orders = {4: (rows, columns, rows[::-1], columns[::-1]), 2: (rows, rows[::-1]), 1: (rows,)}[directions]
    return torch.stack([torch.stack([x[:, :, i, j] for i, j in order], -1) for order in orders], 1)


@pytest.mark.parametrize(("height", "width"), SQUARES)
@pytest.mark.parametrize("directions", [4, 2, 1])
def test_cross_scan_reads_its_orders_and_merge_is_its_transpose(height, width, directions):
    x = torch.randn(2, 3, height, width, dtype=torch.float64)
    assert torch.equal(cross_scan(x, directions), sequences_by_hand(x, directions))
    y = torch.randn(2, directions, 3, height * width, dtype=torch.float64)
    # <scan x, y> = <x, merge y>
    assert torch.allclose((cross_scan(x, directions) * y).sum(), (x * cross_merge(y, height, width)).sum(), rtol=1e-12)


def test_cross_scan_and_merge_equal_the_original_code(shared):
    fixtures = torch.load(shared / "parity" / "ops.pt")
    assert torch.equal(cross_scan(fixtures["cross_scan"]["input_bchw"]), fixtures["cross_scan"]["output_b4cl"])
    y = fixtures["cross_merge"]["input_b4chw"]
    merged = cross_merge(y.flatten(3), *y.shape[3:])
    assert error(merged.flatten(2), fixtures["cross_merge"]["output_bcl"]) < 1e-14


def map_inputs(batch, height, width, dim, states, optional=("D", "delta_bias"), directions=4):
    generator = torch.Generator().manual_seed(1)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(batch, height, width, dim),
        "delta": draw(batch, directions, height, width, dim) - 1,
        "A": -torch.exp(draw(directions, dim, states)),
        "B": draw(batch, directions, height, width, states),
        "C": draw(batch, directions, height, width, states),
        "D": draw(directions, dim),
        "delta_bias": draw(directions, dim),
    }
    return {k: v for k, v in inputs.items() if k in optional or k not in ("D", "delta_bias")}


def low_rank(inputs, rank):
    """The same maps with a delta of so many numbers for each position, and its matrices."""
    generator = torch.Generator().manual_seed(2)
    batch, k, height, width, dim = inputs["delta"].shape
    delta = torch.randn(batch, k, height, width, rank, generator=generator, dtype=torch.float64)
    return inputs | {"delta": delta, "delta_weight": torch.randn(k, dim, rank, generator=generator).double() / rank}


def map_truth(x, delta, A, B, C, D=None, delta_bias=None, delta_weight=None):
    """The sequences, as many as A has directions, and `truth` on each."""
    total = 0
    if delta_weight is not None:
        delta = torch.einsum("bkhwr,kdr->bkhwd", delta, delta_weight)
    positions = torch.arange(x.shape[1] * x.shape[2]).view(1, 1, *x.shape[1:3])
    orders = sequences_by_hand(positions, len(A))[0, :, 0]
    for k, order in enumerate(orders):
        u, d = (t.flatten(1, 2)[:, order].transpose(1, 2) for t in (x, delta[:, k]))
        b, c = (t[:, k].flatten(1, 2)[:, order].transpose(1, 2)[:, None] for t in (B, C))
        bias = None if delta_bias is None else delta_bias[k]
        y, _ = truth(u, d, A[k], b, c, None if D is None else D[k], None, bias, True)
        back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        total = total + y[..., back].transpose(1, 2).unflatten(1, x.shape[1:3])
    return total


@pytest.mark.parametrize("backend", CROSS)
@pytest.mark.parametrize(("height", "width", "dim", "states"), CHARTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_map_scan_equals_four_loops(backend, height, width, dim, states, dtype):
    given_whole = map_inputs(2, height, width, dim, states)
    for inputs in (given_whole, map_inputs(2, height, width, dim, states, ()), low_rank(given_whole, 3)):
        exact, given = as_leaves(inputs), as_leaves(inputs, dtype)
        wanted, got = map_truth(**exact), cross_selective_scan(**given, backend=backend)
        upstream = torch.sin(torch.arange(wanted.numel(), dtype=torch.float64)).view(wanted.shape)
        wanted_grads = torch.autograd.grad(wanted, exact.values(), upstream)
        grads = torch.autograd.grad(got, given.values(), upstream.to(dtype))
        errors = [error(g, w) for g, w in zip((got, *grads), (wanted, *wanted_grads), strict=True)]
        assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", CROSS)
@pytest.mark.parametrize("directions", [2, 1])
@pytest.mark.parametrize(("height", "width", "dim", "states"), [(1, 1, 8, 1), (5, 3, 10, 4), (9, 8, 24, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fewer_directions_are_as_many_loops(backend, directions, height, width, dim, states, dtype):
    whole = map_inputs(2, height, width, dim, states, directions=directions)
    for inputs in (whole, low_rank(whole, 3)):
        exact, given = as_leaves(inputs), as_leaves(inputs, dtype)
        wanted, got = map_truth(**exact), cross_selective_scan(**given, backend=backend)
        upstream = torch.sin(torch.arange(wanted.numel(), dtype=torch.float64)).view(wanted.shape)
        wanted_grads = torch.autograd.grad(wanted, exact.values(), upstream)
        grads = torch.autograd.grad(got, given.values(), upstream.to(dtype))
        errors = [error(g, w) for g, w in zip((got, *grads), (wanted, *wanted_grads), strict=True)]
        assert max(errors) < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", CROSS)
@pytest.mark.parametrize("directions", [2, 1])
def test_fewer_directions_are_the_four_with_the_others_silent(backend, directions):
    """A direction whose C and D are zero adds nothing: all four scan, and only those of the rows are heard."""
    four = map_inputs(2, 5, 6, 16, 2)
    heard = [0, 2][:directions]
    silent = [k for k in range(4) if k not in heard]
    for name, axis in (("C", 1), ("D", 0)):
        four[name] = four[name].index_fill(axis, torch.tensor(silent), 0.0)
    few = {k: v[:, heard] if k in ("delta", "B", "C") else v if k == "x" else v[heard] for k, v in four.items()}
    wanted = cross_selective_scan(**four, backend=backend)
    assert error(cross_selective_scan(**few, backend=backend), wanted) < 1e-14


@pytest.mark.parametrize("backend", CROSS)
def test_map_scan_takes_any_strides(backend):
    inputs = map_inputs(2, 5, 6, 16, 2)
    wanted = cross_selective_scan(**inputs, backend="reference")
    inputs["x"] = inputs["x"].permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    inputs["delta"] = inputs["delta"].transpose(0, 1).contiguous().transpose(0, 1)
    inputs["B"] = inputs["B"].permute(0, 2, 3, 1, 4).contiguous().permute(0, 3, 1, 2, 4)
    inputs["C"] = inputs["C"].transpose(2, 3).contiguous().transpose(2, 3)
    assert error(cross_selective_scan(**inputs, backend=backend), wanted) < 1e-12


@pytest.mark.parametrize("backend", CROSS)
def test_a_map_of_one_column_may_have_any_strides(backend):
    def columns_apart(x):
        """The same numbers, contiguous for PyTorch: the stride of an axis of one column is anything."""
        return x.transpose(-2, -3).clone(memory_format=torch.contiguous_format).transpose(-2, -3)

    inputs = map_inputs(2, 9, 1, 8, 4)
    exact = as_leaves(inputs)
    given = {k: columns_apart(v).requires_grad_() if k in ("x", "delta", "B", "C") else v for k, v in exact.items()}
    wanted, got = map_truth(**exact), cross_selective_scan(**given, backend=backend)
    weights = torch.cos(torch.arange(wanted.numel(), dtype=torch.float64)).view(2, 1, 9, 8)
    grads, wanted_grads = (
        torch.autograd.grad((y.transpose(1, 2) * weights).sum(), leaves.values())
        for y, leaves in ((got, given), (wanted, exact))
    )
    assert error(got, wanted) < 1e-12
    assert max(error(g, w) for g, w in zip(grads, wanted_grads, strict=True)) < 1e-12


@pytest.mark.parametrize("directions", [4, 2, 1])
def test_map_scan_has_second_derivatives(directions):
    leaves = as_leaves(map_inputs(1, 2, 3, 2, 2, directions=directions))
    assert torch.autograd.gradcheck(cross_selective_scan, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(cross_selective_scan, tuple(leaves.values()))


def test_map_scan_with_a_projected_step_has_second_derivatives():
    leaves = as_leaves(low_rank(map_inputs(1, 2, 3, 2, 2), 1))

    def scan(*tensors):
        *tensors, weight = tensors
        return cross_selective_scan(*tensors, True, weight)

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(scan, tuple(leaves.values()))


def test_a_batch_in_many_parts_is_what_its_elements_are():
    inputs = low_rank(map_inputs(11, 20, 20, 160, 1), 5)  # 2 MB of delta each in float64: parts of 4
    leaves = as_leaves(inputs)
    y = cross_selective_scan(**leaves)
    grads = dict(zip(leaves, torch.autograd.grad(y.sin().sum(), leaves.values()), strict=True))
    per_image = ("x", "delta", "B", "C")
    sums = {k: torch.zeros_like(v) for k, v in inputs.items() if k not in per_image}
    for i in range(11):
        one = {k: v[i : i + 1] if k in per_image else v for k, v in inputs.items()}
        one["delta"] = torch.einsum("bkhwr,kdr->bkhwd", one["delta"], one.pop("delta_weight")).requires_grad_()
        wanted = cross_selective_scan(**one)
        assert error(y[i : i + 1], wanted) < 1e-13
        above = torch.autograd.grad(wanted.sin().sum(), one["delta"])[0]
        wanted_low_rank = torch.einsum("bkhwd,kdr->bkhwr", above, inputs["delta_weight"])
        assert error(grads["delta"][i : i + 1], wanted_low_rank) < 1e-12
        sums["delta_weight"] += torch.einsum("bkhwd,bkhwr->kdr", above, inputs["delta"][i : i + 1])
        sums["delta_bias"] += above.sum((0, 2, 3))
    assert error(grads["delta_weight"], sums["delta_weight"]) < 1e-12
    assert error(grads["delta_bias"], sums["delta_bias"]) < 1e-12


def test_map_scan_of_half_precision():
    inputs = map_inputs(1, 6, 6, 16, 1)
    y = cross_selective_scan(**{k: v.bfloat16() for k, v in inputs.items()})
    exact = {k: v.bfloat16().double() for k, v in inputs.items()}
    assert y.dtype == torch.bfloat16
    assert error(y, map_truth(**exact)) < 1e-2


# ---- threads, processes, compilers, memory


def in_threads(count, function):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("team", [True, False], ids=["PyTorch's threads", "Python's threads"])
def test_every_task_is_done_once_and_errors_come_back(team, monkeypatch):
    if not team:
        monkeypatch.setattr(threads, "_teams", [])
    elif not any(threads._teams):
        pytest.skip("no OpenMP library here to share threads with")
    done, who = [], set()

    def work(first, last):
        done.extend(range(first, last))
        who.add(threading.get_native_id())
        time.sleep(0.02)  # so that there is something left for the others

    def fail(first, last):
        raise ZeroDivisionError(f"task {first}")

    in_threads(3, lambda: threads.run_tasks(work, 100, True))
    assert sorted(done) == list(range(100))
    assert len(who) == 3
    with pytest.raises(ZeroDivisionError, match="task"):
        in_threads(3, lambda: threads.run_tasks(fail, 100, True))
    in_threads(3, lambda: threads.run_tasks(work, 7, True))
    assert sorted(done[100:]) == list(range(7))


def test_the_number_of_threads_changes_no_bit():
    scan_inputs = random_inputs(2, 2, 300, 200, 8)
    map_leaves = low_rank(map_inputs(2, 20, 20, 400, 1), 4)

    def everything():
        leaves, maps = as_leaves(scan_inputs, torch.float32), as_leaves(map_leaves, torch.float32)
        y = selective_scan(**leaves, delta_softplus=True)
        m = cross_selective_scan(**maps)
        return (
            y,
            m,
            *torch.autograd.grad(y.sin().sum(), leaves.values()),
            *torch.autograd.grad(m.sum(), maps.values()),
        )

    once = in_threads(1, everything)
    for again in (in_threads(1, everything), in_threads(2, everything), in_threads(3, everything)):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


def test_several_python_threads_may_call_at_once():
    inputs = {k: v.float() for k, v in random_inputs(2, 2, 300, 200, 8).items()}
    wanted = selective_scan(**inputs, delta_softplus=True)
    results = []

    def call():
        results.extend(selective_scan(**inputs, delta_softplus=True) for _ in range(3))

    threads = [threading.Thread(target=call) for _ in range(4)]
    in_threads(2, lambda: [t.start() for t in threads] and [t.join() for t in threads])
    assert len(results) == 12
    assert all(torch.equal(y, wanted) for y in results)


FORK = """
import os, torch
from ssmclip.ops import selective_scan
torch.set_num_threads(2)
f = torch.randn
inputs = f(2, 600, 200), f(2, 600, 200), -f(600, 8).exp(), f(2, 1, 8, 200), f(2, 1, 8, 200)
wanted = selective_scan(*inputs, delta_softplus=True)
child = os.fork()
if child == 0:
    # Bytes, not torch.equal: PyTorch's own threads hang in a forked child.
    again = selective_scan(*inputs, delta_softplus=True).numpy().tobytes()
    os._exit(0 if again == wanted.numpy().tobytes() else 1)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""

COMPILE = """
import torch
from ssmclip.ops import cross_selective_scan, selective_scan

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(16, 4))
        self.mix = torch.nn.Linear(16, 24)
    def forward(self, x):
        delta, B, C = self.mix(x.transpose(1, 2)).transpose(1, 2).split([16, 4, 4], dim=1)
        y = selective_scan(x, delta, self.A, B[:, None], C[:, None], delta_softplus=True)
        maps = [t.unflatten(2, (5, 6)).permute(0, 2, 3, 1) for t in (y, delta, B, C)]
        four = [t[:, None].expand(-1, 4, -1, -1, -1) for t in maps[1:]]
        return cross_selective_scan(maps[0], four[0], self.A.expand(4, -1, -1), four[1], four[2])

torch.manual_seed(0)
layer = Layer()
x = torch.randn(2, 16, 30)
wanted = layer(x)
wanted.sin().sum().backward()
grads = [p.grad.clone() for p in layer.parameters()]
for backend in ("eager", "aot_eager"):
    layer.zero_grad()
    got = torch.compile(layer, fullgraph=True, backend=backend)(x)
    assert torch.equal(got, wanted), backend
    got.sin().sum().backward()
    assert all(torch.allclose(p.grad, g, rtol=1e-5, atol=1e-6) for p, g in zip(layer.parameters(), grads)), backend
program = torch.export.export(layer, (x,))
assert torch.equal(program.module()(x), wanted)
assert "ssmclip.selective_scan" in str(program.graph) and "ssmclip.cross_selective_scan" in str(program.graph)
"""

MEMORY = """
import resource, torch
from ssmclip.ops import selective_scan
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def inputs(batch, dim, length, states):
    f = torch.randn
    shapes = [(batch, dim, length)] * 2 + [(dim, states)] + [(batch, 1, states, length)] * 2
    return [(-f(s).exp() if len(s) == 2 else f(s)).requires_grad_() for s in shapes]
selective_scan(*inputs(1, 16, 8, STATES), delta_softplus=True).sum().backward()
before = peak()
tensors = inputs(2, 1536, 1568, STATES)
y = selective_scan(*tensors, delta_softplus=True)
y.backward(torch.ones(()).expand_as(y))
size = 4 * (y.numel() + sum(t.numel() for t in tensors))
print((peak() - before) / size)
"""


def run_python(code):
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_forked_process_scans_too():
    run_python(FORK)


def test_compiled_and_exported_modules_hold_the_operators_whole():
    run_python(COMPILE)


@pytest.mark.parametrize("states", [1, 16])
def test_peak_memory_is_below_three_times_inputs_and_outputs(states):
    assert float(run_python(MEMORY.replace("STATES", str(states)))) < 3


# opcheck itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_operators_keep_pytorchs_rules():
    leaves = as_leaves(random_inputs(1, 2, 8, 12, 4), torch.float32)
    torch.library.opcheck(torch.ops.ssmclip.selective_scan.default, (*leaves.values(), True, True, True))
    maps = as_leaves(map_inputs(1, 3, 4, 8, 1), torch.float32)
    torch.library.opcheck(torch.ops.ssmclip.cross_selective_scan.default, (*maps.values(), None, True, True))
    maps = as_leaves(low_rank(map_inputs(2, 3, 4, 8, 1), 2), torch.float32)
    torch.library.opcheck(torch.ops.ssmclip.cross_selective_scan.default, (*maps.values(), True, True))
    maps = as_leaves(low_rank(map_inputs(2, 3, 4, 8, 1, directions=1), 2), torch.float32)
    torch.library.opcheck(torch.ops.ssmclip.cross_selective_scan.default, (*maps.values(), True, True))


# ---- choice and errors


def test_using_forces_a_back_end_and_gives_the_choice_back():
    inputs = {k: v.float() for k, v in random_inputs(1, 1, 8, 30, 4).items()} | {"delta_softplus": True}
    free = selective_scan(**inputs)
    with using("reference"):
        forced = selective_scan(**inputs)
        assert torch.equal(selective_scan(**inputs, backend="cpu"), free)
    assert torch.equal(forced, selective_scan(**inputs, backend="reference"))
    assert not torch.equal(forced, free)
    assert torch.equal(selective_scan(**inputs), free)


def test_unknown_back_ends_name_the_known_ones():
    inputs = random_inputs(1, 1, 8, 3, 2)
    with pytest.raises(UnknownName, match="known: auto, chunked, cpu, reference, triton"):
        selective_scan(**inputs, backend="cuda")
    with pytest.raises(UnknownName, match="did you mean 'reference'"), using("referense"):
        pass


def test_a_table_says_what_exists_and_why_not():
    assert {why for _, name, _, why in available("cpu") if name != "triton"} == {""}
    on_cpu = {(op, name): (exists, why) for op, name, exists, why in available("cpu")}
    assert on_cpu["selective_scan", "triton"] == (False, "runs on cuda, not on cpu")
    rows = {(op, name): (exists, why) for op, name, exists, why in available("cuda")}
    assert rows["selective_scan", "cpu"] == (False, "runs on cpu, not on cuda")
    assert rows["selective_scan", "chunked"] == (True, "")
    here = {(op, name): (exists, why) for op, name, exists, why in available()}
    assert here["selective_scan", "cpu"] == (True, "")
    assert here["selective_scan", "triton"] == ((True, "") if torch.cuda.is_available() else (False, "no GPU"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(9, 4)}, r"A must have shape \(8, 4\)"),
        ({"delta": torch.zeros(1, 8, 4)}, r"delta must have shape \(1, 8, 5\)"),
        ({"C": torch.zeros(1, 1, 3, 5)}, "C must have shape"),
        ({"B": torch.zeros(1, 3, 4, 5)}, r"groups of B must divide .* \(got 3\)"),
        ({"D": torch.zeros(7)}, "D must have shape"),
        ({"delta_bias": torch.zeros(8, dtype=torch.int64)}, "floating point"),
        ({"D": torch.zeros(8, device="meta")}, r"D must be on .* \(got meta\)"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    inputs = random_inputs(1, 1, 8, 5, 4) | change
    # Not through the shape-checked signature, which tests check and production does not.
    with pytest.raises(ValueError, match=message):
        getattr(selective_scan, "__wrapped__", selective_scan)(**inputs)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.complex64, torch.int32])
@pytest.mark.parametrize("backend", ["auto", *SCANS])
def test_a_type_no_back_end_takes_is_an_error(dtype, backend):
    maps = {name: x.to(dtype) for name, x in map_inputs(1, 2, 3, 4, 1).items()}
    lines = {name: x.to(dtype) for name, x in random_inputs(1, 1, 8, 5, 4).items()}
    with pytest.raises(ValueError, match=r"\(float16, bfloat16, float32, float64; got torch"):
        getattr(selective_scan, "__wrapped__", selective_scan)(**lines, backend=backend)
    with pytest.raises(ValueError, match=r"\(float16, bfloat16, float32, float64; got torch"):
        getattr(cross_selective_scan, "__wrapped__", cross_selective_scan)(**maps, backend=backend)


@pytest.mark.parametrize("op", BACKENDS)
def test_a_gpu_without_triton_takes_plain_pytorch(op, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "triton" else find(name, *a))
    assert choose(BACKENDS[op], "auto", "cuda") is BACKENDS[op]["chunked"].run
    with pytest.raises(RuntimeError, match=r"triton is not installed \(pip install triton\).*chunked"):
        choose(BACKENDS[op], "triton", "cuda")
    why = {(name, exists): why for operator, name, exists, why in available("cuda") if operator == op}
    assert why["triton", False] == "triton is not installed (pip install triton)"


@pytest.mark.parametrize("backend", CROSS)
@pytest.mark.parametrize("shape", [(2, 0, 5), (2, 4, 0), (0, 3, 4)])
def test_a_map_of_nothing_gives_nothing(backend, shape):
    leaves = as_leaves(map_inputs(*shape, 8, 2), torch.float32)
    y = cross_selective_scan(**leaves, backend=backend)
    assert y.shape == (*shape, 8)
    grads = torch.autograd.grad(y.sum(), leaves.values(), allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


def test_other_numbers_of_directions_are_an_error():
    says = r"directions must be 4, 2, 1 \(got 3\)"
    with pytest.raises(ValueError, match=says):
        cross_scan(torch.zeros(1, 1, 2, 2), 3)
    with pytest.raises(ValueError, match=says):
        cross_merge(torch.zeros(1, 3, 1, 4), 2, 2)
    with pytest.raises(ValueError, match=says):
        cross_selective_scan(**map_inputs(1, 2, 3, 4, 1, directions=3))
    two = map_inputs(1, 2, 3, 4, 1, directions=2) | {"D": torch.zeros(4, 4, dtype=torch.float64)}
    with pytest.raises(ValueError, match=r"D must have shape \(2, 4\)"):
        getattr(cross_selective_scan, "__wrapped__", cross_selective_scan)(**two)


def test_merging_the_wrong_size_is_an_error():
    with pytest.raises(ValueError, match=r"map 2 x 4 \(got 6"):
        cross_merge(torch.zeros(1, 4, 1, 6), 2, 4)
