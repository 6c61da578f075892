"""Residual add + RMSNorm as one Triton kernel each way; the definition is
`ops.rms_norm.add_rms_norm`.

B images, L tokens, d model width; rows are the B * L tokens.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_INTERPRETED = triton.knobs.runtime.interpret
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_WIDTH = 8192  # a row stays in registers
_BACKWARD_PROGRAMS = 1024  # each adds up the weight's gradient over its share of the rows


@triton.jit
def _forward_kernel(hidden, residual, weight, normed, total, scale, d, eps, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    inside = c < d
    x = tl.zeros([BLOCK], tl.float32)
    if residual is not None:
        x += tl.load(residual + row * d + c, mask=inside, other=0.0).to(tl.float32)
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
        if grad_total is not None:
            tl.store(grad_total + row * d + c, g, mask=inside)
        if grad_hidden is not None:
            tl.store(grad_hidden + row * d + c, g.to(grad_hidden.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program * d + c, sum_w, mask=inside)


def _block(d: int) -> dict:
    block = triton.next_power_of_2(d)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 8)}


def _device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def takes(hidden: Tensor | None, residual: Tensor | None, weight: Tensor) -> bool:
    """Whether these tensors, of which one of the first two may be None, can go through the kernels."""
    given = [tensor for tensor in (hidden, residual, weight) if tensor is not None]
    on_device = all(
        tensor.is_cuda or (_INTERPRETED and tensor.device.type == "cpu") for tensor in given
    )
    return (
        on_device
        and len({tensor.device for tensor in given}) == 1
        and all(tensor.dtype in _DTYPES for tensor in given)
        and (residual is None or residual.dtype == torch.float32)
        and given[0].numel() > 0
        and weight.shape[-1] <= _MAX_WIDTH
    )


def add_rms_norm(
    hidden: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + hidden, normed = new_residual / rms(new_residual) * weight.

    Args:
        hidden: [B, L, d] float32, bfloat16 or float16; None: nothing is added.
        residual: [B, L, d] float32; None before the first block. Not both None.
        weight: [d].
        dtype: of normed.

    Returns:
        normed [B, L, d] and new_residual [B, L, d] float32.
    """
    hidden, residual = (
        None if tensor is None else tensor.contiguous() for tensor in (hidden, residual)
    )
    return _AddRMSNorm.apply(hidden, residual, weight.contiguous(), eps, dtype)


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor | None,
        residual: Tensor | None,
        weight: Tensor,
        eps: float,
        dtype: torch.dtype,
    ):
        given = residual if hidden is None else hidden
        d = given.shape[-1]
        rows = given.numel() // d
        normed = given.new_empty(given.shape, dtype=dtype)
        total = residual if hidden is None else given.new_empty(given.shape, dtype=torch.float32)
        scale = given.new_empty(rows, dtype=torch.float32)
        with _device(given):
            _forward_kernel[(rows,)](
                hidden, residual, weight, normed, total, scale, d, eps, **_block(d)
            )
        ctx.save_for_backward(total, scale, weight)
        ctx.hidden_dtype = None if hidden is None else hidden.dtype
        ctx.set_materialize_grads(False)
        return normed, total.view_as(total) if hidden is None else total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_normed: Tensor | None, grad_stream: Tensor | None):
        total, scale, weight = ctx.saved_tensors
        if grad_normed is None:
            wanted = [grad_stream is not None and needed for needed in ctx.needs_input_grad[:2]]
            return (
                grad_stream.to(ctx.hidden_dtype) if wanted[0] else None,
                grad_stream if wanted[1] else None,
                None,
                None,
                None,
            )
        d, rows = total.shape[-1], scale.numel()
        grad_total = torch.empty_like(total) if ctx.needs_input_grad[1] else None
        grad_hidden = (
            total.new_empty(total.shape, dtype=ctx.hidden_dtype)
            if ctx.needs_input_grad[0]
            else None
        )
        programs = min(rows, _BACKWARD_PROGRAMS)
        grad_weight = total.new_empty(programs, d)
        grad_stream = None if grad_stream is None else grad_stream.contiguous()
        with _device(total):
            _backward_kernel[(programs,)](
                grad_normed.contiguous(),
                grad_stream,
                total,
                scale,
                weight,
                grad_total,
                grad_hidden,
                grad_weight,
                rows,
                d,
                **_block(d),
            )
        return grad_hidden, grad_total, grad_weight.sum(0).to(weight.dtype), None, None
