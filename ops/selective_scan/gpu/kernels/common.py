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
def _step_size(x):
    """softplus(x) and its derivative.

    log(1 + e) is e times a polynomial of degree 8 in e on (0, 1], with a relative error of 3e-8:
    small steps of a trained model stay exact, and it takes a third of the instructions of
    Triton's log2, which is a library function.
    """
    e = tl.exp2(-tl.abs(x) * LOG2E)
    p = 0.0052534577972598
    p = p * e - 0.029588507394128293
    p = p * e + 0.07836166802132702
    p = p * e - 0.13674769705812267
    p = p * e + 0.19111431080749117
    p = p * e - 0.24844369892523394
    p = p * e + 0.33319271342510437
    p = p * e - 0.49999501516787803
    p = p * e + 0.9999999705406569
    inverse = 1.0 / (1.0 + e)
    positive = tl.where(x < 0.0, 0.0, x)  # maximum(x, 0) would lose a NaN
    return positive + e * p, tl.where(x >= 0, inverse, e * inverse)


@triton.jit
def _length(lengths, active, stride_image, stride_direction, b, direction, L):
    """Number of tokens of image b that a direction walks."""
    n = L
    if lengths is not None:
        n = tl.minimum(tl.maximum(tl.load(lengths + b), 0), L).to(tl.int32)
    if active is not None:
        n = tl.where(tl.load(active + b * stride_image + direction * stride_direction) != 0, n, 0)
    return n


@triton.jit
def _masked_step(x, mask, t):
    """The step size of token t from the projected step x, its derivative, and the step size without
    the mask; `mask`: of an image, in place, or None.
    """
    step, slope = _step_size(x)
    delta = step
    if mask is not None:
        m = tl.load(mask + t).to(tl.float32)
        delta = step * m
        slope *= m
    return delta, slope, step


@triton.jit
def _row(s, n, reverse):
    """The token of step s of n."""
    return tl.where(reverse, n - 1 - s, s)


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
