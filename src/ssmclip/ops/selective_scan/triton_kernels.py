"""The scan and its gradient in Triton: one program per batch element and block of channels, along the length in chunks.

Inside a chunk all positions are scanned at once (`tl.associative_scan`), between chunks the state is carried. The
forward pass saves the state before each chunk; the backward pass goes from the last chunk to the first and computes
what lies between again, in registers.

Pointers carry capital names, constants of the compilation too; `x_of_batch` is the distance in elements between two
batch elements of x. Tiles are [channel, position, state].

A map is scanned along four directions without being laid out four times: a direction is a group, and `place` says where
on the map a position of its sequence lies. MAP is the number of directions, 0 for sequences.
"""

from __future__ import annotations

import inspect

import triton
import triton.language as tl


def kernel(function):
    """triton.jit for the function itself: the tests' shape checks wrap every function of the package."""
    return triton.jit(inspect.unwrap(function))


@kernel
def decayed(decay, state):
    """decay * state, where nothing that decays by an overflowing factor is still nothing, not NaN."""
    return tl.where(state == 0, 0.0, decay * state)


@kernel
def follow(decay, state, next_decay, next_state):
    """h -> decay h + state, then h -> next_decay h + next_state, as one such step."""
    return decay * next_decay, decayed(next_decay, state) + next_state


@kernel
def follow_before(decay, state, decay_before, before, next_decay, next_state, next_decay_before, next_before):
    """`follow`, with the same step up to but without its last position beside it."""
    return (
        decay * next_decay,
        decayed(next_decay, state) + next_state,
        decay * next_decay_before,
        decayed(next_decay_before, state) + next_before,
    )


@kernel
def softplus(x, TERMS: tl.constexpr):
    """log(1 + exp(x)), to the last digits also where exp(x) is small: log(1 + w) = 2 artanh(w / (2 + w))."""
    w = tl.exp(-tl.abs(x))
    s = w / (2.0 + w)
    series = s * 0.0
    for k in tl.static_range(TERMS):
        series = series * (s * s) + 1.0 / (2 * (TERMS - k) - 1)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@kernel
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@kernel
def at(tile, position, STEPS: tl.constexpr):
    """What a tile holds at one position."""
    here = tl.arange(0, STEPS) == position
    return tl.sum(tl.where(here[None, :, None], tile, 0.0), axis=1)


@kernel
def parameter(X, channel, of_channel, TYPE: tl.constexpr):
    """A number per channel, 0 where there is none."""
    x = (channel * 0).to(TYPE)
    if X is not None:
        x += tl.load(X + channel, mask=of_channel, other=0.0).to(TYPE)
    return x


@kernel
def steps_of(raw, inside, SOFTPLUS: tl.constexpr, TERMS: tl.constexpr):
    """delta after the bias and softplus; outside the sequence 0, which neither decays nor adds."""
    if SOFTPLUS:
        raw = softplus(raw, TERMS)
    return tl.where(inside, raw, 0.0)


@kernel
def place(t, direction, length, rows, columns, MAP: tl.constexpr):
    """Where position t of a sequence lies in memory: at t, or on a map of so many rows and columns.

    Directions as in `ssmclip.ops.cross_scan`: row by row, column by column, and both backwards; of fewer, every second
    one or the first.
    """
    if MAP:
        direction = direction * (4 // MAP)
        t = tl.where(direction < 2, t, length - 1 - t)
        t = tl.where(direction % 2 == 0, t, t % rows * columns + t // rows)
    return t


@kernel
def read(X, row, column, inside, of_row, of_column, TYPE: tl.constexpr):
    """A tile of x, 0 outside."""
    x = tl.load(X + row[:, None] * of_row + column[None, :] * of_column, mask=inside, other=0.0)
    return x.to(TYPE)


@kernel
def write(X, tile, row, column, inside, of_row, of_column):
    tl.store(X + row[:, None] * of_row + column[None, :] * of_column, tile.to(X.dtype.element_ty), mask=inside)


@kernel
def forward(
    U,
    DELTA,
    A,
    B,
    C,
    D,
    Z,
    BIAS,
    Y,
    LAST,
    SAVED,
    groups,
    width,
    length,
    states,
    blocks,
    rows,
    columns,
    u_of_batch,
    u_of_group,
    u_of_channel,
    u_of_position,
    delta_of_batch,
    delta_of_group,
    delta_of_channel,
    delta_of_position,
    b_of_batch,
    b_of_group,
    b_of_position,
    b_of_state,
    c_of_batch,
    c_of_group,
    c_of_position,
    c_of_state,
    z_of_batch,
    z_of_group,
    z_of_channel,
    z_of_position,
    y_of_batch,
    y_of_group,
    y_of_channel,
    y_of_position,
    MAP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TYPE: tl.constexpr,
    TERMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // (blocks * groups)).to(tl.int64)
    group = program // blocks % groups
    within = program % blocks * CHANNELS + tl.arange(0, CHANNELS)
    channel = group * width + within
    n = tl.arange(0, STATES)
    of_channel = within < width
    of_state = of_channel[:, None] & (n < states)[None, :]
    entry = channel[:, None] * states + n[None, :]
    chunks = tl.cdiv(length, STEPS)

    U += batch * u_of_batch + group * u_of_group
    DELTA += batch * delta_of_batch + group * delta_of_group
    B += batch * b_of_batch + group * b_of_group
    C += batch * c_of_batch + group * c_of_group
    Y += batch * y_of_batch + group * y_of_group
    if Z is not None:
        Z += batch * z_of_batch + group * z_of_group
    rate = tl.load(A + entry, mask=of_state, other=0.0).to(TYPE)
    bias = parameter(BIAS, channel, of_channel, TYPE)
    state = tl.zeros([CHANNELS, STATES], TYPE)
    for chunk in range(0, chunks):
        t = chunk * STEPS + tl.arange(0, STEPS)
        inside = of_channel[:, None] & (t < length)[None, :]
        shared = (t < length)[:, None] & (n < states)[None, :]
        p = place(t, group, length, rows, columns, MAP)
        u = read(U, within, p, inside, u_of_channel, u_of_position, TYPE)
        raw = read(DELTA, within, p, inside, delta_of_channel, delta_of_position, TYPE)
        b = read(B, p, n, shared, b_of_position, b_of_state, TYPE)
        c = read(C, p, n, shared, c_of_position, c_of_state, TYPE)
        if SAVED is not None:
            tl.store(SAVED + (batch * chunks + chunk) * groups * width * states + entry, state, mask=of_state)

        step = steps_of(raw + bias[:, None], inside, SOFTPLUS, TERMS)
        decay = tl.exp(step[:, :, None] * rate[:, None, :])
        drive = (step * u)[:, :, None] * b[None, :, :]
        decay, local = tl.associative_scan((decay, drive), 1, follow)
        h = local + decayed(decay, state[:, None, :])
        y = tl.sum(h * c[None, :, :], axis=2)
        state = at(h, STEPS - 1, STEPS)

        if D is not None:
            y += parameter(D, channel, of_channel, TYPE)[:, None] * u
        if Z is not None:
            z = read(Z, within, p, inside, z_of_channel, z_of_position, TYPE)
            y *= z * sigmoid(z)
        write(Y, y, within, p, inside, y_of_channel, y_of_position)
    if LAST is not None:
        tl.store(LAST + batch * groups * width * states + entry, state, mask=of_state)


@kernel
def backward(
    DY,
    DLAST,
    U,
    DELTA,
    A,
    B,
    C,
    D,
    Z,
    BIAS,
    SAVED,
    DU,
    DDELTA,
    DA,
    DB,
    DC,
    DD,
    DZ,
    DBIAS,
    groups,
    width,
    length,
    states,
    blocks,
    batches,
    rows,
    columns,
    dy_of_batch,
    dy_of_group,
    dy_of_channel,
    dy_of_position,
    u_of_batch,
    u_of_group,
    u_of_channel,
    u_of_position,
    delta_of_batch,
    delta_of_group,
    delta_of_channel,
    delta_of_position,
    b_of_batch,
    b_of_group,
    b_of_position,
    b_of_state,
    c_of_batch,
    c_of_group,
    c_of_position,
    c_of_state,
    z_of_batch,
    z_of_group,
    z_of_channel,
    z_of_position,
    du_of_batch,
    du_of_group,
    du_of_channel,
    du_of_position,
    ddelta_of_batch,
    ddelta_of_group,
    ddelta_of_channel,
    ddelta_of_position,
    dz_of_batch,
    dz_of_group,
    dz_of_channel,
    dz_of_position,
    MAP: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    TYPE: tl.constexpr,
    TERMS: tl.constexpr,
    CHANNELS: tl.constexpr,
    STEPS: tl.constexpr,
    STATES: tl.constexpr,
):
    """With g[t] the gradient of h[t]: g[t] = C[t] dy[t] + exp(delta[t+1] A) g[t+1], and last adds its own at the end.

    DA (batch, channel, state), DD and DBIAS (batch, channel), DB and DC (block of channels, batch, group, position,
    state) are added up by the caller: no two programs write to one place, so the sums come out the same every time.
    """
    program = tl.program_id(0)
    batch = (program // (blocks * groups)).to(tl.int64)
    group = program // blocks % groups
    block = program % blocks
    within = block * CHANNELS + tl.arange(0, CHANNELS)
    channel = group * width + within
    n = tl.arange(0, STATES)
    of_channel = within < width
    of_state = of_channel[:, None] & (n < states)[None, :]
    entry = channel[:, None] * states + n[None, :]
    channels = groups * width
    chunks = tl.cdiv(length, STEPS)

    DY += batch * dy_of_batch + group * dy_of_group
    U += batch * u_of_batch + group * u_of_group
    DELTA += batch * delta_of_batch + group * delta_of_group
    B += batch * b_of_batch + group * b_of_group
    C += batch * c_of_batch + group * c_of_group
    DU += batch * du_of_batch + group * du_of_group
    DDELTA += batch * ddelta_of_batch + group * ddelta_of_group
    if Z is not None:
        Z += batch * z_of_batch + group * z_of_group
        DZ += batch * dz_of_batch + group * dz_of_group
    rate = tl.load(A + entry, mask=of_state, other=0.0).to(TYPE)
    skip = parameter(D, channel, of_channel, TYPE)[:, None]
    bias = parameter(BIAS, channel, of_channel, TYPE)
    after = tl.zeros([CHANNELS, STATES], TYPE)
    if DLAST is not None:
        after += tl.load(DLAST + batch * channels * states + entry, mask=of_state, other=0.0).to(TYPE)
    drate = tl.zeros([CHANNELS, STATES], TYPE)
    dskip = tl.zeros([CHANNELS], TYPE)
    dbias = tl.zeros([CHANNELS], TYPE)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        t = chunk * STEPS + tl.arange(0, STEPS)
        inside = of_channel[:, None] & (t < length)[None, :]
        shared = (t < length)[:, None] & (n < states)[None, :]
        p = place(t, group, length, rows, columns, MAP)
        u = read(U, within, p, inside, u_of_channel, u_of_position, TYPE)
        dy = read(DY, within, p, inside, dy_of_channel, dy_of_position, TYPE)
        raw = read(DELTA, within, p, inside, delta_of_channel, delta_of_position, TYPE) + bias[:, None]
        b = read(B, p, n, shared, b_of_position, b_of_state, TYPE)[None, :, :]
        c = read(C, p, n, shared, c_of_position, c_of_state, TYPE)[None, :, :]
        state = tl.load(SAVED + (batch * chunks + chunk) * channels * states + entry, mask=of_state, other=0.0)

        # The states again: what is left of the one before each position, and the one at it.
        step = steps_of(raw, inside, SOFTPLUS, TERMS)
        decay = tl.exp(step[:, :, None] * rate[:, None, :])
        drive = (step * u)[:, :, None] * b
        nothing = tl.zeros([CHANNELS, STEPS, STATES], TYPE)
        _, _, left, local = tl.associative_scan((decay, drive, nothing + 1.0, nothing), 1, follow_before)
        kept = decayed(decay, local + decayed(left, state[:, None, :]))
        h = kept + drive

        if Z is not None:
            z = read(Z, within, p, inside, z_of_channel, z_of_position, TYPE)
            y = tl.sum(h * c, axis=2) + skip * u
            gate = sigmoid(z)
            dz = dy * y * gate * (1.0 + z * (1.0 - gate))
            write(DZ, dz, within, p, inside, dz_of_channel, dz_of_position)
            dy = dy * z * gate

        # decay[t] g[t] is what reaches the state before t: a scan from the end of (decay, decay C dy).
        dh = dy[:, :, None] * c
        source = decayed(decay, dh)
        _, _, left, local = tl.associative_scan((decay, source, nothing + 1.0, nothing), 1, follow_before, reverse=True)
        g = dh + local + decayed(left, after[:, None, :])
        after = at(decayed(decay, g), 0, STEPS)

        ddrive = tl.sum(g * b, axis=2)
        du = ddrive * step + skip * dy
        dstep = ddrive * u + tl.sum(g * kept * rate[:, None, :], axis=2)
        if SOFTPLUS:
            dstep *= sigmoid(raw)
        dstep = tl.where(inside, dstep, 0.0)
        dskip += tl.sum(dy * u, axis=1)
        dbias += tl.sum(dstep, axis=1)
        drate += tl.sum(g * kept * step[:, :, None], axis=1)
        write(DU, du, within, p, inside, du_of_channel, du_of_position)
        write(DDELTA, dstep, within, p, inside, ddelta_of_channel, ddelta_of_position)
        row = ((block * batches + batch) * groups + group) * length + p
        shared_at = row[:, None] * states + n[None, :]
        tl.store(DB + shared_at, tl.sum(g * (step * u)[:, :, None], axis=0), mask=shared)
        tl.store(DC + shared_at, tl.sum(h * dy[:, :, None], axis=0), mask=shared)
    tl.store(DA + batch * channels * states + entry, drate, mask=of_state)
    if D is not None:
        tl.store(DD + batch * channels + channel, dskip, mask=of_channel)
    if BIAS is not None:
        tl.store(DBIAS + batch * channels + channel, dbias, mask=of_channel)
