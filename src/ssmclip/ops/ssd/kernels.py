"""What is not a matrix product in a chunk, one pass over memory each. T chunks, otherwise the letters of `reference`.

The decay from position j to position i grows out of that to i - 1: one product instead of one exponential.
"""

from __future__ import annotations

import math

import numpy as np

from ssmclip.ops.simd import entry_point


@entry_point
def forward(step, A, scores, mix, from_start, to_end, first, last):
    """For the (chunk, head) pairs number first to last:

    mix[i, j] = scores[i, j] exp(a[j+1] + ... + a[i]) step[j], zero where j > i; the last row of the decay times step is
    to_end, and from_start[i] = exp(a[0] + ... + a[i]), where a = step A.

    step, from_start, to_end: (T, H, Q); A: (H,); scores: (T, G, Q, Q); mix: (T, H, Q, Q).
    """
    heads, size = step.shape[1:]
    per_group = heads // scores.shape[1]
    for task in range(first, last):
        t, h = task // heads, task % heads
        decay, steps = to_end[t, h], step[t, h]
        total = step.dtype.type(1)
        for i in range(size):
            keep = math.exp(steps[i] * A[h])
            total *= keep
            from_start[t, h, i] = total
            row, score = mix[t, h, i], scores[t, h // per_group, i]
            for j in range(i):
                decay[j] *= keep
                row[j] = score[j] * decay[j]
            decay[i] = steps[i]
            row[i] = score[i] * steps[i]
            row[i + 1 :] = 0


@entry_point
def backward(step, A, scores, dmix, dstart, dend, dtotal, dscores, dstep, dA, first, last):
    """For the (chunk, group) pairs number first to last: dscores, dstep and dA, from the gradients of `mix`,
    `from_start`, `to_end` and from_start's last element.

    dmix: (T, H, Q, Q); dstart, dend, dstep: (T, H, Q); dtotal, dA: (T, H); dscores: (T, G, Q, Q).
    """
    heads, size = step.shape[1:]
    groups = scores.shape[1]
    per_group = heads // groups
    zero = step.dtype.type(0)
    decay, row, start = np.empty(size, step.dtype), np.empty(size, step.dtype), np.empty(size, step.dtype)
    da = np.empty(size, step.dtype)  # the gradient of a
    for task in range(first, last):
        t, g = task // groups, task % groups
        dscores[t, g] = 0
        for h in range(g * per_group, (g + 1) * per_group):
            steps, direct = step[t, h], dstep[t, h]
            direct[:] = 0
            da[:] = 0
            total = zero + 1
            for i in range(size):
                keep = math.exp(steps[i] * A[h])
                total *= keep
                start[i] = total
                score, dscore, above = scores[t, g, i], dscores[t, g, i], dmix[t, h, i]
                for j in range(i):
                    decay[j] *= keep
                decay[i] = 1
                for j in range(i + 1):
                    seen = above[j] * decay[j]
                    dscore[j] += seen * steps[j]
                    direct[j] += seen * score[j]
                    row[j] = seen * score[j] * steps[j]
                # a[s] stands in the decay from every j < s to every i >= s.
                before = zero
                for s in range(1, i + 1):
                    before += row[s - 1]
                    da[s] += before
            after = dtotal[t, h] * total
            for i in range(size - 1, -1, -1):
                after += dstart[t, h, i] * start[i]
                da[i] += after
            before = zero
            total = zero
            for i in range(size):
                da[i] += before
                before += dend[t, h, i] * decay[i] * steps[i]
                direct[i] += dend[t, h, i] * decay[i] + da[i] * A[h]
                total += da[i] * steps[i]
            dA[t, h] = total
