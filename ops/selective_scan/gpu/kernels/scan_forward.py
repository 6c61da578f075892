"""Triton kernel of the selective scan, forward: scan, skip, sum of the directions, gate.

B images, L tokens, E inner channels, N states, G directions (1 or 2).

A thread walks one channel of an image through time and holds its states as N values of their own:
in a tile [N, BLOCK] Triton would choose who holds what, and choose lanes or warps that exchange
them at every step. B and C of a token are the same for all threads; they are read as 64-bit words
where they are aligned (PACKED). STEPS steps make a turn, whose loads are issued at its start.
Neither BLOCK nor STEPS changes a bit of the result.

Routing costs nothing: `_length` is the loop bound of an image and direction, 0 where the direction
is off. The reversed direction starts at the last of these tokens; nothing is gathered or flipped.

For the backward pass the state is kept every CHUNK steps.
"""

import triton
import triton.language as tl

from .common import LOG2E, _length, _load_channels, _masked_step, _row, _sigmoid

# What `_walk` does with the scan's outputs.
NOTHING = tl.constexpr(0)  # leaves them out: only the state matters
STORE = tl.constexpr(1)  # the sum of one direction, for another kernel or direction to add to
FINISH = tl.constexpr(2)  # adds what the other direction stored, and gates


@triton.jit
def _halves(word, dtype: tl.constexpr):
    """The two numbers of 16 bits in an int32 as float32."""
    if dtype == tl.bfloat16:
        low, high = word << 16, word & -65536
        return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)
    else:
        low, high = word.to(tl.int16), (word >> 16).to(tl.int16)
        return (
            low.to(tl.float16, bitcast=True).to(tl.float32),
            high.to(tl.float16, bitcast=True).to(tl.float32),
        )


@triton.jit
def _load_bc(bc, N: tl.constexpr, PACKED: tl.constexpr):
    """B, then C of a token, 2N float32."""
    values = ()
    if not PACKED:
        for i in tl.static_range(2 * N):
            values = values + (tl.load(bc + i).to(tl.float32),)
    else:
        words = bc.to(tl.pointer_type(tl.int64), bitcast=True)
        size: tl.constexpr = bc.dtype.element_ty.primitive_bitwidth // 8
        for i in tl.static_range(N * size // 4):
            word = tl.load(words + i)
            low, high = word.to(tl.int32), (word >> 32).to(tl.int32)
            if size == 2:
                values = values + _halves(low, bc.dtype.element_ty)
                values = values + _halves(high, bc.dtype.element_ty)
            else:
                values = values + (
                    low.to(tl.float32, bitcast=True),
                    high.to(tl.float32, bitcast=True),
                )
    return values


@triton.jit
def _load_weights(A, D, dt_bias, direction, E, c, inside, N: tl.constexpr):
    """Of a direction, per channel: decay rates (N of them, in powers of two), skip, step bias."""
    a = ()
    for k in tl.static_range(N):
        a = a + (_load_channels(A + (direction * N + k) * E, 1, c, inside) * LOG2E,)
    skip = _load_channels(D + direction * E, 1, c, inside)
    return a, skip, _load_channels(dt_bias + direction * E, 1, c, inside)


@triton.jit
def _walk(
    h,
    begin,
    end,
    n,
    reverse,
    u,
    dt,
    bc,
    stride_bc,
    mask,
    weights,
    gate,
    z,
    stride_z,
    part,
    out,
    checkpoints,
    E,
    c,
    inside,
    scale,
    other_done,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Steps `begin` (a multiple of STEPS) to `end` of a direction of n tokens, from the states h.

    Returns the states and the sum of the step sizes. `weights`: of `_load_weights`; `other_done`:
    `part` holds the other direction's sum already.
    """
    a, skip, bias = weights
    total = tl.zeros([BLOCK], tl.float32)
    for s in range(begin, end, STEPS):
        if SAVE:
            if (s % CHUNK == 0) & (s > 0):
                for k in tl.static_range(N):
                    kept = checkpoints + ((s // CHUNK - 1) * N + k) * E
                    tl.store(kept + c, h[k], mask=inside)
        inputs = ()
        steps = ()
        zs = ()
        others = ()
        for i in tl.static_range(STEPS):
            t = _row(tl.minimum(s + i, end - 1), n, reverse)
            inputs = inputs + (tl.load(u + t * E + c, mask=inside, other=0.0),)
            steps = steps + (tl.load(dt + t * E + c, mask=inside, other=0.0),)
            if OUTPUT == FINISH:
                zs = zs + (tl.load(z + t * stride_z + c, mask=inside, other=0.0),)
                others = others + (tl.load(part + t * E + c, mask=inside & other_done, other=0.0),)
        for i in tl.static_range(STEPS):
            t = _row(tl.minimum(s + i, end - 1), n, reverse)
            row = _load_bc(bc + t * stride_bc, N, PACKED)
            x = inputs[i].to(tl.float32)
            delta, _, _ = _masked_step(steps[i].to(tl.float32) + bias, mask, t)
            delta = tl.where(s + i < end, delta, 0.0)  # past the end nothing changes
            total += delta
            flow = delta * x
            y = skip * x
            new = ()
            for k in tl.static_range(N):
                state = tl.exp2(delta * a[k]) * h[k] + flow * row[k]
                new = new + (state,)
                y += state * row[N + k]
            h = new
            y *= gate
            exists = inside & (s + i < end)
            if OUTPUT == FINISH:
                y += others[i].to(tl.float32)
                if SAVE:
                    tl.store(part + t * E + c, y.to(part.dtype.element_ty), mask=exists)
                zt = zs[i].to(tl.float32)
                y *= scale * zt * _sigmoid(zt)
                tl.store(out + t * E + c, y.to(out.dtype.element_ty), mask=exists)
            if OUTPUT == STORE:
                tl.store(part + t * E + c, y.to(part.dtype.element_ty), mask=exists)
    return h, total


@triton.jit
def _no_states(N: tl.constexpr, BLOCK: tl.constexpr):
    h = ()
    for _ in tl.static_range(N):
        h = h + (tl.zeros([BLOCK], tl.float32),)
    return h


@triton.jit
def _scan_direction(
    direction,
    reverse,
    n,
    b,
    inputs,
    stride_bc,
    mask,
    gates,
    z,
    stride_z,
    outputs,
    sizes,
    c,
    inside,
    scale,
    other_done,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    OUTPUT: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """All n steps of an image's direction; tuples: see `scan_forward`."""
    u, dt, bc, A, D, dt_bias = inputs
    part, out, checkpoints = outputs
    B, L, E, saved = sizes
    walk = direction * B + b
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + 2 * b + direction).to(tl.float32)
    _walk(
        _no_states(N, BLOCK),
        0,
        n,
        n,
        reverse,
        u + walk * L * E,
        dt + walk * L * E,
        bc + walk * L * stride_bc,
        stride_bc,
        mask,
        _load_weights(A, D, dt_bias, direction, E, c, inside, N),
        gate,
        z,
        stride_z,
        part,
        out,
        checkpoints + walk * saved * N * E,
        E,
        c,
        inside,
        scale,
        other_done,
        N,
        BLOCK,
        OUTPUT,
        SAVE,
        CHUNK,
        STEPS,
        PACKED,
    )


@triton.jit(do_not_specialize=["stride_bc", "B", "L", "saved"])
def scan_forward(
    u,
    dt,
    bc,
    stride_bc,
    z,
    stride_image,
    stride_token,
    mask,
    lengths,
    active,
    stride_active,
    stride_direction,
    gates,
    A,
    D,
    dt_bias,
    part,
    out,
    checkpoints,
    B,
    L,
    E,
    saved,
    scale,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """out [B, L, E] = scale * silu(z) * sum over directions of gate * (C h + D u).

    `mask` [B, L] multiplies the step sizes: a mask in place.
    `A` [G, N, E], `D` and `dt_bias` [G, E].
    `part` [B, L, E] receives the sum before silu(z), which the backward pass needs; it may be `out`
    without SAVE.
    `checkpoints` [G, B, saved, N, E]: the state after every CHUNK steps.
    """
    blocks = tl.cdiv(E, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < E
    n_0 = _length(lengths, active, stride_active, stride_direction, b, 0, L)
    n_1 = tl.zeros_like(n_0)
    if BOTH:
        n_1 = _length(lengths, active, stride_active, stride_direction, b, 1, L)
    if mask is not None:
        mask += b * L
    z += b * stride_image
    part += b * L * E
    out += b * L * E
    inputs = (u, dt, bc, A, D, dt_bias)
    outputs = (part, out, checkpoints)
    sizes = (B, L, E, saved)
    if n_1 > 0:
        _scan_direction(
            0,
            REVERSE,
            n_0,
            b,
            inputs,
            stride_bc,
            mask,
            gates,
            z,
            stride_token,
            outputs,
            sizes,
            c,
            inside,
            scale,
            False,
            N,
            BLOCK,
            STORE,
            SAVE,
            CHUNK,
            STEPS,
            PACKED,
        )
        tl.debug_barrier()  # the compiler may hand a row of `part` to another thread of the program
        _scan_direction(
            1,
            True,
            n_1,
            b,
            inputs,
            stride_bc,
            mask,
            gates,
            z,
            stride_token,
            outputs,
            sizes,
            c,
            inside,
            scale,
            n_0 > 0,
            N,
            BLOCK,
            FINISH,
            SAVE,
            CHUNK,
            STEPS,
            PACKED,
        )
    else:
        _scan_direction(
            0,
            REVERSE,
            n_0,
            b,
            inputs,
            stride_bc,
            mask,
            gates,
            z,
            stride_token,
            outputs,
            sizes,
            c,
            inside,
            scale,
            False,
            N,
            BLOCK,
            FINISH,
            SAVE,
            CHUNK,
            STEPS,
            PACKED,
        )
    zero = tl.zeros([BLOCK], out.dtype.element_ty)
    for t in range(tl.maximum(n_0, n_1), L):
        tl.store(out + t * E + c, zero, mask=inside)
