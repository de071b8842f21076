"""Grouped convolutions made for second derivatives against PyTorch's own."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ssmclip.analyze.curvature.convolution import grouped_convolutions_by_convolutions
from ssmclip.analyze.curvature.product import Hessian

CASES = {
    "depthwise": (nn.Conv2d(4, 4, 3, padding=1, groups=4), (2, 4, 5, 6)),
    "strides that differ": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), dilation=(1, 2), groups=2), (2, 4, 7, 6)),
    "no bias": (nn.Conv1d(3, 3, 4, padding=3, groups=3, bias=False), (2, 3, 5)),
    "volume": (nn.Conv3d(2, 2, 2, groups=2), (1, 2, 3, 3, 3)),
    "named padding": (nn.Conv2d(2, 2, 3, padding="same", groups=2), (1, 2, 4, 4)),
    "no batch": (nn.Conv2d(2, 2, 3, groups=2), (2, 4, 4)),
}


@pytest.mark.parametrize("name", CASES)
def test_derivatives_of_grouped_convolutions(name):
    layer, shape = CASES[name]
    layer = layer.double()
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    wanted = layer(x)

    def run(x, *parameters):
        with grouped_convolutions_by_convolutions():
            named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
            return torch.func.functional_call(layer, named, x)

    inputs = (x, *layer.parameters())
    torch.testing.assert_close(run(*inputs), wanted, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)
    # A third derivative, and gradients of some inputs only.
    for some in ((x,), (inputs[1],), inputs):
        thirds = []
        for y in (run(*inputs), layer(x)):
            firsts = torch.autograd.grad(y.exp().sum(), some, create_graph=True)
            seconds = torch.autograd.grad(sum(g.square().sum() for g in firsts), some, create_graph=True)
            curved = sum(h.square().sum() for h in seconds)
            thirds.append(torch.autograd.grad(curved, inputs, allow_unused=True, materialize_grads=True))
        for ours, theirs in zip(*thirds, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


class Convolutions(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "convolution" in str(function)
        return function(*args, **(kwargs or {}))


def test_a_product_takes_as_many_convolutions_whatever_the_groups():
    taken = []
    for channels in (4, 16):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(channels, channels, 3, groups=channels), nn.Tanh()).double()
        x = torch.randn(2, channels, 5, 5, dtype=torch.float64, requires_grad=True)
        hessian = Hessian(lambda model=model, x=x: model(x).square().sum(), [x, *model.parameters()])
        v = torch.randn(hessian.size, dtype=torch.float64)
        hessian(v)
        with Convolutions() as told:
            hessian(v)
        taken.append(told.count)
    assert taken[0] == taken[1] <= 8
