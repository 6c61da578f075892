"""Triton kernels of the selective scan, forward: convolution, then scan, skip and gate.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2).

How the scan is laid out. A program walks one image and one block of channels through time; its tile
of states is [N, BLOCK] with BLOCK = 32 * num_warps or a multiple. Triton then gives a thread whole
channels with all their states, so that the sum over states needs no exchange between threads and
the work per channel is done once. Routing costs nothing: `_length` is the loop bound of an image
and direction, 0 where the direction is off. The reversed direction starts at the last of these
tokens; nothing is gathered or flipped.

For the backward pass (triton_backward.py) the state is kept every CHUNK steps.
"""

import triton
import triton.language as tl

CHUNK = 32  # steps between the states that the forward pass keeps

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def _step_size(x, EXACT: tl.constexpr):
    """softplus(x) and its derivative. The hardware's log2 has an absolute error of 2^-22, too much
    for EXACT and the small steps of a trained model, which take the series of log(1 + e) instead.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    logarithm = tl.log2(1.0 + e) * LN2
    if EXACT:
        series = e * (1.0 - e * (0.5 - e * (0.33333333 - e * (0.25 - e * (0.2 - e * 0.16666667)))))
        logarithm = tl.where(e < 0.06, series, logarithm)
    inverse = 1.0 / (1.0 + e)
    return tl.maximum(x, 0.0) + logarithm, tl.where(x >= 0, inverse, e * inverse)


@triton.jit
def _length(lengths, active, stride_image, stride_direction, b, direction: tl.constexpr, L):
    """Number of tokens of image b that a direction walks."""
    n = L
    if lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths + b), 0), L).to(tl.int32)
    if active is not None:
        n = tl.where(tl.load(active + b * stride_image + direction * stride_direction) != 0, n, 0)
    return n


@triton.jit
def _masked_step(x, mask, t, EXACT: tl.constexpr):
    """The step size of token t from the projected step x, its derivative, and the step size without
    the mask; `mask`: of an image, in place, or None.
    """
    step, slope = _step_size(x, EXACT)
    delta = step
    if mask is not None:
        m = tl.load(mask + t).to(tl.float32)
        delta = step * m
        slope *= m
    return delta, slope, step


@triton.jit
def _row(s, n, REVERSE: tl.constexpr):
    """The token of step s."""
    if REVERSE:
        return n - 1 - s
    else:
        return s


@triton.jit
def _load_channels(pointer, stride, c, inside):
    return tl.load(pointer + c * stride, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _load_masked_row(x, stride, mask, t, n, c, inside):
    """Row t of x times its mask; zero outside the image's n tokens."""
    exists = (t >= 0) & (t < n)
    row = tl.load(x + t * stride + c, mask=inside & exists, other=0.0).to(tl.float32)
    if mask is not None:
        row *= tl.load(mask + t, mask=exists, other=0.0).to(tl.float32)
    return row


@triton.jit
def _conv_direction(
    rows, u, weight, bias, mask, t0, n, L, E, c, inside, ROWS: tl.constexpr, REVERSE: tl.constexpr
):
    w0 = _load_channels(weight, 4, c, inside)
    w1 = _load_channels(weight + 1, 4, c, inside)
    w2 = _load_channels(weight + 2, 4, c, inside)
    w3 = _load_channels(weight + 3, 4, c, inside)
    bias = _load_channels(bias, 1, c, inside)
    for i in tl.static_range(ROWS):
        t = t0 + i
        if REVERSE:
            v = bias + w0 * rows[i + 6] + w1 * rows[i + 5] + w2 * rows[i + 4] + w3 * rows[i + 3]
        else:
            v = bias + w0 * rows[i] + w1 * rows[i + 1] + w2 * rows[i + 2] + w3 * rows[i + 3]
        v *= _sigmoid(v)
        if mask is not None:
            v *= tl.load(mask + t, mask=t < n, other=0.0).to(tl.float32)
        tl.store(
            u + t * E + c, tl.where(t < n, v, 0.0).to(u.dtype.element_ty), mask=inside & (t < L)
        )


@triton.jit(do_not_specialize=["B", "L"])
def conv_forward(
    xz,
    stride_image,
    stride_token,
    mask,
    lengths,
    active,
    stride_active,
    stride_direction,
    weight_0,
    bias_0,
    weight_1,
    bias_1,
    u,
    B,
    L,
    E,
    BOTH: tl.constexpr,
    REVERSE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """u [G, B, L, E] = mask * silu(conv(mask * x)); rows behind the length are zero, since they
    enter a GEMM.
    """
    b = tl.program_id(0).to(tl.int64)
    t0 = tl.program_id(1) * ROWS
    c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = c < E
    n_0 = _length(lengths, active, stride_active, stride_direction, b, 0, L)
    n_1 = n_0
    if BOTH:
        n_1 = _length(lengths, active, stride_active, stride_direction, b, 1, L)
    xz += b * stride_image
    if mask is not None:
        mask += b * L
    rows = ()
    for i in tl.static_range(ROWS + 6):
        rows = rows + (
            _load_masked_row(xz, stride_token, mask, t0 + i - 3, tl.maximum(n_0, n_1), c, inside),
        )
    _conv_direction(
        rows, u + b * L * E, weight_0, bias_0, mask, t0, n_0, L, E, c, inside, ROWS, REVERSE
    )
    if BOTH:
        _conv_direction(
            rows, u + (b + B) * L * E, weight_1, bias_1, mask, t0, n_1, L, E, c, inside, ROWS, True
        )


@triton.jit
def _load_step(u, dt, bc, stride_bc, t, E, c, inside, ns, N: tl.constexpr):
    return (
        tl.load(u + t * E + c, mask=inside, other=0.0),
        tl.load(dt + t * E + c, mask=inside, other=0.0),
        tl.load(bc + t * stride_bc + ns),
        tl.load(bc + t * stride_bc + N + ns),
    )


@triton.jit
def _scan_direction(
    u,
    dt,
    bc,
    stride_bc,
    z,
    stride_z,
    mask,
    A,
    D,
    dt_bias,
    gate,
    part,
    out,
    checkpoints,
    n,
    E,
    c,
    inside,
    scale,
    other_done,
    finish,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """Walk one direction. `other_done`: `part` holds the other direction's sum already; `finish`:
    this is the last direction of the image, so gate and write the output.
    """
    ns = tl.arange(0, N)
    tile = ns[:, None] * E + c[None, :]
    exact: tl.constexpr = u.dtype.element_ty == tl.float32
    a = tl.load(A + tile, mask=inside[None, :], other=0.0).to(tl.float32) * LOG2E
    skip = _load_channels(D, 1, c, inside)
    bias = _load_channels(dt_bias, 1, c, inside)
    h = tl.zeros([N, BLOCK], tl.float32)
    ahead = _load_step(
        u, dt, bc, stride_bc, _row(0, tl.maximum(n, 1), REVERSE), E, c, inside, ns, N
    )
    for s in range(0, n):
        t = _row(s, n, REVERSE)
        if PREFETCH:
            step = ahead
            ahead = _load_step(
                u,
                dt,
                bc,
                stride_bc,
                _row(tl.minimum(s + 1, n - 1), n, REVERSE),
                E,
                c,
                inside,
                ns,
                N,
            )
        else:
            step = _load_step(u, dt, bc, stride_bc, t, E, c, inside, ns, N)
        if SAVE:
            if (s % CHUNK == 0) & (s > 0):
                tl.store(checkpoints + (s // CHUNK - 1) * N * E + tile, h, mask=inside[None, :])
        x = step[0].to(tl.float32)
        delta, _, _ = _masked_step(step[1].to(tl.float32) + bias, mask, t, exact)
        h = tl.exp2(delta[None, :] * a) * h + (delta * x)[None, :] * step[2].to(tl.float32)[:, None]
        y = (tl.sum(h * step[3].to(tl.float32)[:, None], axis=0) + skip * x) * gate
        y += tl.load(part + t * E + c, mask=inside & other_done, other=0.0).to(tl.float32)
        if finish:
            if SAVE:
                tl.store(part + t * E + c, y.to(part.dtype.element_ty), mask=inside)
            zt = tl.load(z + t * stride_z + c, mask=inside, other=0.0).to(tl.float32)
            tl.store(
                out + t * E + c,
                (y * scale * zt * _sigmoid(zt)).to(out.dtype.element_ty),
                mask=inside,
            )
        else:
            tl.store(part + t * E + c, y.to(part.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["stride_bc", "B", "L", "saved", "batch_class"])
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
    A_0,
    D_0,
    dt_bias_0,
    A_1,
    D_1,
    dt_bias_1,
    part,
    out,
    checkpoints,
    B,
    L,
    E,
    saved,
    scale,
    batch_class,
    N: tl.constexpr,
    BOTH: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PREFETCH: tl.constexpr,
):
    """out [B, L, E] = scale * silu(z) * sum over directions of gate * (C h + D u).

    `mask` [B, L] multiplies the step sizes: a mask in place.
    `part` [B, L, E] receives the sum before silu(z), which the backward pass needs; it may be `out`
    without SAVE.
    `checkpoints` [G, B, saved, N, E]: the state after every CHUNK steps. `batch_class` only serves
        the tuning.
    """
    blocks = tl.cdiv(E, BLOCK)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    inside = c < E
    n_0 = _length(lengths, active, stride_active, stride_direction, b, 0, L)
    n_1 = tl.zeros_like(n_0)
    if BOTH:
        n_1 = _length(lengths, active, stride_active, stride_direction, b, 1, L)
    gate_0 = 1.0
    gate_1 = 1.0
    if gates is not None:
        gate_0 = tl.load(gates + 2 * b).to(tl.float32)
        gate_1 = tl.load(gates + 2 * b + 1).to(tl.float32)
    if mask is not None:
        mask += b * L
    z += b * stride_image
    part += b * L * E
    out += b * L * E
    _scan_direction(
        u + b * L * E,
        dt + b * L * E,
        bc + b * L * stride_bc,
        stride_bc,
        z,
        stride_token,
        mask,
        A_0,
        D_0,
        dt_bias_0,
        gate_0,
        part,
        out,
        checkpoints + b * saved * N * E,
        n_0,
        E,
        c,
        inside,
        scale,
        n_0 < 0,
        n_1 == 0,
        N,
        BLOCK,
        REVERSE,
        SAVE,
        CHUNK,
        PREFETCH,
    )
    if BOTH:
        tl.debug_barrier()  # the compiler may hand a row of `part` to another thread of the program
        b_1 = b + B
        _scan_direction(
            u + b_1 * L * E,
            dt + b_1 * L * E,
            bc + b_1 * L * stride_bc,
            stride_bc,
            z,
            stride_token,
            mask,
            A_1,
            D_1,
            dt_bias_1,
            gate_1,
            part,
            out,
            checkpoints + b_1 * saved * N * E,
            n_1,
            E,
            c,
            inside,
            scale,
            n_0 > 0,
            n_1 > 0,
            N,
            BLOCK,
            True,
            SAVE,
            CHUNK,
            PREFETCH,
        )
    zero = tl.zeros([BLOCK], out.dtype.element_ty)
    for t in range(tl.maximum(n_0, n_1), L):
        tl.store(out + t * E + c, zero, mask=inside)
