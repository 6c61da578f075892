"""The registered operators of the `triton` backend, and their gradients.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ops.operators import register
from ops.triton_support import launching_on

from ..params import COUNT, DIRECTIONS_SCHEMA, BranchParams, Directions, unflatten
from . import backward, forward
from .call import Call
from .kernels.common import CHUNK
from .weights import Weights


def _as_gradient(grad: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A mask of booleans or integers has no gradient."""
    given = tensor is not None and tensor.is_floating_point()
    return grad.to(tensor.dtype) if given else None


_ARGUMENTS = (
    "Tensor xz, Tensor? mask, Tensor? gates, Tensor? active, Tensor? lengths, "
    f"{DIRECTIONS_SCHEMA}, float scale, bool in_place"
)


_LEAVES = 5 + 2 * COUNT  # tensors among the arguments


class _Arguments(NamedTuple):
    """An operator's arguments as the passes take them."""

    call: Call
    xz: Tensor
    mask: Tensor | None
    gates: Tensor | None
    params: tuple[BranchParams, ...]

    def made(self) -> tuple:
        """With the weights as the kernels read them."""
        return *self[:-1], Weights.of(self.params, self.xz.dtype)


def _read(
    xz: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    active: Tensor | None,
    lengths: Tensor | None,
    directions: Directions,
    scale: float,
    in_place: bool,
) -> _Arguments:
    reverse = tuple(d == 1 for d, params in enumerate(directions) if params is not None)
    return _Arguments(
        Call(reverse, active, None if lengths is None else lengths.contiguous(), scale, in_place),
        xz if xz.stride(2) == 1 else xz.contiguous(),
        None if mask is None else mask.contiguous(),
        None if gates is None else gates.contiguous(),
        tuple(params for params in directions if params is not None),
    )


def _arguments(xz, mask, gates, active, lengths, *rest) -> _Arguments:
    """Of an operator's flat arguments."""
    *tensors, scale, in_place = rest
    return _read(xz, mask, gates, active, lengths, unflatten(tuple(tensors)), scale, in_place)


def infer(xz: Tensor, *rest) -> Tensor:
    """The scan [B, L, E] where nothing but its numbers is wanted: not by way of the operator, whose
    flat arguments do not say that weights stay as they are. Arguments as `_read`.
    """
    with torch.autocast(xz.device.type, enabled=False), launching_on(xz):
        read = _read(xz, *rest)
        weights = Weights.kept(read.params, read.xz.dtype)
        return forward.forward(*read[:-1], weights, False)[0]


def _scan(*given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, save = given
    with torch.autocast(given[0].device.type, enabled=False), launching_on(given[0]):
        return forward.forward(*_arguments(*given).made(), save)


def _fake_scan(*given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, save = given
    _, xz, _, _, params = _arguments(*given)
    (B, L, width), (E, N), G = xz.shape, params[0].A.shape, len(params)
    K, saved = params[0].x_proj_weight.shape[0], -(-L // CHUNK) - 1
    sizes = ((G, B, L, K), (B, L, E), (G, B, saved, N, E)) if save else ((0,), (0,), (0,))
    projected, part, states = sizes
    return (
        xz.new_empty(B, L, width // 2),
        xz.new_empty(projected),
        xz.new_empty(part),
        xz.new_empty(states, dtype=torch.float32),
    )


def _gradients(grad_out: Tensor, projected, part, states, *given) -> tuple[Tensor, ...]:
    with torch.autocast(grad_out.device.type, enabled=False), launching_on(grad_out):
        saved = projected, part, states
        return backward.backward(*_arguments(*given).made(), *saved, grad_out.contiguous())


def _fake_gradients(grad_out: Tensor, projected, part, states, *given) -> tuple[Tensor, ...]:
    _, xz, mask, gates, params = _arguments(*given)
    (E, N), (B, L, _), G = params[0].A.shape, xz.shape, len(params)
    K, R = params[0].x_proj_weight.shape[0], params[0].dt_proj_weight.shape[1]
    full = states.new_empty
    return (
        xz.new_empty(xz.shape),
        full(0 if mask is None else (B, L)),
        full(0 if gates is None else (G, B)),
        full(G, 5, E),
        xz.new_empty(G, K, E),
        xz.new_empty(G, E, R),
        full(G, N, E),
        full(G, 2, E),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.in_place, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _differentiate(ctx, grad_out: Tensor, *_) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    tensors, saved = kept[:_LEAVES], kept[_LEAVES:]
    grad_xz, grad_mask, grad_gates, *packed = _backward_operator(
        grad_out, *saved, *tensors, ctx.scale, ctx.in_place
    )
    _, mask, gates, _, _, *weights = tensors
    grads, which = [], 0
    for params in unflatten(tuple(weights)):
        if params is None:
            grads += [None] * COUNT
            continue
        conv, x_weight, dt_weight, A, channel = (tensor[which] for tensor in packed)
        which += 1
        values = (conv[:4].t(), conv[4], x_weight, dt_weight, channel[1], A.t(), channel[0])
        grads += [value.to(tensor.dtype) for value, tensor in zip(values, params, strict=True)]
    grad_gates = None if gates is None else grad_gates.t().to(gates.dtype)
    grad_mask = _as_gradient(grad_mask, mask)
    return grad_xz, grad_mask, grad_gates, None, None, *grads, *(None for _ in range(3))


_backward_operator = register(
    "triton_scan_backward(Tensor grad_out, Tensor projected, Tensor part, Tensor states, "
    f"{_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
    _gradients,
    _fake_gradients,
)


operator = register(
    f"triton_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _scan,
    _fake_scan,
    setup_context=_setup_context,
    backward=_differentiate,
)
