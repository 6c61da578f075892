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

from .common import LOG2E, _length, _load_channels, _masked_step, _row, _sigmoid


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
