"""Mamba-2's scan over all back ends, against a loop in float64 written here and autograd through it."""

import functools
import math
import os
import subprocess
import sys

import pytest
import torch

from ssmclip.ops import BACKENDS, ssd

if os.environ.get("TRITON_INTERPRET") == "1":  # see test_triton.py
    import triton_interpreter

    triton_interpreter.install()

SSD = [name for name, backend in BACKENDS["ssd"].items() if not backend.why_not("cpu")]
FAST = [b for b in SSD if b != "reference"]
# Relative error allowed, in the Euclidean norm of a whole tensor.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
OPTIONAL = ("D", "z", "dt_bias", "initial_states")


def truth(x, dt, A, B, C, D=None, z=None, dt_bias=None, initial_states=None, softplus=True, limit=(0.0, math.inf)):
    """(y, last state), one head at a time, straight from the recurrence."""
    heads, groups = x.shape[2], B.shape[2]
    ys, states = [], []
    for head in range(heads):
        group = head * groups // heads
        step = dt[..., head] if dt_bias is None else dt[..., head] + dt_bias[head]
        step = torch.logaddexp(step, torch.zeros(())) if softplus else step
        step = step.clamp(*limit)
        h = torch.zeros(x.shape[0], x.shape[3], B.shape[3], dtype=x.dtype)
        h = h if initial_states is None else initial_states[:, head]
        y = []
        for t in range(x.shape[1]):
            drive = torch.einsum("b,bp,bn->bpn", step[:, t], x[:, t, head], B[:, t, group])
            h = torch.exp(step[:, t] * A[head])[:, None, None] * h + drive
            y.append(torch.einsum("bpn,bn->bp", h, C[:, t, group]))
        ys.append(torch.stack(y, 1))
        states.append(h)
    y = torch.stack(ys, 2)
    if D is not None:
        y = y + D[:, None] * x
    if z is not None:
        y = y * z / (1 + torch.exp(-z))
    return y, torch.stack(states, 1)


def random_inputs(batch, groups, heads, width, length, states, optional=OPTIONAL, seed=0):
    """float64 inputs whose values bfloat16 holds exactly, so that only the arithmetic can differ."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = {
        "x": draw(batch, length, heads, width),
        "dt": draw(batch, length, heads) - 1,
        "A": -torch.exp(draw(heads)),
        "B": draw(batch, length, groups, states),
        "C": draw(batch, length, groups, states),
        "D": draw(heads),
        "z": draw(batch, length, heads, width),
        "dt_bias": draw(heads),
        "initial_states": draw(batch, heads, width, states),
    }
    return {k: v.bfloat16().double() for k, v in inputs.items() if k not in OPTIONAL or k in optional}


def as_leaves(inputs, dtype=torch.float64):
    return {k: v.to(dtype).requires_grad_() for k, v in inputs.items()}


def error(got, wanted):
    wanted = wanted.detach().double()
    return float((got.detach().double() - wanted).norm() / wanted.norm())


def results_of(scan, leaves, want_last):
    """y, the last state if wanted, and all gradients."""
    outputs = scan(**leaves)
    outputs = outputs if want_last else outputs[:1]
    upstream = [torch.sin(torch.arange(t.numel(), dtype=torch.float64)).view(t.shape).to(t.dtype) for t in outputs]
    return *outputs, *torch.autograd.grad(outputs, leaves.values(), upstream)


@functools.cache
def true_results_of(want_last, softplus, *case):
    scan = functools.partial(truth, softplus=softplus)
    return results_of(scan, as_leaves(random_inputs(*case)), want_last)


def compare(dtype, backend, want_last, softplus, *case, lay_out=dict):
    """Largest relative error over y, the last state and all gradients, with the name of where it is."""
    inputs = random_inputs(*case)

    def scan(**leaves):
        y = ssd(**lay_out(leaves), dt_softplus=softplus, return_final_states=want_last, backend=backend)
        return y if want_last else (y,)

    got = results_of(scan, as_leaves(inputs, dtype), want_last)
    names = ["y", *(["last"] if want_last else []), *("grad of " + k for k in inputs)]
    wanted = true_results_of(want_last, softplus, *case)
    return max((error(g, w), n) for n, g, w in zip(names, got, wanted, strict=True))


@pytest.mark.parametrize("backend", SSD)
@pytest.mark.parametrize(
    ("groups", "heads", "width", "length", "states"),
    [(1, 4, 6, 1, 3), (2, 4, 5, 7, 16), (1, 3, 8, 49, 1), (4, 4, 6, 196, 5), (2, 6, 4, 197, 8), (1, 2, 3, 300, 40)],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_values_and_gradients_equal_the_float64_loop(backend, groups, heads, width, length, states, dtype):
    worst, where = compare(dtype, backend, True, True, 2, groups, heads, width, length, states)
    assert worst < TOLERANCE[dtype], where


@pytest.mark.parametrize("backend", SSD)
@pytest.mark.parametrize("length", [20, 140])
@pytest.mark.parametrize("optional", [(), ("D",), ("z",), ("dt_bias",), ("initial_states",), ("D", "z", "dt_bias")])
def test_every_optional_argument_can_be_left_out(backend, optional, length):
    for softplus in (True, False):  # without it half of the steps are negative: clamped to 0
        worst, where = compare(torch.float64, backend, False, softplus, 2, 2, 4, 3, length, 4, optional)
        assert worst < TOLERANCE[torch.float64], where


@pytest.mark.parametrize("backend", SSD)
def test_steps_are_clamped(backend):
    inputs = random_inputs(2, 1, 3, 4, 30, 5)
    y, last = ssd(**inputs, dt_softplus=True, dt_limit=(0.1, 0.4), return_final_states=True, backend=backend)
    wanted, wanted_last = truth(**inputs, limit=(0.1, 0.4))
    assert max(error(y, wanted), error(last, wanted_last)) < 1e-12
    assert error(wanted, truth(**inputs)[0]) > 1e-2


@pytest.mark.parametrize("backend", SSD)
def test_a_sequence_may_be_read_in_parts(backend):
    inputs = random_inputs(2, 1, 3, 4, 150, 5)
    parts, state = [], inputs.pop("initial_states")
    for part in (slice(0, 1), slice(1, 140), slice(140, 150)):
        own = {k: v[:, part] if k in ("x", "dt", "B", "C", "z") else v for k, v in inputs.items()}
        y, state = ssd(**own, initial_states=state, dt_softplus=True, return_final_states=True, backend=backend)
        parts.append(y)
    wanted, last = truth(**random_inputs(2, 1, 3, 4, 150, 5))
    assert max(error(torch.cat(parts, 1), wanted), error(state, last)) < 1e-12


@pytest.mark.parametrize("backend", SSD)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_inputs_keep_a_float32_state(backend, dtype):
    inputs = random_inputs(2, 1, 4, 8, 196, 4)
    given = {k: v.to(dtype) for k, v in inputs.items()}
    y, last = ssd(**given, dt_softplus=True, return_final_states=True, backend=backend)
    assert (y.dtype, last.dtype) == (dtype, torch.float32)
    wanted, wanted_last = truth(**{k: v.double() for k, v in given.items()})
    assert error(y, wanted) < TOLERANCE[dtype]
    assert error(last, wanted_last) < 1e-5
    worst, where = compare(dtype, backend, True, True, 2, 1, 4, 8, 196, 4)
    assert worst < 1e-2, where


@pytest.mark.parametrize("backend", SSD)
def test_autocast_leaves_the_state_in_float32(backend):
    inputs = {k: v.float() for k, v in random_inputs(1, 1, 2, 3, 140, 4).items()}
    wanted = ssd(**inputs, dt_softplus=True, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(ssd(**inputs, dt_softplus=True, backend=backend), wanted)


@pytest.mark.parametrize("backend", FAST)
def test_long_sequences_stay_accurate(backend):
    worst, where = compare(torch.float32, backend, True, True, 1, 1, 2, 4, 2048, 8)
    assert worst < TOLERANCE[torch.float32], where


@pytest.mark.parametrize("backend", SSD)
def test_strides_do_not_matter(backend):
    case = 2, 2, 4, 6, 140, 4

    def backwards(leaves):
        def reverse(x):
            return x.permute(*range(x.ndim)[::-1])

        return {k: reverse(reverse(v).contiguous()) for k, v in leaves.items()}

    def every_other(leaves):
        return {k: v.repeat_interleave(2, -1)[..., ::2] for k, v in leaves.items()}

    def parts_of_one(leaves):  # as a block cuts them out of one projection
        kinds = {k: v.flatten(2) for k, v in leaves.items() if k in ("x", "dt", "B", "C")}
        parts = torch.cat(list(kinds.values()), -1).split([v.shape[-1] for v in kinds.values()], -1)
        return leaves | {k: p.view(leaves[k].shape) for k, p in zip(kinds, parts, strict=True)}

    for lay_out in (backwards, every_other, parts_of_one):
        worst, where = compare(torch.float64, backend, True, True, *case, lay_out=lay_out)
        assert worst < 1e-12, (lay_out, where)


@pytest.mark.parametrize("backend", SSD)
def test_the_future_changes_nothing(backend):
    inputs = {k: v.float() for k, v in random_inputs(1, 1, 3, 4, 200, 4).items()}
    before = ssd(**inputs, dt_softplus=True, backend=backend)
    for name in ("x", "dt", "B", "C", "z"):
        inputs[name] = inputs[name].clone()
        inputs[name][:, 151:] = 7.0
    after = ssd(**inputs, dt_softplus=True, backend=backend)
    assert torch.equal(before[:, :151], after[:, :151])
    assert not torch.equal(before[:, 151:], after[:, 151:])


@pytest.mark.parametrize("backend", SSD)
def test_large_steps_forget_and_cost_the_steps_after_them_no_digit(backend):
    # Every other step multiplies the state by exp(-1e4) = 0, and what follows it decays by exp(-0.01).
    inputs = random_inputs(1, 1, 2, 3, 200, 4, optional=())
    inputs["A"] = torch.full_like(inputs["A"], -1.0)
    inputs["dt"] = torch.full_like(inputs["dt"], 0.01)
    inputs["dt"][:, ::2] = 1e4
    leaves = as_leaves(inputs, torch.float32)
    y = ssd(**leaves, backend=backend)
    grads = torch.autograd.grad(y.sum(), leaves.values())
    exact = as_leaves(inputs)
    wanted = truth(**exact, softplus=False)[0]
    assert error(y, wanted) < 1e-5
    assert error(y[:, 1::2], wanted[:, 1::2]) < 1e-5
    for (name, g), w in zip(
        zip(inputs, grads, strict=True), torch.autograd.grad(wanted.sum(), exact.values()), strict=True
    ):
        assert error(g, w) < 1e-4, name


@pytest.mark.parametrize("backend", SSD)
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(backend, batch, length):
    leaves = as_leaves(random_inputs(batch, 2, 4, 3, length, 4), torch.float32)
    y, last = ssd(**leaves, return_final_states=True, backend=backend)
    assert y.shape == (batch, length, 4, 3)
    assert torch.equal(last, leaves["initial_states"])
    grads = torch.autograd.grad((y.sum() + last.sum()), leaves.values(), allow_unused=True)
    assert all(g is None or not g.any() for g in grads[:-1])
    assert torch.equal(grads[-1], torch.ones_like(last))


@pytest.mark.parametrize(("want_last", "optional"), [(True, OPTIONAL), (False, ("D",))])
def test_second_derivatives(want_last, optional, monkeypatch):
    from ssmclip.ops.ssd import chunked, cpu

    monkeypatch.setattr(chunked, "CHUNK", 3)  # several chunks of a short sequence
    monkeypatch.setattr(cpu, "CHUNK", 2)
    leaves = as_leaves(random_inputs(1, 2, 2, 1, 5, 2, optional))

    def scan(*inputs):
        options = {"dt_softplus": True, "return_final_states": want_last}
        return ssd(**dict(zip(leaves, inputs, strict=True)), **options)

    assert torch.autograd.gradcheck(scan, tuple(leaves.values()))
    assert torch.autograd.gradgradcheck(scan, tuple(leaves.values()))


def test_third_derivatives_agree():
    def third(backend):
        x = torch.linspace(-1, 1, 40, dtype=torch.float64).view(1, 5, 2, 4).requires_grad_()
        other = {k: v for k, v in random_inputs(1, 1, 2, 4, 5, 2, ()).items() if k not in ("x", "dt")}
        value = (ssd(x, 2 * x.mean(-1), **other, dt_softplus=True, backend=backend) ** 2).mean()
        for _ in range(3):
            (value,) = torch.autograd.grad((value**2).mean(), x, create_graph=True)
        return value

    assert error(third("cpu"), third("reference")) < 1e-9


def test_the_number_of_threads_changes_no_bit():
    leaves = as_leaves(random_inputs(4, 2, 4, 16, 200, 8), torch.float32)

    def in_threads(count):
        before = torch.get_num_threads()
        torch.set_num_threads(count)
        try:
            return results_of(lambda **x: (ssd(**x, dt_softplus=True),), leaves, True)
        finally:
            torch.set_num_threads(before)

    once = in_threads(1)
    for again in (in_threads(1), in_threads(2)):
        assert all(torch.equal(a, b) for a, b in zip(once, again, strict=True))


COMPILE = """
import torch
from ssmclip.ops import ssd

class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.A = torch.nn.Parameter(-torch.rand(4))
        self.mix = torch.nn.Linear(24, 24 + 4 + 10)
    def forward(self, x):
        x, dt, B, C = self.mix(x).split([24, 4, 5, 5], -1)
        return ssd(x.unflatten(-1, (4, 6)), dt, self.A, B[:, :, None], C[:, :, None], dt_softplus=True)

torch.manual_seed(0)
layer = Layer()
x = torch.randn(2, 30, 24)
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
assert "ssmclip.ssd" in str(program.graph)
"""


def test_compiled_and_exported_modules_hold_the_operator_whole():
    result = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


# opcheck itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_operator_keeps_pytorchs_rules():
    x, dt, A, B, C, initial = as_leaves(random_inputs(1, 2, 4, 3, 12, 4, ("initial_states",)), torch.float32).values()
    torch.library.opcheck(torch.ops.ssmclip.ssd.default, (x, dt, A, B, C, initial, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"A": torch.zeros(9)}, r"A must have shape \(4,\)"),
        ({"dt": torch.zeros(1, 5, 3)}, r"dt must have shape \(1, 5, 4\)"),
        ({"C": torch.zeros(1, 5, 2, 3)}, "C must have shape"),
        ({"B": torch.zeros(1, 5, 3, 4)}, r"groups of B must divide .* \(got 3\)"),
        ({"x": torch.zeros(1, 5, 4)}, r"x must be \(batch, length, heads, channels\)"),
        ({"initial_states": torch.zeros(1, 4, 4, 3)}, "initial_states must have shape"),
        ({"D": torch.zeros(4, dtype=torch.int64)}, "floating point"),
    ],
)
def test_inputs_that_do_not_fit_are_named(change, message):
    inputs = random_inputs(1, 2, 4, 3, 5, 4) | change
    # Not through the shape-checked signature, which tests check and production does not.
    with pytest.raises(ValueError, match=message):
        getattr(ssd, "__wrapped__", ssd)(**inputs)
