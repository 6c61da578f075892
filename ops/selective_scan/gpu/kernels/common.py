"""What the Triton kernels of the scan share."""

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
