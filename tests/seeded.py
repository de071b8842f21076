"""Weights and inputs that a name and a shape determine: the same numbers on every machine, with every NumPy."""

import math
import re
import zlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

# How a parameter's name ends: the middle and half the width of the interval its values fill. The first match counts.
INTERVALS = (
    (r"running_var$", 1.0, 0.5),
    (r"\bA_logs?$", 0.5, 1.0),
    (r"\b(dt_projs_bias|dt_proj\.bias|dt_bias)$", -2.0, 1.0),  # of the steps, before the softplus
    (r"\bDs?$", 1.0, 0.5),
    (r"logit_scale$", 2.5, 0.0),
    (r"bias|running_mean$", 0.0, 0.3),
)


def draw(name: str, shape: Sequence[int], middle: float = 0.0, half_width: float = 1.0) -> Tensor:
    """Return float64 numbers uniform in [middle - half_width, middle + half_width), from a stream seeded by `name`.

    Only the bit generator is NumPy's, whose stream is guaranteed not to change; its distributions are not.
    """
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    unit = torch.from_numpy((bits >> np.uint64(11)) * 2.0**-53)  # [0, 1), 53 bits
    return (middle + half_width * (2 * unit - 1)).reshape(tuple(shape))


def weight(name: str, shape: Sequence[int]) -> Tensor:
    """Return a parameter or buffer, float64, by its name in the state dictionary and its shape.

    None is at its initial value (no bias is 0, no norm 1). Matrices and filters have variance 1 / fan-in, so that
    every part of a network takes part in the output.
    """
    for ending, middle, half_width in INTERVALS:
        if re.search(ending, name):
            return draw(name, shape, middle, half_width)
    if len(shape) == 1:  # of a norm
        return draw(name, shape, 1.0, 0.3)
    fan_in = math.prod(shape[1:]) if len(shape) == 4 and "complex" not in name else shape[-1]
    return draw(name, shape, 0.0, math.sqrt(3 / fan_in))


@torch.no_grad()
def fill(module: nn.Module) -> nn.Module:
    """Give every floating-point parameter and buffer its `weight`; return the module in float64, for evaluation."""
    module = module.double().eval()
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.copy_(weight(name, value.shape))
    return module
