"""Residual add + RMSNorm, the prologue of every block: the plain definition, and the choice of a
faster one.

B images, L tokens, d model width.
Source: Zhang & Sennrich, "Root Mean Square Layer Normalization" (arXiv 1910.07467).
"""

import importlib
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor


def add_rms_norm(
    hidden: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + hidden, normed = new_residual / rms(new_residual) * weight.

    Args:
        hidden: [B, L, d] in any floating-point type; None: nothing is added.
        residual: [B, L, d] float32, the stream that the blocks add to; None before the first block.
        weight: [d].

    Returns:
        normed [B, L, d] in the type of autocast where that is on, else in hidden's (residual's
        without hidden), and new_residual [B, L, d] float32 (float64 for float64).

    Raises:
        ValueError: both None, or shapes disagree.
    """
    if hidden is None and residual is None:
        raise ValueError("add_rms_norm needs hidden, residual or both")
    given = residual if hidden is None else hidden
    if hidden is not None and residual is not None and hidden.shape != residual.shape:
        raise ValueError(
            f"hidden {list(hidden.shape)} and residual {list(residual.shape)} must have one shape"
        )
    if weight.shape != given.shape[-1:]:
        raise ValueError(
            f"weight must have shape {list(given.shape[-1:])}, not {list(weight.shape)}"
        )
    device = given.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given.dtype
    # A scan backend asked for by name is measured as it is, without the fused kernel of another.
    fast = (
        _triton()
        if device == "cuda" and os.environ.get("DYVM_BACKEND") in (None, "", "triton")
        else None
    )
    if fast is not None and fast.takes(hidden, residual, weight):
        return fast.add_rms_norm(hidden, residual, weight, eps, dtype)
    with torch.autocast(device, enabled=False):
        return _add_rms_norm(hidden, residual, weight, eps, dtype)


@lru_cache(maxsize=None)
def _triton() -> ModuleType | None:
    """The fused kernels, None where Triton is not installed."""
    try:
        return importlib.import_module("ops.rms_norm_triton")
    except ImportError:
        return None


def _add_rms_norm(
    hidden: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The definition."""
    compute = (
        torch.float64
        if (residual if hidden is None else hidden).dtype == torch.float64
        else torch.float32
    )
    if hidden is None or residual is None:
        total = (residual if hidden is None else hidden).to(compute)
    else:
        total = residual.to(compute) + hidden.to(compute)
    if not torch.is_grad_enabled():
        # The same with one pass over the tokens instead of two and without the tensors between,
        # which autograd needs.
        norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
        scale = norm.square_().div_(total.shape[-1]).add_(eps).rsqrt_()
        return (total * scale).mul_(weight).to(dtype), total
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    return (total * scale * weight.to(compute)).to(dtype), total
