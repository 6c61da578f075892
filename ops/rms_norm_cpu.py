"""Residual add + RMSNorm in C++, forward and backward; `ops.rms_norm.add_rms_norm` defines it.

PyTorch's operators take four passes over the tokens, and ten for the gradient, and wake the threads
for each. The kernels are part of the scan's library, and fall away with it.
"""

import ctypes

import torch
from torch import Tensor

from .operators import plain_on_cpu
from .selective_scan import available
from .selective_scan.cpu.library import kernels, pointer, threads_for


def takes(hidden: Tensor | None, residual: Tensor, weight: Tensor, dtype: torch.dtype) -> bool:
    given = [tensor for tensor in (hidden, residual, weight) if tensor is not None]
    return (
        dtype == torch.float32
        and all(each.dtype == dtype and each.is_contiguous() for each in given)
        and residual.numel() > 0
        and plain_on_cpu(*given)
        and available("cpu")
    )


def forward(
    hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.rms_norm._forward`."""
    normed = torch.empty_like(residual)
    total = residual.new_empty(0) if hidden is None else torch.empty_like(residual)
    scale = residual.new_empty(*residual.shape[:-1], 1)
    given = hidden, residual, weight, total, normed, scale
    kernels().add_rms_norm(
        *_pointers(*given),
        *_rows(residual),
        ctypes.c_float(eps),
        ctypes.c_int64(threads_for(residual)),
    )
    return normed, total, scale


def backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `ops.rms_norm._backward`, for a hidden of float32. The result has the same bits with any
    number of threads.
    """
    grad, (rows, width) = torch.empty_like(total), _rows(total)
    parts = total.new_zeros(-(-rows.value // kernels().norm_rows()), width.value)
    stream = None if grad_total is None else grad_total.contiguous()
    given = grad_normed.contiguous(), stream, total, scale, weight, grad, parts
    kernels().add_rms_norm_backward(
        *_pointers(*given), rows, width, ctypes.c_int64(threads_for(total))
    )
    return grad, grad.new_empty(0), parts.sum(0)


def _pointers(*tensors: Tensor | None) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(pointer(each)) for each in tensors]


def _rows(tensor: Tensor) -> tuple[ctypes.c_int64, ctypes.c_int64]:
    """The number of rows and their width."""
    width = tensor.shape[-1]
    return ctypes.c_int64(tensor.numel() // width), ctypes.c_int64(width)
