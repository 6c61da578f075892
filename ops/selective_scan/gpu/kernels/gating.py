"""Triton kernels of the gate, element by element: out = scale * silu(z) * the sum of the scans.

B images, L tokens, E inner channels, G directions (1 or 2).
"""

import triton
import triton.language as tl

from .common import _length, _sigmoid


@triton.jit(do_not_specialize=["B", "L"])
def join_directions(
    parts,
    z,
    stride_image,
    stride_token,
    lengths,
    active,
    stride_active,
    stride_direction,
    part,
    out,
    B,
    L,
    E,
    scale,
    BOTH: tl.constexpr,
    SAVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out [B, L, E] = scale * silu(z) * sum over directions of `parts` [G, B, L, E], zero behind
    the length; with SAVE, `part` [B, L, E] receives the sum. Programs: (B, L rows, E blocks).
    """
    b = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (t < L) & (c < E)
    n = _length(lengths, active, stride_active, stride_direction, b, 0, L)
    row = b * L * E + t * E + c
    y = tl.load(parts + row, mask=inside & (t < n), other=0.0)
    if BOTH:
        n_1 = _length(lengths, active, stride_active, stride_direction, b, 1, L)
        y += tl.load(parts + B.to(tl.int64) * L * E + row, mask=inside & (t < n_1), other=0.0)
        n = tl.maximum(n, n_1)
    if SAVE:
        tl.store(part + row, y.to(part.dtype.element_ty), mask=inside & (t < n))
    zt = tl.load(z + b * stride_image + t * stride_token + c, mask=inside & (t < n), other=0.0).to(
        tl.float32
    )
    y *= scale * zt * _sigmoid(zt)
    tl.store(out + row, y.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["L"])
def gate_backward(
    grad_out,
    z,
    stride_image,
    stride_token,
    part,
    lengths,
    active,
    stride_active,
    stride_direction,
    grad_y,
    grad_z,
    grad_stride_image,
    grad_stride_token,
    L,
    E,
    scale,
    BOTH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Through out = scale * silu(z) * part: grad_y [B, L, E] = d/d part, and grad_z (zero behind
    the length).
    """
    b = tl.program_id(0).to(tl.int64)
    t = (tl.program_id(1) * ROWS + tl.arange(0, ROWS))[:, None]
    c = (tl.program_id(2) * BLOCK + tl.arange(0, BLOCK))[None, :]
    n = _length(lengths, active, stride_active, stride_direction, b, 0, L)
    if BOTH:
        n = tl.maximum(n, _length(lengths, active, stride_active, stride_direction, b, 1, L))
    inside = (t < n) & (c < E)
    row = b * L * E + t * E + c
    zt = tl.load(z + b * stride_image + t * stride_token + c, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(grad_out + row, mask=inside, other=0.0).to(tl.float32) * scale
    y = tl.load(part + row, mask=inside, other=0.0).to(tl.float32)
    s = _sigmoid(zt)
    tl.store(grad_y + row, (g * zt * s).to(grad_y.dtype.element_ty), mask=inside)
    tl.store(
        grad_z + b * grad_stride_image + t * grad_stride_token + c,
        (g * y * s * (1.0 + zt * (1.0 - s))).to(grad_z.dtype.element_ty),
        mask=(t < L) & (c < E),
    )
