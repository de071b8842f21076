"""The scan and its gradient for one CPU core, vectorised over channels, for sequences and for maps.

batch b · group g · channel c of a group · position p · state n · step t of a sequence, position order[t]

    decay = exp(delta A);  h = decay h + delta B u;  y = C h + D u, times silu(z)

Every tensor is a row of `views`: its address and the bytes between neighbours in batch, group, channel, position and
state. A stride of 0 shares a tensor over an axis: with `merge` (maps), u and y are shared by the groups, which are
orders of reading one map, and y and the gradient of u are sums over them.

A task is a batch element, one group (all of them with `merge`) and a run of blocks of channels. The state of a block
stays in the first-level cache. Channels must be neighbours in memory for the vectors: where they are not, `steps`
positions at a time are transposed through scratch. The forward pass saves the state every `steps` positions; the
backward pass starts from there, keeps the states of `steps` positions in the second-level cache, and walks back:

    lam = C dy + r;  r = decay lam;  dB = lam delta u;  dC = dy h;  q = r h[t-1] = d(delta A)
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from ssmclip.ops import simd, vector_math
from ssmclip.ops.selective_scan import loops
from ssmclip.ops.selective_scan.loops import loop
from ssmclip.ops.simd import (
    REGISTER_BYTES,
    broadcast,
    entry_point,
    fill,
    load,
    load_part,
    load_transposed,
    prefetch,
    read,
    size_of,
    store,
    store_part,
    write,
)
from ssmclip.ops.vector_math import LOG2_E, NEAR

# Rows of `views`. In SAVED a position is a saved state, in DB and DC a channel is a slice of them.
U, DELTA, Z, Y, A, B, C, D, BIAS, SAVED, LAST, DY, DU, DDELTA, DZ, DA, DB, DC, DD, DBIAS, DLAST = range(21)
NAMES = "U DELTA Z Y A B C D BIAS SAVED LAST DY DU DDELTA DZ DA DB DC DD DBIAS DLAST"
VIEWS = {name: row for row, name in enumerate(NAMES.split())}

# Columns of `views`: bytes, except the address. An address of 0 is a tensor that is not there.
ADDRESS, BATCH, GROUP, CHANNEL, POSITION, STATE = range(6)

# `sizes`
GROUPS, WIDTH, LENGTH, STATES, BLOCK, STEPS, SLICES, MERGE, SOFTPLUS = range(9)


# ---- between the tensors and scratch, where a row holds the channels of one position or one state


@loop
def _ask_for(address, step, count):
    """Have the cache fetch `count` lines `step` bytes apart: a tile has too few of each row to be foreseen."""
    for i in range(count):
        prefetch(address + i * step)


@loop
def _gather(scratch, pad, address, channel, row, width, rows, like):
    """Copy `rows` rows of `width` channels, `row` and `channel` bytes apart, into rows `pad` bytes apart, 0 beyond."""
    item = size_of(like)
    lanes = REGISTER_BYTES // item
    if channel == item:
        for r in range(rows):
            for c in range(0, width, lanes):
                part = load_part(address + r * row + c * item, like, width - c)
                store(scratch + r * pad + c * item, part)
        return
    whole_rows, whole_width = 0, 0
    if row == item:
        whole_rows, whole_width = rows // lanes * lanes, width // lanes * lanes
        for c in range(0, whole_width, lanes):
            for r in range(0, whole_rows, lanes):
                at = address + c * channel + r * item
                _ask_for(at + rows * item, channel, lanes)  # for the next call
                block = load_transposed(at, channel, like)
                for i in range(lanes):
                    store(scratch + (r + i) * pad + c * item, block[i])
    for r in range(rows):
        for c in range(whole_width if r < whole_rows else 0, pad // item):
            value = read(address + r * row + c * channel, like) if c < width else like
            write(scratch + r * pad + c * item, value)


@loop
def _scatter(scratch, pad, address, channel, row, width, rows, like):
    """The way back of `_gather`."""
    item = size_of(like)
    lanes = REGISTER_BYTES // item
    if channel == item:
        for r in range(rows):
            for c in range(0, width, lanes):
                store_part(address + r * row + c * item, load(scratch + r * pad + c * item, like), width - c)
        return
    whole_rows, whole_width = 0, 0
    if row == item:
        whole_rows, whole_width = rows // lanes * lanes, width // lanes * lanes
        for c in range(0, whole_width, lanes):
            for r in range(0, whole_rows, lanes):
                block = load_transposed(scratch + r * pad + c * item, pad, like)
                for i in range(lanes):
                    store(address + (c + i) * channel + r * item, block[i])
    for r in range(rows):
        for c in range(whole_width if r < whole_rows else 0, width):
            write(address + r * row + c * channel, read(scratch + r * pad + c * item, like))


@loop
def _at(views, row, b, g, c):
    view = views[row]
    return view[ADDRESS] + b * view[BATCH] + g * view[GROUP] + c * view[CHANNEL]


@loop
def _in_place(views, row, width, pad, like):
    """Whether the rows of a tensor can be read as vectors where they are."""
    return views[row, CHANNEL] == size_of(like) and width * size_of(like) == pad


@loop
def _rows(views, row, b, g, c, scratch, pad, width, first, count, like):
    """(address, step): row p of channels lies at address + p step, for p in first .. first + count - 1."""
    at, step = _at(views, row, b, g, c), views[row, POSITION]
    if _in_place(views, row, width, pad, like):
        return at, step
    _gather(scratch, pad, at + first * step, views[row, CHANNEL], step, width, count, like)
    return scratch - first * pad, pad


@loop
def _state_rows(views, row, b, g, scratch, pad, states, first, count, like):
    """As `_rows`, for B and C: row p holds the states of position p."""
    at, step = _at(views, row, b, g, 0), views[row, POSITION]
    if views[row, STATE] == size_of(like) or states == 1:
        return at, step
    _gather(scratch, pad, at + first * step, views[row, STATE], step, states, count, like)
    return scratch - first * pad, pad


@loop
def _put(views, row, b, g, c, tile, pad, width, order, first, count, accumulate, like):
    """Write the tile of the positions order[first : first + count] to where it belongs."""
    at, step = _at(views, row, b, g, c), views[row, POSITION]
    if _in_place(views, row, width, pad, like):
        loops.give(order, first, count, pad, at, step, tile, accumulate, like)
    else:
        _scatter(tile, pad, at + first * step, views[row, CHANNEL], step, width, count, like)


@loop
def _planes(views, row, b, g, c, scratch, pad, width, states, like):
    """A (channels, states) tensor as states x channels; zeros where there is none."""
    if views[row, ADDRESS]:
        at = _at(views, row, b, g, c)
        _gather(scratch, pad, at, views[row, CHANNEL], views[row, STATE], width, states, like)
    else:
        for j in range(0, states * pad, REGISTER_BYTES):
            store(scratch + j, broadcast(like))


@loop
def _parameters(views, b, g, c, a_log2, d_row, bias, pad, width, states, like):
    """A / log 2, D and the bias of a block, in scratch."""
    _planes(views, A, b, g, c, a_log2, pad, width, states, like)
    for j in range(0, states * pad, REGISTER_BYTES):
        v = load(a_log2 + j, like)
        store(a_log2 + j, v * fill(v, LOG2_E))
    _planes(views, D, b, g, c, d_row, pad, width, 1, like)
    _planes(views, BIAS, b, g, c, bias, pad, width, 1, like)


@loop
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


@loop
def _pad(count, like):
    """Bytes of the registers that hold `count` scalars."""
    return (count * size_of(like) + REGISTER_BYTES - 1) // REGISTER_BYTES * REGISTER_BYTES


# ---- forward


@loop
def _forward_block(views, sizes, order, base, b, g, c, accumulate, like):
    length, states, steps = sizes[LENGTH], sizes[STATES], sizes[STEPS]
    width = min(sizes[BLOCK], sizes[WIDTH] - c)
    pad, pad_bc = _pad(width, like), _pad(states, like)
    tile, tile_bc = steps * pad, steps * pad_bc
    h = base
    a_log2 = h + states * pad
    d_row = a_log2 + states * pad
    bias = d_row + pad
    step = bias + pad
    driven = step + tile
    value = driven + tile
    u_tile = value + tile
    delta_tile = u_tile + tile
    b_tile = delta_tile + tile
    c_tile = b_tile + tile_bc

    for j in range(0, states * pad, REGISTER_BYTES):
        store(h + j, broadcast(like))
    _parameters(views, b, g, c, a_log2, d_row, bias, pad, width, states, like)
    a_reach = loops.magnitude(a_log2, states * pad, like)
    for t in range(0, length, steps):
        count = min(steps, length - t)
        if views[SAVED, ADDRESS]:
            at = _at(views, SAVED, b, g, c) + t // steps * views[SAVED, POSITION]
            _scatter(h, pad, at, size_of(like), views[SAVED, STATE], width, states, like)
        u_at, u_step = _rows(views, U, b, g, c, u_tile, pad, width, t, count, like)
        delta_at, delta_step = _rows(views, DELTA, b, g, c, delta_tile, pad, width, t, count, like)
        b_at, b_step = _state_rows(views, B, b, g, b_tile, pad_bc, states, t, count, like)
        c_at, c_step = _state_rows(views, C, b, g, c_tile, pad_bc, states, t, count, like)
        reach = loops.prepare(
            order, t, count, pad, u_at, u_step, delta_at, delta_step, bias, d_row, sizes[SOFTPLUS], step, driven, value,
            like,
        )  # fmt: skip
        run = order, t, count, states, pad, step, driven, value, a_log2, h, b_at, b_step, c_at, c_step, like
        near = reach * a_reach < NEAR
        if near and states == 1:
            loops.scan_near_one(*run)
        elif near:
            loops.scan_near(*run)
        else:
            loops.scan(*run)
        if views[Z, ADDRESS]:
            z_at, z_step = _rows(views, Z, b, g, c, u_tile, pad, width, t, count, like)
            loops.gate(order, t, count, pad, z_at, z_step, value, like)
        _put(views, Y, b, g, c, value, pad, width, order, t, count, accumulate, like)

    if views[LAST, ADDRESS]:
        _scatter(h, pad, _at(views, LAST, b, g, c), views[LAST, CHANNEL], views[LAST, STATE], width, states, like)


# ---- backward


@loop
def _backward_block(views, sizes, order, base, b, g, c, part, accumulate_u, accumulate_bc, like):
    item, length, states, steps = size_of(like), sizes[LENGTH], sizes[STATES], sizes[STEPS]
    width = min(sizes[BLOCK], sizes[WIDTH] - c)
    pad, pad_bc = _pad(width, like), _pad(states, like)
    plane, tile, tile_bc = states * pad, steps * pad, steps * pad_bc
    da = base
    r = da + plane
    a_log2 = r + plane
    d_row = a_log2 + plane
    bias = d_row + pad
    dd = bias + pad
    dbias = dd + pad
    sums = dbias + pad
    step = sums + 2 * states * REGISTER_BYTES
    driven = step + tile
    value = driven + tile
    slope = value + tile
    dvalue = slope + tile
    lam_b = dvalue + tile
    q_a = lam_b + tile
    u_tile = q_a + tile
    delta_tile = u_tile + tile
    b_tile = delta_tile + tile
    c_tile = b_tile + tile_bc
    h = c_tile + tile_bc
    decay = h + (steps + 1) * plane

    for j in range(0, states * pad, REGISTER_BYTES):
        store(da + j, broadcast(like))
    for j in range(0, 2 * pad, REGISTER_BYTES):
        store(dd + j, broadcast(like))
    _planes(views, DLAST, b, g, c, r, pad, width, states, like)
    _parameters(views, b, g, c, a_log2, d_row, bias, pad, width, states, like)
    a_reach = loops.magnitude(a_log2, states * pad, like)

    for chunk in range((length + steps - 1) // steps - 1, -1, -1):
        t = chunk * steps
        count = min(steps, length - t)
        saved = _at(views, SAVED, b, g, c) + chunk * views[SAVED, POSITION]
        _gather(h, pad, saved, item, views[SAVED, STATE], width, states, like)
        u_at, u_step = _rows(views, U, b, g, c, u_tile, pad, width, t, count, like)
        delta_at, delta_step = _rows(views, DELTA, b, g, c, delta_tile, pad, width, t, count, like)
        b_at, b_step = _state_rows(views, B, b, g, b_tile, pad_bc, states, t, count, like)
        c_at, c_step = _state_rows(views, C, b, g, c_tile, pad_bc, states, t, count, like)
        reach = loops.prepare_back(
            order, t, count, pad, u_at, u_step, delta_at, delta_step, bias, d_row, sizes[SOFTPLUS], step, driven, slope,
            like,
        )  # fmt: skip
        run = order, t, count, states, pad, plane, step, driven, a_log2, h, decay, b_at, b_step, like
        near = reach * a_reach < NEAR
        if near and states == 1:
            loops.replay_near_one(*run)
        elif near:
            loops.replay_near(*run)
        else:
            loops.replay(*run)
        dy_at, dy_step = _rows(views, DY, b, g, c, lam_b, pad, width, t, count, like)
        loops.take(order, t, count, pad, dy_at, dy_step, dvalue, like)
        if views[Z, ADDRESS]:
            loops.read_out(order, t, count, states, pad, plane, u_at, u_step, d_row, h, c_at, c_step, value, like)
            z_at, z_step = _rows(views, Z, b, g, c, lam_b, pad, width, t, count, like)
            loops.gate_back(order, t, count, pad, z_at, z_step, value, dvalue, q_a, like)
            _put(views, DZ, b, g, c, q_a, pad, width, order, t, count, False, like)
        tiles = step, driven, dvalue, a_log2, h, decay, r, da
        sequences = b_at, b_step, c_at, c_step, _at(views, DB, b, g, part), _at(views, DC, b, g, part)
        back = order, t, count, pad, plane, *tiles, *sequences, views[DB, POSITION], accumulate_bc, lam_b, q_a
        if states == 1:
            loops.walk_back_one(*back, like)
        else:
            loops.walk_back(*back, states, sums, like)
        loops.finish_back(
            order, t, count, pad, u_at, u_step, d_row, sizes[SOFTPLUS], step, slope, dvalue, lam_b, q_a, dbias, dd, like
        )
        _put(views, DU, b, g, c, lam_b, pad, width, order, t, count, accumulate_u, like)
        _put(views, DDELTA, b, g, c, q_a, pad, width, order, t, count, False, like)

    _scatter(da, pad, _at(views, DA, b, g, c), views[DA, CHANNEL], views[DA, STATE], width, states, like)
    _scatter(dd, pad, _at(views, DD, b, g, c), item, 0, width, 1, like)
    _scatter(dbias, pad, _at(views, DBIAS, b, g, c), item, 0, width, 1, like)


# ---- entry points


# (views, sizes, order, scratch, first, last, like): the tasks first to last of a pass. order: (1 or groups, length);
# scratch: `scratch_bytes` of memory; like: a zero of the scalar type. Numba keeps what it compiled until the file with
# the entry point changes and looks at no other file, but it does look at what a function closes over: `sources`.


def _forward_entry(sources: int):
    def forward(views, sizes, order, scratch, first, last, like):
        if sources == 0:
            return
        base = (scratch.ctypes.data + 63) // 64 * 64
        for task in range(first, last):
            b, g_first, g_end, _, block_first, block_end = _task(sizes, task)
            for block in range(block_first, block_end):
                for g in range(g_first, g_end):
                    turn = order[g if sizes[MERGE] else 0]
                    _forward_block(views, sizes, turn, base, b, g, block * sizes[BLOCK], g > g_first, like)

    return entry_point(forward)


def _backward_entry(sources: int):
    def backward(views, sizes, order, scratch, first, last, like):
        if sources == 0:
            return
        base = (scratch.ctypes.data + 63) // 64 * 64
        for task in range(first, last):
            b, g_first, g_end, part, block_first, block_end = _task(sizes, task)
            for block in range(block_first, block_end):
                c = block * sizes[BLOCK]
                for g in range(g_first, g_end):
                    turn = order[g if sizes[MERGE] else 0]
                    _backward_block(views, sizes, turn, base, b, g, c, part, g > g_first, block > block_first, like)

    return entry_point(backward)


def _fingerprint() -> int:
    sources = [Path(module.__file__).read_bytes() for module in (simd, vector_math, loops)] + [
        Path(__file__).read_bytes()
    ]
    return int.from_bytes(hashlib.sha256(b"".join(sources)).digest()[:7], "little") + 1


forward, backward = _forward_entry(_fingerprint()), _backward_entry(_fingerprint())


def scratch_bytes(block: int, steps: int, states: int, item: int) -> int:
    """Enough scratch for a task of either pass."""
    pad = -(-block * item // REGISTER_BYTES) * REGISTER_BYTES
    pad_bc = -(-states * item // REGISTER_BYTES) * REGISTER_BYTES
    planes = (3 + 2 * steps + 1) * states * pad
    tiles = steps * (9 * pad + 2 * pad_bc)
    return planes + tiles + 4 * pad + 2 * states * REGISTER_BYTES + 64
