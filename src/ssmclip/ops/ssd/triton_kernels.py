"""Mamba-2's scan and its gradient in Triton: one program per batch element, head and block of its channels.

A program goes along the sequence in chunks, in matrix products as `chunked` does, and carries the state between them in
registers: for the short sequences of a CLIP there is no second pass over chunks. The forward pass saves the state
before each chunk; the backward pass goes from the last chunk to the first.

Q steps of a chunk · P channels · N states. Tiles are [Q, P], [Q, N] and [Q, Q]; the state is [N, P] here and (P, N) in
memory.
"""

from __future__ import annotations

import triton.language as tl

from ssmclip.ops.selective_scan.triton_kernels import decayed, kernel, read


@kernel
def product(a, b, TYPE: tl.constexpr, PRECISION: tl.constexpr):
    return tl.dot(a, b, input_precision=PRECISION, out_dtype=TYPE)


@kernel
def decays(log_decay, Q: tl.constexpr):
    """exp of the steps' sums: from j to i [Q, Q], 0 where j > i; from the start to i; from j to the end; of all.

    Each is a sum of its own, never a difference of two longer ones: a step that forgets all costs the next no digit.
    """
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    sums = tl.cumsum(tl.where(i > j, log_decay[:, None], 0.0), axis=0)
    between = tl.where(i >= j, tl.exp(sums), 0.0)
    to_end = tl.sum(tl.where(i == Q - 1, between, 0.0), axis=0)
    return between, tl.exp(tl.cumsum(log_decay, axis=0)), to_end, tl.exp(tl.sum(log_decay, axis=0))


@kernel
def forward(
    X,
    STEP,
    A,
    B,
    C,
    INITIAL,
    Y,
    LAST,
    SAVED,
    heads,
    heads_of_group,
    width,
    length,
    states,
    blocks,
    x_of_batch,
    x_of_position,
    x_of_head,
    x_of_channel,
    step_of_batch,
    step_of_position,
    step_of_head,
    b_of_batch,
    b_of_position,
    b_of_group,
    b_of_state,
    c_of_batch,
    c_of_position,
    c_of_group,
    c_of_state,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    program = tl.program_id(0)
    batch = (program // (heads * blocks)).to(tl.int64)
    head = program // blocks % heads
    group = head // heads_of_group
    p = program % blocks * P + tl.arange(0, P)
    n = tl.arange(0, N)
    of_state = (n < states)[:, None] & (p < width)[None, :]
    entry = p[None, :] * states + n[:, None]
    chunks = tl.cdiv(length, Q)
    X += batch * x_of_batch + head * x_of_head
    STEP += batch * step_of_batch + head * step_of_head
    B += batch * b_of_batch + group * b_of_group
    C += batch * c_of_batch + group * c_of_group
    Y += (batch * length * heads + head) * width

    rate = tl.load(A + head)
    state = tl.zeros([N, P], TYPE)
    if INITIAL is not None:
        state += tl.load(INITIAL + (batch * heads + head) * width * states + entry, mask=of_state, other=0.0)
    for chunk in range(0, chunks):
        t = chunk * Q + tl.arange(0, Q)
        inside = (t < length)[:, None] & (p < width)[None, :]
        shared = (t < length)[:, None] & (n < states)[None, :]
        step = tl.load(STEP + t * step_of_position, mask=t < length, other=0.0)
        drive = step[:, None] * read(X, t, p, inside, x_of_position, x_of_channel, TYPE)
        b = read(B, t, n, shared, b_of_position, b_of_state, TYPE)
        c = read(C, t, n, shared, c_of_position, c_of_state, TYPE)
        if SAVED is not None:
            saved = ((batch * chunks + chunk) * heads + head) * width * states
            tl.store(SAVED + saved + entry, state, mask=of_state)

        between, from_start, to_end, keep = decays(step * rate, Q)
        mix = product(c, tl.trans(b), TYPE, PRECISION) * between
        y = product(mix, drive, TYPE, PRECISION)
        y += decayed(from_start[:, None], product(c, state, TYPE, PRECISION))
        added = product(tl.trans(b * to_end[:, None]), drive, TYPE, PRECISION)
        state = decayed(keep, state) + added
        tl.store(Y + t[:, None] * heads * width + p[None, :], y, mask=inside)
    if LAST is not None:
        tl.store(LAST + (batch * heads + head) * width * states + entry, state, mask=of_state)


@kernel
def backward(
    DY,
    DLAST,
    X,
    STEP,
    A,
    B,
    C,
    SAVED,
    DX,
    DSTEP,
    DA,
    DB,
    DC,
    DINITIAL,
    batches,
    heads,
    heads_of_group,
    width,
    length,
    states,
    blocks,
    dy_of_batch,
    dy_of_position,
    dy_of_head,
    dy_of_channel,
    x_of_batch,
    x_of_position,
    x_of_head,
    x_of_channel,
    step_of_batch,
    step_of_position,
    step_of_head,
    b_of_batch,
    b_of_position,
    b_of_group,
    b_of_state,
    c_of_batch,
    c_of_position,
    c_of_group,
    c_of_state,
    TYPE: tl.constexpr,
    PRECISION: tl.constexpr,
    Q: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
):
    """DSTEP (block, batch, position, head), DA (block, batch, head), DB and DC (block, batch, position, head, state)

    are added up by the caller, over blocks, and over the heads of a group: no two programs write to one place.
    """
    program = tl.program_id(0)
    batch = (program // (heads * blocks)).to(tl.int64)
    head = program // blocks % heads
    group = head // heads_of_group
    block = program % blocks
    p = block * P + tl.arange(0, P)
    n = tl.arange(0, N)
    i = tl.arange(0, Q)[:, None]
    j = tl.arange(0, Q)[None, :]
    of_state = (n < states)[:, None] & (p < width)[None, :]
    entry = p[None, :] * states + n[:, None]
    whole_state = (batch * heads + head) * width * states
    chunks = tl.cdiv(length, Q)
    DY += batch * dy_of_batch + head * dy_of_head
    X += batch * x_of_batch + head * x_of_head
    STEP += batch * step_of_batch + head * step_of_head
    B += batch * b_of_batch + group * b_of_group
    C += batch * c_of_batch + group * c_of_group
    DX += (batch * length * heads + head) * width

    rate = tl.load(A + head)
    after = tl.zeros([N, P], TYPE)
    if DLAST is not None:
        after += tl.load(DLAST + whole_state + entry, mask=of_state, other=0.0)
    drate = tl.sum(tl.zeros([Q], TYPE), axis=0)
    for back in range(0, chunks):
        chunk = chunks - 1 - back
        t = chunk * Q + tl.arange(0, Q)
        inside = (t < length)[:, None] & (p < width)[None, :]
        shared = (t < length)[:, None] & (n < states)[None, :]
        step = tl.load(STEP + t * step_of_position, mask=t < length, other=0.0)
        x = read(X, t, p, inside, x_of_position, x_of_channel, TYPE)
        dy = read(DY, t, p, inside, dy_of_position, dy_of_channel, TYPE)
        b = read(B, t, n, shared, b_of_position, b_of_state, TYPE)
        c = read(C, t, n, shared, c_of_position, c_of_state, TYPE)
        saved = ((batch * chunks + chunk) * heads + head) * width * states
        before = tl.load(SAVED + saved + entry, mask=of_state, other=0.0)
        drive = step[:, None] * x
        between, from_start, to_end, keep = decays(step * rate, Q)

        mix = product(c, tl.trans(b), TYPE, PRECISION) * between
        dmix = product(dy, tl.trans(drive), TYPE, PRECISION)
        dscores = dmix * between
        reached = product(b, after, TYPE, PRECISION)
        ddrive = product(tl.trans(mix), dy, TYPE, PRECISION) + to_end[:, None] * reached
        dc = product(dscores, b, TYPE, PRECISION)
        dc += from_start[:, None] * product(dy, tl.trans(before), TYPE, PRECISION)
        db = product(tl.trans(dscores), c, TYPE, PRECISION)
        db += to_end[:, None] * product(drive, tl.trans(after), TYPE, PRECISION)

        # A step's logarithm k is in the sums from j < k to i >= k, in those from the start to i >= k and in the whole.
        of_between = tl.where(i > j, dmix * mix, 0.0)
        of_end = to_end * tl.sum(reached * drive, axis=1)
        of_between += tl.where((i == Q - 1) & (i > j), of_end[None, :], 0.0)
        up_to = tl.sum(tl.where(i > j, tl.cumsum(of_between, axis=1), 0.0), axis=0)
        dlog = tl.sum(tl.where(j + 1 == i, up_to[None, :], 0.0), axis=1)
        of_start = from_start * tl.sum(product(c, before, TYPE, PRECISION) * dy, axis=1)
        dlog += tl.cumsum(of_start, axis=0, reverse=True)
        dlog += keep * tl.sum(tl.sum(after * before, axis=1), axis=0)

        drate += tl.sum(dlog * step, axis=0)
        dstep = dlog * rate + tl.sum(ddrive * x, axis=1)
        row = ((block * batches + batch) * length + t) * heads + head
        tl.store(DX + t[:, None] * heads * width + p[None, :], (step[:, None] * ddrive).to(DX.dtype.element_ty), inside)
        tl.store(DSTEP + row, dstep, mask=t < length)
        tl.store(DB + row[:, None] * states + n[None, :], db, mask=shared)
        tl.store(DC + row[:, None] * states + n[None, :], dc, mask=shared)
        after = keep * after + product(tl.trans(c * from_start[:, None]), dy, TYPE, PRECISION)
    tl.store(DA + (block * batches + batch) * heads + head, drate)
    if DINITIAL is not None:
        tl.store(DINITIAL + whole_state + entry, after, mask=of_state)
