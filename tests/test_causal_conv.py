"""The short convolution over all back ends, against PyTorch's padded convolution."""

import os

import pytest
import torch
import torch.nn.functional as F

from ssmclip.ops import BACKENDS, causal_conv1d

if os.environ.get("TRITON_INTERPRET") == "1":  # see test_triton.py
    import triton_interpreter

    triton_interpreter.install()

CONVOLUTIONS = [name for name, backend in BACKENDS["causal_conv1d"].items() if not backend.why_not("cpu")]


def padded(x, weight, bias):
    return F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight[:, None], bias, groups=len(weight))


def relative(value, truth):
    return ((value.detach().double() - truth.detach().double()).norm() / truth.detach().double().norm()).item()


@pytest.mark.parametrize("backend", CONVOLUTIONS)
@pytest.mark.parametrize(("length", "taps"), [(1, 4), (3, 4), (17, 4), (17, 1), (70, 3)])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients_equal_a_padded_convolution(backend, length, taps, channels_last, with_bias):
    torch.manual_seed(0)
    x = torch.randn(2, 6, length, dtype=torch.float64)
    if channels_last:  # and apart, as a block cuts them out of one projection
        x = torch.cat([x, x], 1).transpose(1, 2).contiguous().transpose(1, 2)[:, 6:]
    inputs = [x, torch.randn(6, taps, dtype=torch.float64), torch.randn(6, dtype=torch.float64)][: 2 + with_bias]
    x, weight, bias = *(t.requires_grad_() for t in inputs), *[None] * (not with_bias)
    y, wanted = causal_conv1d(x, weight, bias, backend=backend), padded(x, weight, bias)
    torch.testing.assert_close(y, wanted, rtol=1e-12, atol=1e-12)
    if length > 1:
        assert (y.stride(1) == 1) == channels_last
    grads, wanted_grads = (torch.autograd.grad(t.sin().sum(), inputs) for t in (y, wanted))
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", CONVOLUTIONS)
def test_second_derivatives(backend):
    inputs = [torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((1, 2, 5), (2, 3), (2,))]
    assert torch.autograd.gradgradcheck(lambda *own: causal_conv1d(*own, backend=backend), inputs)


@pytest.mark.parametrize("backend", CONVOLUTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_about_once(backend, dtype):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 40, 9).to(dtype), torch.randn(40, 4).to(dtype), torch.randn(40).to(dtype)
    y = causal_conv1d(x, weight, bias, backend=backend)
    assert y.dtype == dtype
    assert relative(y, padded(x.double(), weight.double(), bias.double())) < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("backend", CONVOLUTIONS)
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(backend, batch, length):
    inputs = [torch.randn(*s, requires_grad=True) for s in ((batch, 6, length), (6, 4), (6,))]
    y = causal_conv1d(*inputs, backend=backend)
    assert y.shape == (batch, 6, length)
    grads = torch.autograd.grad(y.sum(), inputs, allow_unused=True)
    assert all(g is None or not g.any() for g in grads)


@pytest.mark.parametrize("backend", CONVOLUTIONS)
def test_gradients_of_several_blocks_of_channels(backend):
    torch.manual_seed(0)
    x = torch.randn(3, 50, 700, requires_grad=True)
    weight, bias = torch.randn(700, 4, requires_grad=True), torch.randn(700, requires_grad=True)
    upstream = torch.randn(3, 50, 700)

    def gradients(conv):
        y = conv(x.transpose(1, 2)).transpose(1, 2)
        return torch.autograd.grad(y, (x, weight, bias), upstream)

    wanted = gradients(lambda x: padded(x, weight, bias))
    got = gradients(lambda x: causal_conv1d(x, weight, bias, backend=backend))
    assert max(relative(g, w) for g, w in zip(got, wanted, strict=True)) < 1e-6


# opcheck itself looks at .grad of tensors that are no leaves.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_the_convolution_keeps_pytorchs_rules():
    x = torch.randn(2, 5, 6).transpose(1, 2).requires_grad_()
    weight, bias = torch.randn(6, 4, requires_grad=True), torch.randn(6, requires_grad=True)
    torch.library.opcheck(torch.ops.ssmclip.causal_conv1d.default, (x, weight, bias))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"\(2, 6, 5\) and \(5, 4\)"):
        causal_conv1d.__wrapped__(torch.randn(2, 6, 5), torch.randn(5, 4))
