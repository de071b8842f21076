"""The convolution and its gradient, row by row of channels that lie next to each other in memory.

x, dy: (elements,), with the distances in elements between batch elements and between positions; taps: (K, D), that
with no lag last; y, dx: (B, L, D).
"""

from __future__ import annotations

from ssmclip.ops.simd import entry_point


@entry_point
def forward(x, of_batch, of_position, taps, bias, y, first, last):
    """y at the positions number first to last of all batch elements."""
    length, dim = y.shape[1:]
    count = len(taps)
    for task in range(first, last):
        b, t = task // length, task % length
        row = y[b, t]
        row[:] = bias
        for lag in range(min(count, t + 1)):
            tap = taps[count - 1 - lag]
            start = b * of_batch + (t - lag) * of_position
            seen = x[start : start + dim]
            for d in range(dim):
                row[d] += tap[d] * seen[d]


@entry_point
def backward(x, of_batch, of_position, dy, dy_of_batch, dy_of_position, taps, dx, dtaps, dbias, block, first, last):
    """The gradients for pairs of a batch element and a block of channels. dtaps: (B, K, D), dbias: (B, D)."""
    length, dim = dx.shape[1:]
    count, blocks = len(taps), -(-dim // block)
    for task in range(first, last):
        b, low = task // blocks, task % blocks * block
        high = min(dim, low + block)
        dtaps[b, :, low:high] = 0
        dbias[b, low:high] = 0
        for t in range(length):
            start = b * dy_of_batch + t * dy_of_position
            above = dy[start + low : start + high]
            row, added = dx[b, t, low:high], dbias[b, low:high]
            for d in range(high - low):
                row[d] = 0
                added[d] += above[d]
            for lag in range(min(count, length - t)):
                start = b * dy_of_batch + (t + lag) * dy_of_position
                later = dy[start + low : start + high]
                start = b * of_batch + t * of_position
                seen = x[start + low : start + high]
                tap, dtap = taps[count - 1 - lag, low:high], dtaps[b, count - 1 - lag, low:high]
                for d in range(high - low):
                    row[d] += tap[d] * later[d]
                    dtap[d] += seen[d] * later[d]
