"""Triton kernels of the causal convolution, forward and backward.

B images, L tokens, E inner channels, G directions (1 or 2), K channel blocks.
"""

import triton
import triton.language as tl

from .common import _length, _load_channels, _load_masked_row, _sigmoid


@triton.jit
def _load_conv(weight, bias, direction, E, c, inside):
    """The taps (a tuple of four) and the bias of a direction, per channel."""
    taps = ()
    for k in tl.static_range(4):
        taps = taps + (_load_channels(weight + direction * E * 4 + k, 4, c, inside),)
    return taps, _load_channels(bias + direction * E, 1, c, inside)


@triton.jit
def _conv_direction(
    rows,
    u,
    weight,
    bias,
    direction,
    mask,
    t0,
    n,
    L,
    E,
    c,
    inside,
    ROWS: tl.constexpr,
    REVERSE: tl.constexpr,
):
    taps, shift = _load_conv(weight, bias, direction, E, c, inside)
    for i in tl.static_range(ROWS):
        t = t0 + i
        v = shift
        for k in tl.static_range(4):
            v += taps[k] * (rows[i + 6 - k] if REVERSE else rows[i + k])
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
    weight,
    bias,
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
    u += b * L * E
    _conv_direction(rows, u, weight, bias, 0, mask, t0, n_0, L, E, c, inside, ROWS, REVERSE)
    if BOTH:
        u += B.to(tl.int64) * L * E
        _conv_direction(rows, u, weight, bias, 1, mask, t0, n_1, L, E, c, inside, ROWS, True)


@triton.jit
def _conv_step(rows, grad_u, mask, weights, bias, t, n, E, c, inside, REVERSE: tl.constexpr):
    """Row t of one direction, from the four masked rows of x that its convolution sees, in token
    order.

    Returns the gradient of the convolution's output before SiLU, and the mask's share per channel.
    """
    exists = (t >= 0) & (t < n)
    v = bias
    for k in tl.static_range(4):
        v += weights[k] * (rows[3 - k] if REVERSE else rows[k])
    s = _sigmoid(v)
    g = tl.load(grad_u + t * E + c, mask=inside & exists, other=0.0).to(tl.float32)
    by_mask = g * v * s
    if mask is not None:
        g *= tl.load(mask + t, mask=exists, other=0.0).to(tl.float32)
    return g * s * (1.0 + v * (1.0 - s)), by_mask


@triton.jit
def _add_taps(sums, g, row_0, row_1, row_2, row_3):
    return sums[0] + g * row_0, sums[1] + g * row_1, sums[2] + g * row_2, sums[3] + g * row_3


@triton.jit
def _store_conv(grad_weights, sums, total, walk, E, c, inside):
    for k in tl.static_range(4):
        tl.store(grad_weights + (walk * 5 + k) * E + c, sums[k], mask=inside)
    tl.store(grad_weights + (walk * 5 + 4) * E + c, total, mask=inside)


@triton.jit(do_not_specialize=["B", "L"])
def conv_backward(
    xz,
    stride_image,
    stride_token,
    mask,
    lengths,
    active,
    stride_active,
    stride_direction,
    weight,
    bias,
    grad_u,
    grad_xz,
    grad_stride_image,
    grad_stride_token,
    grad_weights,
    grad_mask,
    B,
    L,
    E,
    FORWARD: tl.constexpr,
    REVERSE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Gradients of x (into grad_xz; zero behind the length), of the weights (partial sums
    grad_weights [G, B, 5, E]: four taps, then the bias) and of the mask (partial sums grad_mask [K,
    B, L]).

    One walk serves both directions: with rows t to t+3 of x at hand, the forward convolution's row
    t+3 and the reversed one's row t are both known. Directions: FORWARD, REVERSE or both.
    """
    both: tl.constexpr = FORWARD and REVERSE
    blocks = tl.cdiv(E, BLOCK)
    block = tl.program_id(0) % blocks
    b = (tl.program_id(0) // blocks).to(tl.int64)
    c = block * BLOCK + tl.arange(0, BLOCK)
    inside = c < E
    n_f = _length(lengths, active, stride_active, stride_direction, b, 0, L)
    n_r = n_f
    if both:
        n_r = _length(lengths, active, stride_active, stride_direction, b, 1, L)
    n = tl.maximum(n_f, n_r)
    xz += b * stride_image
    grad_xz += b * grad_stride_image
    if mask is not None:
        mask += b * L
        grad_mask += (block.to(tl.int64) * B + b) * L
    walk_r = b + B if both else b
    weights_f, bias_f = _load_conv(weight, bias, 0, E, c, inside)
    weights_r, bias_r = _load_conv(weight, bias, 1 if both else 0, E, c, inside)
    zero = tl.zeros([BLOCK], tl.float32)
    rows = (zero, zero, zero, zero)  # of x, at t to t+3
    sums_f = (zero, zero, zero, zero)
    sums_r = (zero, zero, zero, zero)
    total_f = zero
    total_r = zero
    grads_f = (zero, zero, zero, zero)  # before SiLU, at t to t+3
    grads_r = (zero, zero, zero, zero)  # before SiLU, at t-3 to t
    masks_f = (zero, zero, zero, zero)  # the mask's share, at t to t+3
    by_mask_r = zero
    for i in range(0, tl.where(n > 0, n + 3, 0)):
        t = i - 3
        rows = (
            rows[1],
            rows[2],
            rows[3],
            _load_masked_row(xz, stride_token, mask, t + 3, n, c, inside),
        )
        grad_x = zero
        if FORWARD:
            g, by_mask = _conv_step(
                rows, grad_u + b * L * E, mask, weights_f, bias_f, t + 3, n_f, E, c, inside, False
            )
            grads_f = (grads_f[1], grads_f[2], grads_f[3], g)
            masks_f = (masks_f[1], masks_f[2], masks_f[3], by_mask)
            sums_f = _add_taps(sums_f, g, rows[0], rows[1], rows[2], rows[3])
            total_f += g
            for k in tl.static_range(4):
                grad_x += weights_f[k] * grads_f[3 - k]
        if REVERSE:
            g, by_mask_r = _conv_step(
                rows, grad_u + walk_r * L * E, mask, weights_r, bias_r, t, n_r, E, c, inside, True
            )
            grads_r = (grads_r[1], grads_r[2], grads_r[3], g)
            sums_r = _add_taps(sums_r, g, rows[3], rows[2], rows[1], rows[0])
            total_r += g
            for k in tl.static_range(4):
                grad_x += weights_r[k] * grads_r[k]
        if mask is not None:
            x = tl.load(xz + t * stride_token + c, mask=inside & (t >= 0), other=0.0).to(tl.float32)
            tl.store(
                grad_mask + t, tl.sum(grad_x * x + masks_f[0] + by_mask_r, axis=0), mask=t >= 0
            )
            grad_x *= tl.load(mask + t, mask=t >= 0, other=0.0).to(tl.float32)
        tl.store(
            grad_xz + t * grad_stride_token + c,
            grad_x.to(grad_xz.dtype.element_ty),
            mask=inside & (t >= 0),
        )
    for t in range(n, L):
        tl.store(
            grad_xz + t * grad_stride_token + c, zero.to(grad_xz.dtype.element_ty), mask=inside
        )
        if mask is not None:
            tl.store(grad_mask + t, 0.0)
    if FORWARD:
        _store_conv(grad_weights, sums_f, total_f, b, E, c, inside)
    if REVERSE:
        _store_conv(grad_weights, sums_r, total_r, walk_r, E, c, inside)
