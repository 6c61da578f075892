"""Triton kernel of the selective scan, backward.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2), K channel
blocks.

The scan's backward pass needs every state in reverse order. From the state that the forward pass
kept every CHUNK steps a chunk is recomputed, leaving one state in scratch memory every GROUP steps;
a group is then recomputed once more into registers and walked back. What sums over channels (the
gradients of B and C) is stored per channel block and added up afterwards in a fixed order: no
atomics, the same result every time.
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, _length, _load_channels, _masked_step, _row

GROUP = 2  # steps that are walked back at a time: the states of more do not fit the registers


@triton.jit
def _channel_sums(by_b, by_c, column, BLOCK: tl.constexpr, MATRIX: tl.constexpr):
    """[N, 16] whose columns 0 and 1 are the sums of by_b and by_c [N, BLOCK] over the channels.
    column [1, 16].

    The sum runs on the matrix units (times a matrix that is one in a single column): sums between
    threads by shuffles would cost more than all other arithmetic of the step. They round to 11 bits
    on the way (TF32), finer than bfloat16 but not float32, whose tensors go the slow way (not
    MATRIX).
    """
    if MATRIX:
        every = tl.arange(0, BLOCK)[:, None] >= 0
        sums = tl.dot(by_b, ((column == 0) & every).to(tl.float32), input_precision="tf32")
        return tl.dot(by_c, ((column == 1) & every).to(tl.float32), sums, input_precision="tf32")
    else:
        return tl.where(column == 0, tl.sum(by_b, axis=1)[:, None], tl.sum(by_c, axis=1)[:, None])


@triton.jit
def _recompute(h, u, dt, bc, stride_bc, mask, a, bias, s, n, E, c, inside, ns, reverse):
    """One step forward from state h; past the end (step size 0) nothing changes. Also what the way
    back needs.
    """
    exists = s < n
    t = _row(tl.minimum(s, n - 1), n, reverse)
    x = tl.load(u + t * E + c, mask=inside, other=0.0).to(tl.float32)
    projected = tl.load(dt + t * E + c, mask=inside, other=0.0).to(tl.float32)
    delta, slope, step = _masked_step(projected + bias, mask, t)
    delta = tl.where(exists, delta, 0.0)
    decay = tl.exp2(delta[None, :] * a)
    b_row = tl.load(bc + t * stride_bc + ns).to(tl.float32)
    return decay * h + (delta * x)[None, :] * b_row[:, None], decay, delta, slope, step, x


# E not either: where Triton knows that 16 divides it, it reads A four numbers at a time and lays
# the states of a channel out over lanes, which then exchange them at every step.
@triton.jit(do_not_specialize=["stride_bc", "B", "L", "E", "saved"])
def scan_backward(
    grad_y,
    u,
    dt,
    bc,
    stride_bc,
    mask,
    lengths,
    active,
    stride_active,
    stride_direction,
    gates,
    A,
    D,
    dt_bias,
    checkpoints,
    scratch,
    grad_u,
    grad_dt,
    grad_bc,
    grad_A,
    grad_channel,
    grad_gate,
    grad_mask,
    B,
    L,
    E,
    saved,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    CHUNK: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of one direction's scan, for a program's image and channel block.

    grad_u, grad_dt [G, B, L, E] (zero behind the length: they enter GEMMs); partial sums grad_bc
    [K, G, B, L, 2N], grad_A [G, B, N, E], grad_channel [G, B, 2, E] (D, then the step bias),
    grad_gate [G, B, K]; with a `mask` in place, grad_mask [K, G, B, L], as far as it comes through
    the step sizes. scratch [G, B, CHUNK / GROUP or more, N, E].
    """
    blocks = tl.cdiv(E, BLOCK)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = block * BLOCK + tl.arange(0, BLOCK)
    inside = c < E
    direction = tl.program_id(1)
    reverse = (direction > 0) | REVERSE
    walk = direction * B + b  # where this image and direction lie in tensors [G, B, ...]
    n = _length(lengths, active, stride_active, stride_direction, b, direction, L)
    ns = tl.arange(0, N)
    tile = ns[:, None] * E + c[None, :]
    tile_inside = (ns[:, None] < N) & inside[None, :]
    matrix: tl.constexpr = (u.dtype.element_ty != tl.float32) and N >= 16
    column = tl.arange(0, 16)[None, :]

    a = tl.load(A + direction * N * E + tile, mask=tile_inside, other=0.0).to(tl.float32) * LOG2E
    skip = _load_channels(D + direction * E, 1, c, inside)
    bias = _load_channels(dt_bias + direction * E, 1, c, inside)
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + 2 * b + direction).to(tl.float32)
    grad_y += b * L * E
    u += walk * L * E
    dt += walk * L * E
    bc += walk * L * stride_bc
    grad_u += walk * L * E
    grad_dt += walk * L * E
    partial = (block.to(tl.int64) * tl.num_programs(1) * B + walk) * L
    grad_bc += partial * 2 * N
    if mask is not None:
        mask += b * L
        grad_mask += partial
    checkpoints += walk * saved * N * E
    scratch += walk * (CHUNK // GROUP) * N * E

    e = tl.zeros([N, BLOCK], tl.float32)  # gradient of the state, carried back through time
    sum_A = tl.zeros([N, BLOCK], tl.float32)
    sum_D = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    sum_gate = tl.zeros([BLOCK], tl.float32)
    chunks = tl.cdiv(n, CHUNK)
    for i_chunk in range(0, chunks):
        chunk = chunks - 1 - i_chunk
        groups = tl.cdiv(tl.minimum(n - chunk * CHUNK, CHUNK), GROUP)
        h = tl.load(
            checkpoints + (chunk - 1) * N * E + tile, mask=tile_inside & (chunk > 0), other=0.0
        )
        for group in range(0, groups - 1):
            tl.store(scratch + group * N * E + tile, h, mask=tile_inside)
            for i in tl.static_range(GROUP):
                h, _, _, _, _, _ = _recompute(
                    h,
                    u,
                    dt,
                    bc,
                    stride_bc,
                    mask,
                    a,
                    bias,
                    chunk * CHUNK + group * GROUP + i,
                    n,
                    E,
                    c,
                    inside,
                    ns,
                    reverse,
                )
        tl.store(scratch + (groups - 1) * N * E + tile, h, mask=tile_inside)
        tl.debug_barrier()
        for i_group in range(0, groups):
            group = groups - 1 - i_group
            first = chunk * CHUNK + group * GROUP
            h = tl.load(scratch + group * N * E + tile, mask=tile_inside, other=0.0)
            states = (h,)
            decays = ()
            deltas = ()
            slopes = ()
            steps = ()
            inputs = ()
            for i in tl.static_range(GROUP):
                h, decay, delta, slope, step, x = _recompute(
                    h, u, dt, bc, stride_bc, mask, a, bias, first + i, n, E, c, inside, ns, reverse
                )
                states = states + (h,)
                decays = decays + (decay,)
                deltas = deltas + (delta,)
                slopes = slopes + (slope,)
                steps = steps + (step,)
                inputs = inputs + (x,)
            for i in tl.static_range(GROUP - 1, -1, -1):
                exists = first + i < n
                t = _row(tl.minimum(first + i, n - 1), n, reverse)
                b_row = tl.load(bc + t * stride_bc + ns).to(tl.float32)
                c_row = tl.load(bc + t * stride_bc + N + ns).to(tl.float32)
                g = tl.load(grad_y + t * E + c, mask=inside & exists, other=0.0).to(tl.float32)
                delta = deltas[i]
                x = inputs[i]
                if gates is not None:
                    sum_gate += g * (tl.sum(states[i + 1] * c_row[:, None], axis=0) + skip * x)
                    g *= gate
                e += c_row[:, None] * g[None, :]
                along_b = tl.sum(e * b_row[:, None], axis=0)
                by_channel = _channel_sums(
                    e * (delta * x)[None, :], states[i + 1] * g[None, :], column, BLOCK, matrix
                )
                tl.store(
                    grad_bc + t * 2 * N + column * N + ns[:, None],
                    by_channel.to(grad_bc.dtype.element_ty),
                    mask=(column < 2) & exists,
                )
                e *= decays[i]
                flow = e * states[i]
                grad_x = skip * g + along_b * delta
                grad_step = along_b * x + tl.sum(flow * a, axis=0) * LN2
                if mask is not None:
                    tl.store(grad_mask + t, tl.sum(grad_step * steps[i], axis=0), mask=exists)
                grad_delta = tl.where(exists, grad_step * slopes[i], 0.0)
                sum_A += flow * delta[None, :]
                sum_D += g * x
                sum_bias += grad_delta
                tl.store(
                    grad_u + t * E + c, grad_x.to(grad_u.dtype.element_ty), mask=inside & exists
                )
                tl.store(
                    grad_dt + t * E + c,
                    grad_delta.to(grad_dt.dtype.element_ty),
                    mask=inside & exists,
                )
        tl.debug_barrier()  # scratch is about to be used again

    tl.store(grad_A + walk * N * E + tile, sum_A, mask=tile_inside)
    tl.store(grad_channel + walk * 2 * E + c, sum_D, mask=inside)
    tl.store(grad_channel + walk * 2 * E + E + c, sum_bias, mask=inside)
    if gates is not None:
        tl.store(grad_gate + walk * blocks + block, tl.sum(tl.where(inside, sum_gate, 0.0), axis=0))
    zero = tl.zeros([BLOCK], grad_u.dtype.element_ty)
    zero_bc = tl.zeros([2 * N], grad_bc.dtype.element_ty)
    for t in range(n, L):
        tl.store(grad_u + t * E + c, zero, mask=inside)
        tl.store(grad_dt + t * E + c, zero, mask=inside)
        tl.store(grad_bc + t * 2 * N + tl.arange(0, 2 * N), zero_bc)
        if mask is not None:
            tl.store(grad_mask + t, 0.0)
