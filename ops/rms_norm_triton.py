"""Residual add + RMSNorm as one Triton kernel per pass; `ops.rms_norm.add_rms_norm` defines it.

B images, L tokens, d model width; rows are the B * L tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import triton_support

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 8192  # a row stays in registers
_BACKWARD_PROGRAMS = 1024  # each adds up the weight's gradient over its share of the rows


@triton.jit
def _forward_kernel(hidden, residual, weight, normed, total, scale, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < d
    x = tl.load(residual + row * d + c, mask=inside, other=0.0)
    if hidden is not None:
        x += tl.load(hidden + row * d + c, mask=inside, other=0.0).to(tl.float32)
        tl.store(total + row * d + c, x, mask=inside)
    s = tl.rsqrt(tl.sum(x * x, axis=0) / d + eps)
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(scale + row, s)
    tl.store(normed + row * d + c, (x * s * w).to(normed.dtype.element_ty), mask=inside)


@triton.jit
def _backward_kernel(
    grad_normed,
    grad_stream,
    total,
    scale,
    weight,
    grad_total,
    grad_hidden,
    grad_weight,
    rows,
    d,
    BLOCK: tl.constexpr,
):
    """grad_weight [programs, d] holds partial sums. grad_stream: what arrives along the residual
    stream.
    """
    program = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < d
    w = tl.load(weight + c, mask=inside, other=0.0).to(tl.float32)
    sum_w = tl.zeros([BLOCK], tl.float32)
    for row in range(program, rows, tl.num_programs(0)):
        s = tl.load(scale + row)
        unit = tl.load(total + row * d + c, mask=inside, other=0.0) * s
        g = tl.load(grad_normed + row * d + c, mask=inside, other=0.0).to(tl.float32)
        sum_w += g * unit
        g *= w
        g = s * (g - unit * (tl.sum(g * unit, axis=0) / d))
        if grad_stream is not None:
            g += tl.load(grad_stream + row * d + c, mask=inside, other=0.0)
        tl.store(grad_total + row * d + c, g, mask=inside)
        if grad_hidden is not None:
            tl.store(grad_hidden + row * d + c, g.to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program * d + c, sum_w, mask=inside)


def _block(d: int) -> dict:
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def takes(hidden: Tensor | None, residual: Tensor, weight: Tensor) -> bool:
    """Whether these tensors can go through the kernels."""
    given = [tensor for tensor in (hidden, residual, weight) if tensor is not None]
    devices = ("cuda", "cpu") if triton_support.interpreted() else ("cuda",)
    return (
        all(tensor.device.type in devices for tensor in given)
        and len({tensor.device for tensor in given}) == 1
        and all(tensor.dtype in _DTYPES for tensor in given)
        and residual.dtype == torch.float32
        and given[0].numel() > 0
        and weight.shape[-1] <= _MAX_WIDTH
        and triton_support.refusal() is None  # last: it starts CUDA
    )


def forward(
    hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """normed [B, L, d] of `dtype`; in float32 the sum [B, L, d] (without elements when there is no
    hidden) and 1 / rms [B, L, 1].

    hidden [B, L, d] float32, bfloat16 or float16; residual [B, L, d] float32; weight [d].
    """
    hidden = None if hidden is None else hidden.contiguous()
    residual = residual.contiguous()
    d = residual.shape[-1]
    normed = residual.new_empty(residual.shape, dtype=dtype)
    total = residual.new_empty(0 if hidden is None else residual.shape)
    scale = residual.new_empty(*residual.shape[:-1], 1)
    with triton_support.launching_on(residual):
        _forward_kernel[(scale.numel(),)](
            hidden, residual, weight.contiguous(), normed, total, scale, d, eps, **_block(d)
        )
    return normed, total, scale


def backward(
    grad_normed: Tensor,
    grad_stream: Tensor | None,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual [B, L, d] in float32, of hidden in its type (without elements where
    that is float32 and both are the same) and of the weight [d].
    """
    total = total.contiguous()
    d, rows = total.shape[-1], scale.numel()
    grad_total = torch.empty_like(total)
    grad_hidden = None
    if hidden_dtype != total.dtype:
        grad_hidden = total.new_empty(total.shape, dtype=hidden_dtype)
    programs = min(rows, _BACKWARD_PROGRAMS)
    grad_weight = total.new_empty(programs, d)
    with triton_support.launching_on(total):
        _backward_kernel[(programs,)](
            grad_normed.contiguous(),
            None if grad_stream is None else grad_stream.contiguous(),
            total,
            scale,
            weight.contiguous(),
            grad_total,
            grad_hidden,
            grad_weight,
            rows,
            d,
            **_block(d),
        )
    grad_hidden = total.new_empty(0) if grad_hidden is None else grad_hidden
    return grad_total, grad_hidden, grad_weight.sum(0).to(weight.dtype)
