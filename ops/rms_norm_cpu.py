"""Residual add + RMSNorm as one pass in C++; `ops.rms_norm.add_rms_norm` defines it.

PyTorch's operators take four passes, and wake the threads for each. The kernel is part of the
scan's library, and falls away with it.
"""

import ctypes

import torch
from torch import Tensor

from .operators import plain_on_cpu
from .selective_scan import available
from .selective_scan.cpu.library import kernels, pointer

_SERIAL = 1 << 17  # numbers that one thread has done sooner than others are awake


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
    count = residual.numel()
    kernels().add_rms_norm(
        *(
            ctypes.c_void_p(pointer(each))
            for each in (hidden, residual, weight, total, normed, scale)
        ),
        ctypes.c_int64(count // residual.shape[-1]),
        ctypes.c_int64(residual.shape[-1]),
        ctypes.c_float(eps),
        ctypes.c_int64(1 if count < _SERIAL else torch.get_num_threads()),
    )
    return normed, total, scale
