"""The scan and its gradient for one CPU core, vectorised over channels, for sequences and for maps.

batch b · group g · channel c of a group · position p · state n · step t of a sequence, position order[t]

    decay = exp(delta A);  h = decay h + delta B u;  y = C h + D u, times silu(z)

Every tensor is a row of `views`: its address and the bytes between neighbours in batch, group, channel, position and
state. A stride of 0 shares a tensor over an axis: with `merge` (maps), u and y are shared by the groups, which are
four orders of reading one map, and y and the gradient of u are sums over them.

A task is a batch element, one group (all of them with `merge`) and a run of blocks of channels. The state of a block
stays in the first-level cache. Channels must be neighbours in memory for the vectors: where they are not, `steps`
positions at a time are transposed through scratch. The forward pass saves the state every `steps` positions; the
backward pass starts from there, keeps the states of `steps` positions in the second-level cache, and walks back:

    lam = C dy + r;  r = decay lam;  dB = lam delta u;  dC = dy h;  q = r h[t-1] = d(delta A)
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ssmclip.ops.simd import (
    LOG2_E,
    REGISTER_BYTES,
    broadcast,
    exp2,
    fill,
    fma,
    load,
    load_part,
    load_transposed,
    read,
    sigmoid,
    size_of,
    softplus,
    store,
    store_part,
    total,
    write,
)

# Rows of `views`. In SAVED a position is a saved state, in DB and DC a channel is a slice of them.
U, DELTA, Z, Y, A, B, C, D, BIAS, SAVED, LAST, DY, DU, DDELTA, DZ, DA, DB, DC, DD, DBIAS, DLAST = range(21)
NAMES = "U DELTA Z Y A B C D BIAS SAVED LAST DY DU DDELTA DZ DA DB DC DD DBIAS DLAST"
VIEWS = {name: row for row, name in enumerate(NAMES.split())}

# Columns of `views`: bytes, except the address. An address of 0 is a tensor that is not there.
ADDRESS, BATCH, GROUP, CHANNEL, POSITION, STATE = range(6)

# `sizes`
GROUPS, WIDTH, LENGTH, STATES, BLOCK, STEPS, SLICES, MERGE, SOFTPLUS = range(9)

LN_2 = 1 / LOG2_E


@njit(forceinline=True)
def _pad(count, like):
    """The multiple of a register's lanes that holds `count` of them, in bytes."""
    return (count * size_of(like) + REGISTER_BYTES - 1) // REGISTER_BYTES * REGISTER_BYTES


@njit(forceinline=True)
def _at(view, b, g, c):
    return view[ADDRESS] + b * view[BATCH] + g * view[GROUP] + c * view[CHANNEL]


@njit(forceinline=True)
def _load(address, j, width, like):
    """The vector j bytes into a row of `width` bytes; 0 beyond its end."""
    if j + REGISTER_BYTES <= width:
        return load(address + j, like)
    return load_part(address + j, like, (width - j) // size_of(like))


@njit(forceinline=True)
def _store(address, j, width, v, like):
    if j + REGISTER_BYTES <= width:
        store(address + j, v)
    else:
        store_part(address + j, v, (width - j) // size_of(like))


# ---- moving between the tensors and scratch, where a row holds the channels of one position or state


@njit
def _gather(scratch, pad, address, channel, row, width, rows, like):
    """Copy `rows` rows of `width` channels, `row` and `channel` bytes apart, into scratch, `pad` bytes apart."""
    item = size_of(like)
    if channel == item:
        for r in range(rows):
            for j in range(0, width * item, REGISTER_BYTES):
                store(scratch + r * pad + j, _load(address + r * row, j, width * item, like))
    elif row == item:
        lanes = REGISTER_BYTES // item
        for r in range(0, rows, lanes):
            for c in range(0, width, lanes):
                block = load_transposed(
                    address + c * channel + r * item, channel, min(lanes, width - c), min(lanes, rows - r), like
                )
                for i in range(lanes):
                    store(scratch + (r + i) * pad + c * item, block[i])
    else:
        for r in range(rows):
            for c in range(width):
                write(scratch + r * pad + c * item, read(address + r * row + c * channel, like))
            for c in range(width, pad // item):
                write(scratch + r * pad + c * item, like)


@njit
def _scatter(scratch, pad, address, channel, row, width, rows, like):
    """The way back of `_gather`."""
    item = size_of(like)
    if channel == item:
        for r in range(rows):
            for j in range(0, width * item, REGISTER_BYTES):
                _store(address + r * row, j, width * item, load(scratch + r * pad + j, like), like)
    elif row == item:
        lanes = REGISTER_BYTES // item
        for r in range(0, rows, lanes):
            for c in range(0, width, lanes):
                block = load_transposed(scratch + r * pad + c * item, pad, min(lanes, rows - r), lanes, like)
                for i in range(min(lanes, width - c)):
                    store_part(address + (c + i) * channel + r * item, block[i], min(lanes, rows - r))
    else:
        for r in range(rows):
            for c in range(width):
                write(address + r * row + c * channel, read(scratch + r * pad + c * item, like))


@njit(forceinline=True)
def _rows(scratch, pad, address, channel, row, width, first, count, like):
    """(address, step) such that channel-contiguous row p lies at address + p * step, for p in [first, first + count)."""
    if channel == size_of(like) or width == 1:
        return address, row
    _gather(scratch, pad, address + first * row, channel, row, width, count, like)
    return scratch - first * pad, pad


@njit(forceinline=True)
def _room(scratch, pad, address, channel, row, first, like):
    """Where to write rows: in place, or in scratch, from where `_put` takes them."""
    if channel == size_of(like):
        return address, row
    return scratch - first * pad, pad


@njit(forceinline=True)
def _put(scratch, pad, address, channel, row, width, first, count, like):
    if channel != size_of(like):
        _scatter(scratch, pad, address + first * row, channel, row, width, count, like)


@njit(forceinline=True)
def _vector(scratch, view, g, c, pad, width, like):
    """One row of parameters in scratch, zeros where there are none."""
    if view[ADDRESS]:
        _gather(scratch, pad, _at(view, 0, g, c), view[CHANNEL], 0, width, 1, like)
    else:
        _zero(scratch, pad, like)


@njit(forceinline=True)
def _zero(scratch, count, like):
    for j in range(0, count, REGISTER_BYTES):
        store(scratch + j, broadcast(like))


@njit(forceinline=True)
def _scale(scratch, count, factor, like):
    for j in range(0, count, REGISTER_BYTES):
        v = load(scratch + j, like)
        store(scratch + j, v * fill(v, factor))


@njit(forceinline=True)
def _task(sizes, task):
    """(batch element, first group, end of groups, slice, first block, end of blocks) of a task."""
    slices, blocks = sizes[SLICES], (sizes[WIDTH] + sizes[BLOCK] - 1) // sizes[BLOCK]
    part, rest = task % slices, task // slices
    if sizes[MERGE]:
        b, g, end = rest, 0, sizes[GROUPS]
    else:
        b, g = rest // sizes[GROUPS], rest % sizes[GROUPS]
        end = g + 1
    return b, g, end, part, part * blocks // slices, (part + 1) * blocks // slices


# ---- forward


@njit(nogil=True, cache=True)
def forward(views, sizes, order, scratch, first, last, like):
    """Tasks first to last of the forward pass. order: (1 or groups, length); scratch: `scratch_bytes` of memory."""
    base = (scratch.ctypes.data + 63) // 64 * 64
    for task in range(first, last):
        b, g_first, g_end, _, block_first, block_end = _task(sizes, task)
        for block in range(block_first, block_end):
            c = block * sizes[BLOCK]
            for g in range(g_first, g_end):
                _forward_block(views, sizes, order[g if sizes[MERGE] else 0], base, b, g, c, g > g_first, like)


@njit
def _forward_block(views, sizes, order, base, b, g, c, accumulate, like):
    item, length, states, steps = size_of(like), sizes[LENGTH], sizes[STATES], sizes[STEPS]
    width = min(sizes[BLOCK], sizes[WIDTH] - c)
    pad, pad_bc = _pad(width, like), _pad(states, like)
    spare = REGISTER_BYTES // item
    h = base
    a_log2 = h + (states + spare) * pad
    d_row = a_log2 + (states + spare) * pad
    bias = d_row + pad
    u_tile = bias + pad
    delta_tile = u_tile + (steps + spare) * pad
    z_tile = delta_tile + (steps + spare) * pad
    y_tile = z_tile + (steps + spare) * pad
    b_tile = y_tile + (steps + spare) * pad
    c_tile = b_tile + (steps + spare) * pad_bc

    u, delta, z, y, bs, cs = views[U], views[DELTA], views[Z], views[Y], views[B], views[C]
    _zero(h, states * pad, like)
    _gather(a_log2, pad, _at(views[A], 0, g, c), views[A, CHANNEL], views[A, STATE], width, states, like)
    _scale(a_log2, states * pad, LOG2_E, like)
    _vector(d_row, views[D], g, c, pad, width, like)
    _vector(bias, views[BIAS], g, c, pad, width, like)

    for t in range(0, length, steps):
        count = min(steps, length - t)
        if views[SAVED, ADDRESS]:
            save = _at(views[SAVED], b, g, c) + t // steps * views[SAVED, POSITION]
            _scatter(h, pad, save, item, views[SAVED, STATE], width, states, like)
        u_at, u_step = _rows(u_tile, pad, _at(u, b, g, c), u[CHANNEL], u[POSITION], width, t, count, like)
        delta_at, delta_step = _rows(
            delta_tile, pad, _at(delta, b, g, c), delta[CHANNEL], delta[POSITION], width, t, count, like
        )
        b_at, b_step = _rows(b_tile, pad_bc, _at(bs, b, g, 0), bs[STATE], bs[POSITION], states, t, count, like)
        c_at, c_step = _rows(c_tile, pad_bc, _at(cs, b, g, 0), cs[STATE], cs[POSITION], states, t, count, like)
        z_at, z_step = 0, 0
        if z[ADDRESS]:
            z_at, z_step = _rows(z_tile, pad, _at(z, b, g, c), z[CHANNEL], z[POSITION], width, t, count, like)
        y_at, y_step = _room(y_tile, pad, _at(y, b, g, c), y[CHANNEL], y[POSITION], t, like)

        for i in range(t, t + count):
            p = order[i]
            for j in range(0, width * item, REGISTER_BYTES):
                step = _load(delta_at + p * delta_step, j, width * item, like) + load(bias + j, like)
                if sizes[SOFTPLUS]:
                    step = softplus(step)
                x = _load(u_at + p * u_step, j, width * item, like)
                value = load(d_row + j, like) * x
                x = step * x
                for n in range(states):
                    decay = exp2(step * load(a_log2 + n * pad + j, like))
                    state = x * broadcast(read(b_at + p * b_step + n * item, like))
                    state = fma(decay, load(h + n * pad + j, like), state)
                    store(h + n * pad + j, state)
                    value = fma(state, broadcast(read(c_at + p * c_step + n * item, like)), value)
                if z_at:
                    gate = _load(z_at + p * z_step, j, width * item, like)
                    value = value * gate * sigmoid(gate)
                if accumulate:
                    value = value + _load(y_at + p * y_step, j, width * item, like)
                _store(y_at + p * y_step, j, width * item, value, like)
        _put(y_tile, pad, _at(y, b, g, c), y[CHANNEL], y[POSITION], width, t, count, like)

    if views[LAST, ADDRESS]:
        _scatter(h, pad, _at(views[LAST], b, g, c), views[LAST, CHANNEL], item, width, states, like)


# ---- backward


@njit(nogil=True, cache=True)
def backward(views, sizes, order, scratch, first, last, like):
    """Tasks first to last of the backward pass. order: (1 or groups, length); scratch: `scratch_bytes` of memory."""
    base = (scratch.ctypes.data + 63) // 64 * 64
    for task in range(first, last):
        b, g_first, g_end, part, block_first, block_end = _task(sizes, task)
        for block in range(block_first, block_end):
            c = block * sizes[BLOCK]
            for g in range(g_first, g_end):
                turn = order[g if sizes[MERGE] else 0]
                _backward_block(views, sizes, turn, base, b, g, c, part, g > g_first, block > block_first, like)


@njit
def _backward_block(views, sizes, order, base, b, g, c, part, accumulate_u, accumulate_bc, like):
    item, length, states, steps = size_of(like), sizes[LENGTH], sizes[STATES], sizes[STEPS]
    width = min(sizes[BLOCK], sizes[WIDTH] - c)
    bytes_ = width * item
    pad, pad_bc = _pad(width, like), _pad(states, like)
    spare = REGISTER_BYTES // item
    plane = (states + spare) * pad
    r_plane = base
    a_log2 = r_plane + plane
    da_plane = a_log2 + plane
    d_row = da_plane + plane
    bias = d_row + pad
    dd_row = bias + pad
    dbias_row = dd_row + pad
    db_sums = dbias_row + pad
    dc_sums = db_sums + states * REGISTER_BYTES
    tile = (steps + spare) * pad
    u_tile = dc_sums + states * REGISTER_BYTES
    delta_tile = u_tile + tile
    z_tile = delta_tile + tile
    dy_tile = z_tile + tile
    du_tile = dy_tile + tile
    ddelta_tile = du_tile + tile
    dz_tile = ddelta_tile + tile
    step_tile = dz_tile + tile
    slope_tile = step_tile + tile
    gated_tile = slope_tile + tile
    b_tile = gated_tile + tile
    c_tile = b_tile + (steps + spare) * pad_bc
    h_planes = c_tile + (steps + spare) * pad_bc
    decay_planes = h_planes + (steps + 1) * plane

    u, delta, z, bs, cs = views[U], views[DELTA], views[Z], views[B], views[C]
    dy, du, ddelta, dz = views[DY], views[DU], views[DDELTA], views[DZ]
    _zero(da_plane, states * pad, like)
    _zero(dd_row, pad, like)
    _zero(dbias_row, pad, like)
    if views[DLAST, ADDRESS]:
        _gather(r_plane, pad, _at(views[DLAST], b, g, c), views[DLAST, CHANNEL], item, width, states, like)
    else:
        _zero(r_plane, states * pad, like)
    _gather(a_log2, pad, _at(views[A], 0, g, c), views[A, CHANNEL], views[A, STATE], width, states, like)
    _scale(a_log2, states * pad, LOG2_E, like)
    _vector(d_row, views[D], g, c, pad, width, like)
    _vector(bias, views[BIAS], g, c, pad, width, like)

    for chunk in range((length + steps - 1) // steps - 1, -1, -1):
        t = chunk * steps
        count = min(steps, length - t)
        u_at, u_step = _rows(u_tile, pad, _at(u, b, g, c), u[CHANNEL], u[POSITION], width, t, count, like)
        delta_at, delta_step = _rows(
            delta_tile, pad, _at(delta, b, g, c), delta[CHANNEL], delta[POSITION], width, t, count, like
        )
        dy_at, dy_step = _rows(dy_tile, pad, _at(dy, b, g, c), dy[CHANNEL], dy[POSITION], width, t, count, like)
        b_at, b_step = _rows(b_tile, pad_bc, _at(bs, b, g, 0), bs[STATE], bs[POSITION], states, t, count, like)
        c_at, c_step = _rows(c_tile, pad_bc, _at(cs, b, g, 0), cs[STATE], cs[POSITION], states, t, count, like)
        z_at, z_step, dz_at, dz_step = 0, 0, 0, 0
        if z[ADDRESS]:
            z_at, z_step = _rows(z_tile, pad, _at(z, b, g, c), z[CHANNEL], z[POSITION], width, t, count, like)
            dz_at, dz_step = _room(dz_tile, pad, _at(dz, b, g, c), dz[CHANNEL], dz[POSITION], t, like)
        du_at, du_step = _room(du_tile, pad, _at(du, b, g, c), du[CHANNEL], du[POSITION], t, like)
        ddelta_at, ddelta_step = _room(
            ddelta_tile, pad, _at(ddelta, b, g, c), ddelta[CHANNEL], ddelta[POSITION], t, like
        )

        # Forward again, keeping every state and decay of the chunk.
        saved = _at(views[SAVED], b, g, c) + chunk * views[SAVED, POSITION]
        _gather(h_planes, pad, saved, item, views[SAVED, STATE], width, states, like)
        for i in range(count):
            p = order[t + i]
            h = h_planes + i * plane
            for j in range(0, bytes_, REGISTER_BYTES):
                step = _load(delta_at + p * delta_step, j, bytes_, like) + load(bias + j, like)
                slope = fill(step, 1.0)
                if sizes[SOFTPLUS]:
                    slope = sigmoid(step)
                    step = softplus(step)
                store(step_tile + i * pad + j, step)
                store(slope_tile + i * pad + j, slope)
                x = _load(u_at + p * u_step, j, bytes_, like)
                value = load(d_row + j, like) * x
                x = step * x
                for n in range(states):
                    at = n * pad + j
                    decay = exp2(step * load(a_log2 + at, like))
                    store(decay_planes + i * plane + at, decay)
                    state = x * broadcast(read(b_at + p * b_step + n * item, like))
                    state = fma(decay, load(h + at, like), state)
                    store(h + plane + at, state)
                    if z_at:
                        value = fma(state, broadcast(read(c_at + p * c_step + n * item, like)), value)
                dvalue = _load(dy_at + p * dy_step, j, bytes_, like)
                if z_at:
                    gate = _load(z_at + p * z_step, j, bytes_, like)
                    s = sigmoid(gate)
                    one = fill(s, 1.0)
                    _store(dz_at + p * dz_step, j, bytes_, dvalue * value * s * fma(gate, one - s, one), like)
                    dvalue = dvalue * gate * s
                store(gated_tile + i * pad + j, dvalue)

        # And back.
        for i in range(count - 1, -1, -1):
            p = order[t + i]
            h = h_planes + i * plane
            _zero(db_sums, states * REGISTER_BYTES, like)
            _zero(dc_sums, states * REGISTER_BYTES, like)
            for j in range(0, bytes_, REGISTER_BYTES):
                step = load(step_tile + i * pad + j, like)
                dvalue = load(gated_tile + i * pad + j, like)
                x = _load(u_at + p * u_step, j, bytes_, like)
                driven = step * x
                lam_b = broadcast(like)
                q_a = broadcast(like)
                for n in range(states):
                    at = n * pad + j
                    lam = load(r_plane + at, like)
                    lam = fma(broadcast(read(c_at + p * c_step + n * item, like)), dvalue, lam)
                    r = load(decay_planes + i * plane + at, like) * lam
                    store(r_plane + at, r)
                    q = r * load(h + at, like)
                    store(da_plane + at, fma(q, step, load(da_plane + at, like)))
                    q_a = fma(q, load(a_log2 + at, like), q_a)
                    lam_b = fma(lam, broadcast(read(b_at + p * b_step + n * item, like)), lam_b)
                    k = n * REGISTER_BYTES
                    store(db_sums + k, fma(lam, driven, load(db_sums + k, like)))
                    store(dc_sums + k, fma(dvalue, load(h + plane + at, like), load(dc_sums + k, like)))
                dx = fma(step, lam_b, load(d_row + j, like) * dvalue)
                if accumulate_u:
                    dx = dx + _load(du_at + p * du_step, j, bytes_, like)
                _store(du_at + p * du_step, j, bytes_, dx, like)
                dstep = fma(x, lam_b, q_a * fill(x, LN_2)) * load(slope_tile + i * pad + j, like)
                _store(ddelta_at + p * ddelta_step, j, bytes_, dstep, like)
                store(dbias_row + j, load(dbias_row + j, like) + dstep)
                store(dd_row + j, fma(dvalue, x, load(dd_row + j, like)))
            db_at = _at(views[DB], b, g, part) + p * views[DB, POSITION]
            dc_at = _at(views[DC], b, g, part) + p * views[DC, POSITION]
            for n in range(states):
                k = n * item
                db = total(load(db_sums + n * REGISTER_BYTES, like))
                dc = total(load(dc_sums + n * REGISTER_BYTES, like))
                if accumulate_bc:
                    db += read(db_at + k, like)
                    dc += read(dc_at + k, like)
                write(db_at + k, db)
                write(dc_at + k, dc)

        _put(du_tile, pad, _at(du, b, g, c), du[CHANNEL], du[POSITION], width, t, count, like)
        _put(ddelta_tile, pad, _at(ddelta, b, g, c), ddelta[CHANNEL], ddelta[POSITION], width, t, count, like)
        if z[ADDRESS]:
            _put(dz_tile, pad, _at(dz, b, g, c), dz[CHANNEL], dz[POSITION], width, t, count, like)

    _scatter(da_plane, pad, _at(views[DA], b, g, c), views[DA, CHANNEL], item, width, states, like)
    _scatter(dd_row, pad, _at(views[DD], b, g, c), item, 0, width, 1, like)
    _scatter(dbias_row, pad, _at(views[DBIAS], b, g, c), item, 0, width, 1, like)


def scratch_bytes(block: int, steps: int, states: int, item: int) -> int:
    """Enough scratch for a task of either pass."""
    lanes = REGISTER_BYTES // item
    pad = -(-block // lanes) * REGISTER_BYTES
    planes = (states + lanes) * pad * (3 + 2 * steps + 1)
    tiles = (steps + lanes) * (10 * pad + 2 * (-(-states // lanes)) * REGISTER_BYTES)
    return planes + tiles + 4 * pad + 2 * states * REGISTER_BYTES + 64
