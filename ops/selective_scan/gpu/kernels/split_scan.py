"""Triton kernels of the selective scan for few images: time in pieces that run side by side.

A scan is one long chain of steps: a batch of few images leaves most of a GPU idle while each of
its programs walks on. Here every direction and every piece of `width` steps is a program of its
own. What enters a piece from before is decay * state, and the decay over a whole piece is exp(A *
sum of its step sizes); so

1. `piece_ends` walks every piece but the last from zero, and keeps its state and step sizes' sum,
2. `scan_pieces` makes from these what enters its piece, and scans it,
3. `join_directions` (gating.py) adds the two directions and gates.

The states are computed twice, so this is for batches that do not fill the GPU (plan.py). One piece
takes no first pass.

B images, L tokens, E inner channels, N states, G directions (1 or 2), P pieces.
"""

import triton
import triton.language as tl

from .common import _length
from .scan_forward import NOTHING, STORE, _load_direction, _no_states, _walk


@triton.jit
def _place(E, pieces, BLOCK: tl.constexpr):
    """Image, channels and piece of this program."""
    blocks = tl.cdiv(E, BLOCK)
    program = tl.program_id(0)
    piece = program % pieces
    program = program // pieces
    return (program // blocks).to(tl.int64), (program % blocks) * BLOCK + tl.arange(0, BLOCK), piece


@triton.jit
def _piece_ends(
    u,
    dt,
    bc,
    stride_bc,
    mask,
    A,
    D,
    dt_bias,
    ends,
    sums,
    begin,
    end,
    n,
    E,
    c,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    inside = c < E
    a, skip, bias = _load_direction(A, D, dt_bias, E, c, inside, N)
    h, total = _walk(
        _no_states(N, BLOCK),
        begin,
        end,
        n,
        u,
        dt,
        bc,
        stride_bc,
        u,  # z, part, out, checkpoints: nothing is stored
        0,
        mask,
        a,
        skip,
        bias,
        1.0,
        u,
        u,
        u,
        E,
        c,
        inside,
        1.0,
        False,
        N,
        BLOCK,
        REVERSE,
        NOTHING,
        False,
        STEPS,
        STEPS,
        PACKED,
    )
    for k in tl.static_range(N):
        tl.store(ends + k * E + c, h[k], mask=inside)
    tl.store(sums + c, total, mask=inside)


@triton.jit(do_not_specialize=["stride_bc", "B", "L", "width", "pieces"])
def piece_ends(
    u,
    dt,
    bc,
    stride_bc,
    mask,
    lengths,
    active,
    stride_active,
    stride_direction,
    A_0,
    D_0,
    dt_bias_0,
    A_1,
    D_1,
    dt_bias_1,
    ends,
    sums,
    B,
    L,
    E,
    width,
    pieces,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """ends [G, B, P - 1, N, E]: the state behind each piece of `width` steps that starts from zero;
    sums [G, B, P - 1, E]: of its step sizes. Programs: (B * E blocks * (P - 1), G).
    """
    b, c, piece = _place(E, pieces - 1, BLOCK)
    direction = tl.program_id(1)
    walk = direction * B + b
    u += walk * L * E
    dt += walk * L * E
    bc += walk * L * stride_bc
    if mask is not None:
        mask += b * L
    row = walk * (pieces - 1) + piece
    ends += row * N * E
    sums += row * E
    if direction == 0:
        n = _length(lengths, active, stride_active, stride_direction, b, 0, L)
        begin = tl.minimum(piece * width, n)
        end = tl.minimum(begin + width, n)
        _piece_ends(
            u,
            dt,
            bc,
            stride_bc,
            mask,
            A_0,
            D_0,
            dt_bias_0,
            ends,
            sums,
            begin,
            end,
            n,
            E,
            c,
            N,
            BLOCK,
            REVERSE,
            STEPS,
            PACKED,
        )
    else:
        n = _length(lengths, active, stride_active, stride_direction, b, 1, L)
        begin = tl.minimum(piece * width, n)
        end = tl.minimum(begin + width, n)
        _piece_ends(
            u,
            dt,
            bc,
            stride_bc,
            mask,
            A_1,
            D_1,
            dt_bias_1,
            ends,
            sums,
            begin,
            end,
            n,
            E,
            c,
            N,
            BLOCK,
            True,
            STEPS,
            PACKED,
        )


@triton.jit
def _scan_piece(
    u,
    dt,
    bc,
    stride_bc,
    mask,
    A,
    D,
    dt_bias,
    gate,
    ends,
    sums,
    part,
    checkpoints,
    piece,
    begin,
    end,
    n,
    E,
    c,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    inside = c < E
    a, skip, bias = _load_direction(A, D, dt_bias, E, c, inside, N)
    h = _no_states(N, BLOCK)
    for before in range(0, piece):
        total = tl.load(sums + before * E + c, mask=inside, other=0.0)
        new = ()
        for k in tl.static_range(N):
            end_of = tl.load(ends + (before * N + k) * E + c, mask=inside, other=0.0)
            new = new + (tl.exp2(total * a[k]) * h[k] + end_of,)
        h = new
    _walk(
        h,
        begin,
        end,
        n,
        u,
        dt,
        bc,
        stride_bc,
        u,  # z and out: join_directions gates
        0,
        mask,
        a,
        skip,
        bias,
        gate,
        part,
        part,
        checkpoints,
        E,
        c,
        inside,
        1.0,
        False,
        N,
        BLOCK,
        REVERSE,
        STORE,
        SAVE,
        CHUNK,
        STEPS,
        PACKED,
    )


@triton.jit(do_not_specialize=["stride_bc", "B", "L", "saved", "width", "pieces"])
def scan_pieces(
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
    A_0,
    D_0,
    dt_bias_0,
    A_1,
    D_1,
    dt_bias_1,
    ends,
    sums,
    parts,
    checkpoints,
    B,
    L,
    E,
    saved,
    width,
    pieces,
    N: tl.constexpr,
    REVERSE: tl.constexpr,
    SAVE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """parts [G, B, L, E] float32 = gate * (C h + D u) of each direction, for the tokens it walks.
    `checkpoints` as in scan_forward. Programs: (B * E blocks * P, G).
    """
    b, c, piece = _place(E, pieces, BLOCK)
    direction = tl.program_id(1)
    walk = direction * B + b
    u += walk * L * E
    dt += walk * L * E
    bc += walk * L * stride_bc
    parts += walk * L * E
    checkpoints += walk * saved * N * E
    ends += walk * (pieces - 1) * N * E
    sums += walk * (pieces - 1) * E
    if mask is not None:
        mask += b * L
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + 2 * b + direction).to(tl.float32)
    if direction == 0:
        n = _length(lengths, active, stride_active, stride_direction, b, 0, L)
        begin = tl.minimum(piece * width, n)
        end = tl.minimum(begin + width, n)
        _scan_piece(
            u,
            dt,
            bc,
            stride_bc,
            mask,
            A_0,
            D_0,
            dt_bias_0,
            gate,
            ends,
            sums,
            parts,
            checkpoints,
            piece,
            begin,
            end,
            n,
            E,
            c,
            N,
            BLOCK,
            REVERSE,
            SAVE,
            CHUNK,
            STEPS,
            PACKED,
        )
    else:
        n = _length(lengths, active, stride_active, stride_direction, b, 1, L)
        begin = tl.minimum(piece * width, n)
        end = tl.minimum(begin + width, n)
        _scan_piece(
            u,
            dt,
            bc,
            stride_bc,
            mask,
            A_1,
            D_1,
            dt_bias_1,
            gate,
            ends,
            sums,
            parts,
            checkpoints,
            piece,
            begin,
            end,
            n,
            E,
            c,
            N,
            BLOCK,
            True,
            SAVE,
            CHUNK,
            STEPS,
            PACKED,
        )
