"""The convolution and its gradient in Triton: one program per batch element, block of channels and chunk of positions.

Tiles are [channel, position]. A position is read once for each tap, from the first-level cache but for the first.
"""

from __future__ import annotations

import triton.language as tl

from ssmclip.ops.selective_scan.triton_kernels import kernel, parameter, read, write


@kernel
def forward(
    X,
    WEIGHT,
    BIAS,
    Y,
    channels,
    length,
    x_of_batch,
    x_of_channel,
    x_of_position,
    y_of_batch,
    y_of_channel,
    y_of_position,
    TYPE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    program, chunks = tl.program_id(0), tl.cdiv(length, STEPS)
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (program // (chunks * blocks)).to(tl.int64)
    channel = program // chunks % blocks * CHANNELS + tl.arange(0, CHANNELS)
    t = program % chunks * STEPS + tl.arange(0, STEPS)
    of_channel = channel < channels
    inside = of_channel[:, None] & (t < length)[None, :]
    X += batch * x_of_batch
    Y += batch * y_of_batch

    y = tl.zeros([CHANNELS, STEPS], TYPE) + parameter(BIAS, channel, of_channel, TYPE)[:, None]
    for lag in tl.static_range(TAPS):
        tap = tl.load(WEIGHT + channel * TAPS + (TAPS - 1 - lag), mask=of_channel, other=0.0).to(TYPE)
        there = inside & (t >= lag)[None, :]
        y += tap[:, None] * read(X, channel, t - lag, there, x_of_channel, x_of_position, TYPE)
    write(Y, y, channel, t, inside, y_of_channel, y_of_position)


@kernel
def backward(
    DY,
    X,
    WEIGHT,
    DX,
    DWEIGHT,
    DBIAS,
    channels,
    length,
    dy_of_batch,
    dy_of_channel,
    dy_of_position,
    x_of_batch,
    x_of_channel,
    x_of_position,
    dx_of_batch,
    dx_of_channel,
    dx_of_position,
    TYPE: tl.constexpr,
    TAPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
):
    """DWEIGHT (batch and chunk, channel, tap) and DBIAS (batch and chunk, channel) are added up by the caller."""
    program, chunks = tl.program_id(0), tl.cdiv(length, STEPS)
    blocks = tl.cdiv(channels, CHANNELS)
    batch = (program // (chunks * blocks)).to(tl.int64)
    chunk = program % chunks
    channel = program // chunks % blocks * CHANNELS + tl.arange(0, CHANNELS)
    t = chunk * STEPS + tl.arange(0, STEPS)
    of_channel = channel < channels
    inside = of_channel[:, None] & (t < length)[None, :]
    DY += batch * dy_of_batch
    X += batch * x_of_batch
    DX += batch * dx_of_batch
    part = (batch * chunks + chunk) * channels + channel

    dx = tl.zeros([CHANNELS, STEPS], TYPE)
    dy = read(DY, channel, t, inside, dy_of_channel, dy_of_position, TYPE)
    for lag in tl.static_range(TAPS):
        tap = tl.load(WEIGHT + channel * TAPS + (TAPS - 1 - lag), mask=of_channel, other=0.0).to(TYPE)
        later = of_channel[:, None] & (t + lag < length)[None, :]
        dx += tap[:, None] * read(DY, channel, t + lag, later, dy_of_channel, dy_of_position, TYPE)
        there = inside & (t >= lag)[None, :]
        x = read(X, channel, t - lag, there, x_of_channel, x_of_position, TYPE)
        tl.store(DWEIGHT + part * TAPS + (TAPS - 1 - lag), tl.sum(dy * x, axis=1), mask=of_channel)
    tl.store(DBIAS + part, tl.sum(dy, axis=1), mask=of_channel)
    write(DX, dx, channel, t, inside, dx_of_channel, dx_of_position)
