"""The arithmetic of the scan on tiles: positions x channels in scratch memory, a whole number of registers per row.

Every address and stride is in bytes. `pad` is the distance between two rows of a tile (and of h, A, decay: states x
channels); `plane` the distance between the states of two positions. Each loop is short enough for its constants to
stay in registers, which is why it is a function of its own.
"""

from __future__ import annotations

from ssmclip.ops.simd import (
    REGISTER_BYTES,
    absolute,
    broadcast,
    compiled,
    fill,
    fma,
    largest,
    load,
    maximum,
    prefetch,
    read,
    size_of,
    store,
    total,
    write,
)
from ssmclip.ops.vector_math import LOG2_E, exp2, exp2_near, sigmoid, softplus_and_sigmoid

LN_2 = 1 / LOG2_E
AHEAD = 2  # positions

loop = compiled(no_cpython_wrapper=True, no_cfunc_wrapper=True)


def _preparation(back):
    """prepare, or prepare_back, which writes softplus' derivative in place of the value."""

    @loop
    def prepare(order, t, count, pad, u_at, u_step, delta_at, delta_step, bias, d_row, soft, step, driven, third, like):
        """step = softplus(delta + bias), driven = step u, third = D u, for the positions order[t : t + count].

        Returns the largest absolute step, of those that are numbers.
        """
        reach = broadcast(like)
        for i in range(count):
            p, ahead = order[t + i], order[min(t + i + AHEAD, t + count - 1)]
            for j in range(0, pad, REGISTER_BYTES):
                prefetch(u_at + ahead * u_step + j)
                prefetch(delta_at + ahead * delta_step + j)
                x = load(u_at + p * u_step + j, like)
                s = load(delta_at + p * delta_step + j, like) + load(bias + j, like)
                if soft:
                    s, slope = softplus_and_sigmoid(s)
                    if back:
                        store(third + i * pad + j, slope)
                reach = maximum(absolute(s), reach)
                store(step + i * pad + j, s)
                store(driven + i * pad + j, s * x)
                if not back:
                    store(third + i * pad + j, x * load(d_row + j, like))
        return largest(reach)

    return prepare


prepare, prepare_back = _preparation(False), _preparation(True)


def _recurrences(power, one):
    """(scan, replay) with this function for 2^x; one: for a single state, which needs fewer addresses."""

    @loop
    def scan(order, t, count, states, pad, step, driven, value, a_log2, h, b_at, b_step, c_at, c_step, like):
        """h = exp(step A) h + driven B;  value += C h."""
        item = size_of(like)
        for i in range(count):
            b, c = b_at + order[t + i] * b_step, c_at + order[t + i] * c_step
            for j in range(0, pad, REGISTER_BYTES):
                s = load(step + i * pad + j, like)
                x = load(driven + i * pad + j, like)
                y = load(value + i * pad + j, like)
                for n in range(1 if one else states):
                    at = n * pad + j
                    state = fma(
                        power(s * load(a_log2 + at, like)), load(h + at, like), x * broadcast(read(b + n * item, like))
                    )
                    store(h + at, state)
                    y = fma(state, broadcast(read(c + n * item, like)), y)
                store(value + i * pad + j, y)

    @loop
    def replay(order, t, count, states, pad, plane, step, driven, a_log2, h, decay, b_at, b_step, like):
        """`scan` from the state in h, keeping the states of position i at h + (i + 1) plane and its decays."""
        item = size_of(like)
        for i in range(count):
            b = b_at + order[t + i] * b_step
            for j in range(0, pad, REGISTER_BYTES):
                s = load(step + i * pad + j, like)
                x = load(driven + i * pad + j, like)
                for n in range(1 if one else states):
                    at = n * pad + j
                    a = power(s * load(a_log2 + at, like))
                    store(decay + i * plane + at, a)
                    state = fma(a, load(h + i * plane + at, like), x * broadcast(read(b + n * item, like)))
                    store(h + (i + 1) * plane + at, state)

    return scan, replay


scan, replay = _recurrences(exp2, False)
# Where no step of the tile times A / log 2 exceeds NEAR: 10 % faster.
scan_near, replay_near = _recurrences(exp2_near, False)
scan_near_one, replay_near_one = _recurrences(exp2_near, True)


@loop
def read_out(order, t, count, states, pad, plane, u_at, u_step, d_row, h, c_at, c_step, value, like):
    """value = D u + C h, from the states that `replay` keeps."""
    item = size_of(like)
    for i in range(count):
        p = order[t + i]
        for j in range(0, pad, REGISTER_BYTES):
            y = load(u_at + p * u_step + j, like) * load(d_row + j, like)
            for n in range(states):
                state = load(h + (i + 1) * plane + n * pad + j, like)
                y = fma(state, broadcast(read(c_at + p * c_step + n * item, like)), y)
            store(value + i * pad + j, y)


@loop
def magnitude(at, count, like):
    """The largest absolute value in `count` bytes, of those that are numbers."""
    m = broadcast(like)
    for j in range(0, count, REGISTER_BYTES):
        m = maximum(absolute(load(at + j, like)), m)
    return largest(m)


@loop
def gate(order, t, count, pad, z_at, z_step, value, like):
    """value *= silu(z)."""
    for i in range(count):
        for j in range(0, pad, REGISTER_BYTES):
            z = load(z_at + order[t + i] * z_step + j, like)
            store(value + i * pad + j, load(value + i * pad + j, like) * z * sigmoid(z))


@loop
def gate_back(order, t, count, pad, z_at, z_step, value, dvalue, dz, like):
    """dz = dvalue value silu'(z);  dvalue *= silu(z)."""
    for i in range(count):
        for j in range(0, pad, REGISTER_BYTES):
            z = load(z_at + order[t + i] * z_step + j, like)
            s = sigmoid(z)
            one = fill(z, 1.0)
            d = load(dvalue + i * pad + j, like)
            store(dz + i * pad + j, d * load(value + i * pad + j, like) * s * fma(z, one - s, one))
            store(dvalue + i * pad + j, d * z * s)


@loop
def take(order, t, count, pad, at, row, tile, like):
    """tile = the rows at the positions order[t : t + count]."""
    for i in range(count):
        start, ahead = at + order[t + i] * row, at + order[min(t + i + AHEAD, t + count - 1)] * row
        for j in range(0, pad, REGISTER_BYTES):
            prefetch(ahead + j)
            store(tile + i * pad + j, load(start + j, like))


@loop
def give(order, t, count, pad, at, row, tile, accumulate, like):
    """The rows at the positions order[t : t + count] = tile, or += tile."""
    for i in range(count):
        to = at + order[t + i] * row
        for j in range(0, pad, REGISTER_BYTES):
            v = load(tile + i * pad + j, like)
            if accumulate:
                v = v + load(to + j, like)
            store(to + j, v)


@loop
def walk_back(
    order, t, count, pad, plane, step, driven, dvalue, a_log2, h, decay, r, da,
    b_at, b_step, c_at, c_step, db_at, dc_at, dbc_step, accumulate, lam_b, q_a, states, sums, like,
):  # fmt: skip
    """lam = C dy + r;  r = decay lam;  q = r h[t-1];  da += q step;  lam_b = sum of lam B;  q_a = sum of q A / log 2.

    dB and dC of a position are sums over channels, gathered in the registers at `sums`, then over lanes.
    """
    item = size_of(like)
    for i in range(count - 1, -1, -1):
        p = order[t + i]
        b, c = b_at + p * b_step, c_at + p * c_step
        for n in range(2 * states):
            store(sums + n * REGISTER_BYTES, broadcast(like))
        for j in range(0, pad, REGISTER_BYTES):
            s = load(step + i * pad + j, like)
            x = load(driven + i * pad + j, like)
            d = load(dvalue + i * pad + j, like)
            lb = broadcast(like)
            qa = broadcast(like)
            for n in range(states):
                at = n * pad + j
                lam = fma(broadcast(read(c + n * item, like)), d, load(r + at, like))
                back = lam * load(decay + i * plane + at, like)
                q = back * load(h + i * plane + at, like)
                store(r + at, back)
                store(da + at, fma(q, s, load(da + at, like)))
                qa = fma(q, load(a_log2 + at, like), qa)
                lb = fma(lam, broadcast(read(b + n * item, like)), lb)
                k = sums + 2 * n * REGISTER_BYTES
                store(k, fma(lam, x, load(k, like)))
                k += REGISTER_BYTES
                store(k, fma(d, load(h + (i + 1) * plane + at, like), load(k, like)))
            store(lam_b + i * pad + j, lb)
            store(q_a + i * pad + j, qa)
        for n in range(states):
            db = total(load(sums + 2 * n * REGISTER_BYTES, like))
            dc = total(load(sums + (2 * n + 1) * REGISTER_BYTES, like))
            at = p * dbc_step + n * item
            if accumulate:
                db += read(db_at + at, like)
                dc += read(dc_at + at, like)
            write(db_at + at, db)
            write(dc_at + at, dc)


@loop
def walk_back_one(
    order, t, count, pad, plane, step, driven, dvalue, a_log2, h, decay, r, da,
    b_at, b_step, c_at, c_step, db_at, dc_at, dbc_step, accumulate, lam_b, q_a, like,
):  # fmt: skip
    """`walk_back` for a single state, whose sums stay in registers."""
    for i in range(count - 1, -1, -1):
        p = order[t + i]
        b, c = broadcast(read(b_at + p * b_step, like)), broadcast(read(c_at + p * c_step, like))
        db, dc = broadcast(like), broadcast(like)
        for j in range(0, pad, REGISTER_BYTES):
            d = load(dvalue + i * pad + j, like)
            lam = fma(c, d, load(r + j, like))
            back = lam * load(decay + i * plane + j, like)
            q = back * load(h + i * plane + j, like)
            store(r + j, back)
            store(da + j, fma(q, load(step + i * pad + j, like), load(da + j, like)))
            store(lam_b + i * pad + j, lam * b)
            store(q_a + i * pad + j, q * load(a_log2 + j, like))
            db = fma(lam, load(driven + i * pad + j, like), db)
            dc = fma(d, load(h + (i + 1) * plane + j, like), dc)
        at = p * dbc_step
        write(db_at + at, total(db) + (read(db_at + at, like) if accumulate else like))
        write(dc_at + at, total(dc) + (read(dc_at + at, like) if accumulate else like))


@loop
def finish_back(
    order, t, count, pad, u_at, u_step, d_row, soft, step, slope, dvalue, lam_b, q_a, dbias, dd, like,
):  # fmt: skip
    """lam_b becomes du = D dy + step lam_b, q_a becomes ddelta = (u lam_b + q_a log 2) slope."""
    for i in range(count):
        p = order[t + i]
        for j in range(0, pad, REGISTER_BYTES):
            x = load(u_at + p * u_step + j, like)
            d = load(dvalue + i * pad + j, like)
            lb = load(lam_b + i * pad + j, like)
            dstep = fma(x, lb, load(q_a + i * pad + j, like) * fill(x, LN_2))
            if soft:
                dstep = dstep * load(slope + i * pad + j, like)
            store(lam_b + i * pad + j, fma(load(step + i * pad + j, like), lb, load(d_row + j, like) * d))
            store(q_a + i * pad + j, dstep)
            store(dbias + j, load(dbias + j, like) + dstep)
            store(dd + j, fma(d, x, load(dd + j, like)))
