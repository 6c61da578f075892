"""A layer's evaluation on a CPU: its head and its scans are a call to the C++ kernels each.

It gives what `mixer.Layer` and its parts define; they do the same in many small steps, which at a
few images take as long as the products. B images, L tokens, d width, E inner width.
"""

import math
import os

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ops.linear import Linear, multiply, multiply_into
from ops.operators import plain_on_cpu
from ops.selective_scan import backend_for
from ops.selective_scan.cpu.layer import PreparedLayer, RouterWeights, spread
from ops.selective_scan.cpu.passes import scratch

from .layouts import ClassSlots


def evaluate(
    layer: nn.Module,
    hidden: Tensor | None,
    residual: Tensor,
    class_slots: ClassSlots,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None] | None:
    """What `layer` returns of these arguments; None where the kernels cannot be used, or where
    something else is to see a part of the layer.
    """
    mixer, norm = layer.mixer, layer.norm
    in_proj, out_proj, router = mixer.in_proj, mixer.out_proj, mixer.block_head
    if (
        torch.compiler.is_compiling()
        or torch.is_grad_enabled()
        or mixer.training
        or mixer.observation.of
        or not _taken(hidden, residual, norm)
        or not _within(class_slots, residual.shape[1])
        or not _unwatched(norm, mixer, in_proj, out_proj, router)
    ):
        return None
    prepared = _prepared(mixer, norm, in_proj, out_proj, router)
    if prepared is None:
        return None
    batch, tokens, _ = residual.shape
    entered = prepared.enter(hidden, residual, class_slots, mixer.gate_threshold, lengths)
    count, origin = len(entered.running), entered.origin
    if count == 0:
        return torch.zeros_like(residual), entered.residual, entered.gates
    out = torch.empty_like(residual) if count == batch else torch.zeros_like(residual)
    # So many images at a time as fit the cache.
    size = mixer.group_size(count, math.ceil(origin[-1] / count), residual.element_size())
    for begin in range(0, count, size):
        end = min(begin + size, count)
        problem, rows = entered.group(begin, end), entered.normed[origin[begin] : origin[end]]
        memory = scratch("xz", len(rows), in_proj.out_features)
        y = prepared.scan(problem, multiply(rows, in_proj.weight, memory=memory))
        if entered.in_order:
            place = out.view(-1, out.shape[2])[origin[begin] : origin[end]]
            multiply_into(place, y, out_proj.weight)
        else:
            product = multiply(y, out_proj.weight, memory=scratch("product", *rows.shape))
            spread(problem, entered.running[begin:end], product, out)
    return out, entered.residual, entered.gates


def _taken(hidden: Tensor | None, residual: Tensor, norm: nn.RMSNorm) -> bool:
    """Whether the tokens are such as the kernels take; the parts tell what is wrong with others."""
    given = (residual,) if hidden is None else (residual, hidden)
    return (
        plain_on_cpu(*given)
        and all(each.dtype == torch.float32 and each.is_contiguous() for each in given)
        and residual.numel() > 0
        and residual.dim() == 3
        and residual.shape[2:] == norm.weight.shape
        and all(each.shape == residual.shape for each in given)
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )


def _within(class_slots: ClassSlots, tokens: int) -> bool:
    """Whether all slots are tokens; a tensor of them is this project's own (`layouts`)."""
    return isinstance(class_slots, Tensor) or all(0 <= slot < tokens for slot in class_slots)


def _unwatched(*parts: nn.Module | None) -> bool:
    """Whether no hook is to be called, and no method was put in the place of a part's own."""
    if torch.nn.modules.module._has_any_global_hook():
        return False
    for part in parts:
        if part is None:
            continue
        own = vars(part)
        if part._forward_hooks or part._forward_pre_hooks or "forward" in own or "route" in own:
            return False
    return True


def _prepared(
    mixer: nn.Module,
    norm: nn.Module,
    in_proj: nn.Module,
    out_proj: nn.Module,
    router: nn.Module | None,
) -> PreparedLayer | None:
    """Of the parts of a layer; None where they are not those that it was built of, or not in
    float32, or where its scans do not run on the C++ kernels.
    """
    if not (
        type(norm) is nn.RMSNorm
        and type(in_proj) is type(out_proj) is Linear
        and in_proj.bias is None
        and out_proj.bias is None
    ):
        return None
    weights = (
        *mixer.branch_weights(False),
        *mixer.branch_weights(True),
        norm.weight,
        in_proj.weight,
        *(() if router is None else (router.weight, router.bias)),
    )
    name = f"layer {os.environ.get('DYVM_BACKEND', '')} {norm.eps} {mixer.scale}"
    return mixer.kept.get(name, weights, lambda: _prepare(mixer, norm, weights))


def _prepare(
    mixer: nn.Module, norm: nn.RMSNorm, weights: tuple[Tensor, ...]
) -> PreparedLayer | None:
    if not plain_on_cpu(*weights) or any(weight.dtype != torch.float32 for weight in weights):
        return None
    forward, backward = mixer.branch(False), mixer.branch(True)
    xz = norm.weight.new_empty(0, 0, mixer.in_proj.out_features)
    if backend_for(xz, forward) != "cpu":
        return None
    router = mixer.block_head
    if router is not None:
        router = RouterWeights(router.product(mixer.in_proj), router.bias)
    return PreparedLayer(forward, backward, mixer.scale, norm.weight, norm.eps, router)
