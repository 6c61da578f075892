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
from .scan_forward import NOTHING, STORE, _load_weights, _no_states, _walk


@triton.jit
def _place(E, pieces, BLOCK: tl.constexpr):
    """Image, channels and piece of this program."""
    blocks = tl.cdiv(E, BLOCK)
    program = tl.program_id(0)
    piece = program % pieces
    program = program // pieces
    return (program // blocks).to(tl.int64), (program % blocks) * BLOCK + tl.arange(0, BLOCK), piece


@triton.jit
def _steps(n, piece, width):
    """(first, behind the last) step of a piece, of n."""
    begin = tl.minimum(piece * width, n)
    return begin, tl.minimum(begin + width, n)


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
    A,
    D,
    dt_bias,
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
    inside = c < E
    direction = tl.program_id(1)
    walk = direction * B + b
    if mask is not None:
        mask += b * L
    n = _length(lengths, active, stride_active, stride_direction, b, direction, L)
    begin, end = _steps(n, piece, width)
    u += walk * L * E
    h, total = _walk(
        _no_states(N, BLOCK),
        begin,
        end,
        n,
        (direction > 0) | REVERSE,
        u,
        dt + walk * L * E,
        bc + walk * L * stride_bc,
        stride_bc,
        mask,
        _load_weights(A, D, dt_bias, direction, E, c, inside, N),
        1.0,
        u,  # from here on: of outputs, and there are none
        0,
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
        NOTHING,
        False,
        STEPS,
        STEPS,
        PACKED,
    )
    row = walk * (pieces - 1) + piece
    for k in tl.static_range(N):
        tl.store(ends + (row * N + k) * E + c, h[k], mask=inside)
    tl.store(sums + row * E + c, total, mask=inside)


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
    A,
    D,
    dt_bias,
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
    inside = c < E
    direction = tl.program_id(1)
    walk = direction * B + b
    if mask is not None:
        mask += b * L
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + 2 * b + direction).to(tl.float32)
    n = _length(lengths, active, stride_active, stride_direction, b, direction, L)
    begin, end = _steps(n, piece, width)
    weights = _load_weights(A, D, dt_bias, direction, E, c, inside, N)
    ends += walk * (pieces - 1) * N * E
    sums += walk * (pieces - 1) * E
    h = _no_states(N, BLOCK)
    for before in range(0, piece):
        total = tl.load(sums + before * E + c, mask=inside, other=0.0)
        new = ()
        for k in tl.static_range(N):
            own = tl.load(ends + (before * N + k) * E + c, mask=inside, other=0.0)
            new = new + (tl.exp2(total * weights[0][k]) * h[k] + own,)
        h = new
    parts += walk * L * E
    _walk(
        h,
        begin,
        end,
        n,
        (direction > 0) | REVERSE,
        u + walk * L * E,
        dt + walk * L * E,
        bc + walk * L * stride_bc,
        stride_bc,
        mask,
        weights,
        gate,
        u,  # z: join_directions gates
        0,
        parts,
        parts,
        checkpoints + walk * saved * N * E,
        E,
        c,
        inside,
        1.0,
        False,
        N,
        BLOCK,
        STORE,
        SAVE,
        CHUNK,
        STEPS,
        PACKED,
    )
