"""Residual add + RMSNorm, the prologue of every layer, as an operator.

It is computed by PyTorch or, where they run, by fused kernels.

B images, L tokens, d model width. Source: Zhang & Sennrich, "Root Mean Square Layer Normalization"
(arXiv 1910.07467).
"""

import importlib
import os
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from .operators import direct_on_cpu, needs_gradient, refuse_forward_mode, register


def add_rms_norm(
    hidden: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """new_residual = residual + hidden, normed = new_residual / rms(new_residual) * weight.

    Args:
        hidden: [B, L, d] in any floating-point type; None: nothing is added.
        residual: [B, L, d] float32, the stream that the layers add to; None before the first layer.
        weight: [d].

    Returns:
        normed [B, L, d] in the type of autocast where that is on, else in hidden's (the weight's
        without hidden), and new_residual [B, L, d] float32 (float64 for float64).

    Raises:
        ValueError: both None, or shapes disagree.
        NotImplementedError: a forward-mode derivative is being taken.
    """
    refuse_forward_mode("add_rms_norm")
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
    like = weight if hidden is None else hidden
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else like.dtype
    return _add_rms_norm(hidden, residual, weight, eps, dtype)


def _add_rms_norm(
    hidden: Tensor | None, residual: Tensor | None, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    if residual is None:
        hidden, residual = None, hidden
    residual = residual.to(torch.promote_types(residual.dtype, torch.float32))
    traced = torch.compiler.is_compiling() or needs_gradient((hidden, residual, weight))
    normed, total, _ = (_run if traced else _forward)(hidden, residual, weight, eps, dtype)
    return normed, residual if hidden is None else total


@lru_cache(maxsize=None)
def _module(name: str) -> ModuleType | None:
    """Fused kernels, None where they need a package that is not installed."""
    try:
        return importlib.import_module(f"ops.rms_norm_{name}")
    except ImportError:
        return None


def _asked_for(name: str) -> bool:
    """A scan backend asked for by name is measured as it is, without fused kernels of another."""
    return os.environ.get("DYVM_BACKEND") in (None, "", name)


def _on_cpu(
    hidden: Tensor | None, residual: Tensor, weight: Tensor, dtype: torch.dtype
) -> ModuleType | None:
    """The kernels in C++ where they take these tensors."""
    if residual.device.type != "cpu" or not _asked_for("cpu"):
        return None
    kernels = _module("cpu")
    return kernels if kernels.takes(hidden, residual, weight, dtype) else None


def _fused(hidden: Tensor | None, residual: Tensor, weight: Tensor) -> ModuleType | None:
    """The fused kernels in Triton where they take these tensors."""
    if not _asked_for("triton"):
        return None
    if not weight.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        return None
    kernels = _module("triton")
    return kernels if kernels is not None and kernels.takes(hidden, residual, weight) else None


def _forward(
    hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """normed, their sum (without elements when there is no hidden: it would be the residual
    itself), and 1 / rms [B, L, 1].
    """
    kernels = _fused(hidden, residual, weight) or _on_cpu(hidden, residual, weight, dtype)
    if kernels is not None:
        return kernels.forward(hidden, residual, weight, eps, dtype)
    with torch.autocast(residual.device.type, enabled=False):
        total = residual if hidden is None else residual + hidden
        # One pass over the tokens, where the mean of squares takes two.
        norm = torch.linalg.vector_norm(total, dim=-1, keepdim=True)
        scale = norm.square_().div_(total.shape[-1]).add_(eps).rsqrt_()
        normed = (total * scale).mul_(weight).to(dtype)
    return normed, total.new_empty(0) if hidden is None else total, scale


def _fake_forward(
    hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    total = residual.new_empty(0) if hidden is None else residual.new_empty(residual.shape)
    scale = residual.new_empty(*residual.shape[:-1], 1)
    return residual.new_empty(residual.shape, dtype=dtype), total, scale


def _backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the residual, of hidden (without elements where it is the same tensor) and of
    the weight.
    """
    kernels = _fused(None, total, weight)
    if kernels is None and hidden_dtype == grad_normed.dtype:  # else bf16, by autocast
        kernels = _on_cpu(None, total, weight, hidden_dtype)
    if kernels is not None:
        return kernels.backward(grad_normed, grad_total, total, scale, weight, hidden_dtype)
    with torch.autocast(total.device.type, enabled=False):
        unit, grad = total * scale, grad_normed.to(total.dtype)
        grad_weight = (grad * unit).flatten(0, -2).sum(0).to(weight.dtype)
        grad = grad * weight
        grad = grad.sub_(unit.mul_((grad * unit).mean(-1, keepdim=True))).mul_(scale)
        if grad_total is not None:
            grad += grad_total
        same = hidden_dtype == grad.dtype
        return grad, grad.new_empty(0) if same else grad.to(hidden_dtype), grad_weight


def _fake_backward(
    grad_normed: Tensor,
    grad_total: Tensor | None,
    total: Tensor,
    scale: Tensor,
    weight: Tensor,
    hidden_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    hidden_shape = (0,) if hidden_dtype == total.dtype else total.shape
    return (
        total.new_empty(total.shape),
        total.new_empty(hidden_shape, dtype=hidden_dtype),
        weight.new_empty(weight.shape),
    )


def _setup_context(ctx, inputs, output) -> None:
    hidden, residual, weight, _, _ = inputs
    _, total, scale = output
    ctx.set_materialize_grads(False)
    if hidden is None:
        ctx.mark_non_differentiable(total, scale)
    else:
        ctx.mark_non_differentiable(scale)
    ctx.hidden_dtype = None if hidden is None else hidden.dtype
    ctx.save_for_backward(residual if hidden is None else total, scale, weight)


def _differentiate(
    ctx, grad_normed: Tensor | None, grad_total: Tensor | None, _
) -> tuple[Tensor | None, ...]:
    total, scale, weight = ctx.saved_tensors
    if grad_normed is None:
        known = grad_total is not None and ctx.hidden_dtype is not None
        return grad_total.to(ctx.hidden_dtype) if known else None, grad_total, None, None, None
    hidden_dtype = ctx.hidden_dtype or total.dtype
    grad, grad_hidden, grad_weight = _run_backward(
        grad_normed, grad_total, total, scale, weight, hidden_dtype
    )
    if hidden_dtype == total.dtype:
        grad_hidden = None if ctx.hidden_dtype is None else grad
    return grad_hidden, grad, grad_weight, None, None


_backward_operator = register(
    "add_rms_norm_backward(Tensor grad_normed, Tensor? grad_total, Tensor total, Tensor scale, "
    "Tensor weight, ScalarType hidden_dtype) -> (Tensor, Tensor, Tensor)",
    _backward,
    _fake_backward,
)
_operator = register(
    "add_rms_norm(Tensor? hidden, Tensor residual, Tensor weight, float eps, ScalarType dtype)"
    " -> (Tensor normed, Tensor total, Tensor scale)",
    _forward,
    _fake_forward,
    setup_context=_setup_context,
    backward=_differentiate,
)
_run_backward = direct_on_cpu(_backward_operator, _backward)
_run = direct_on_cpu(_operator, _forward, setup_context=_setup_context, backward=_differentiate)


def _composed(
    hidden: Tensor | None, residual: Tensor, weight: Tensor, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """`_forward` in PyTorch's operators, none of them in place."""
    total = residual if hidden is None else residual + hidden
    scale = torch.rsqrt(total.square().mean(-1, keepdim=True) + eps)
    normed = (total * scale * weight).to(dtype)
    return normed, total.new_empty(0) if hidden is None else total, scale


# For `run_decompositions` of a program that is to run where this operator is not known.
DECOMPOSITIONS = {_operator: _composed}
