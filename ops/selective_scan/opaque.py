"""A scan direction in plain PyTorch as one operator, for programs that are compiled or exported.

A compiler would unroll its loop over the tokens. In eager mode the function runs as it is, under
autograd; as an operator it keeps its arguments alone, and its backward pass computes it again.
"""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor

from ops.operators import recording, register

from .params import COUNT, BranchParams

_ARGUMENTS = ", ".join(
    [
        "Tensor xz",
        *(f"Tensor {name}" for name in BranchParams._fields),
        "Tensor? mask, Tensor? active, Tensor? lengths, bool reverse, bool in_place",
    ]
)
_OPTIONS = ("mask", "active", "lengths", "reverse", "in_place")
_LEAVES = COUNT + 2  # xz, the weights and the mask come first and receive gradients


def opaque(name: str) -> Callable:
    """Decorator of a backend's `ssm_branch`, which is also registered as `dyvm::{name}_branch`."""

    def decorate(branch: Callable) -> Callable:
        operator = _register(name, branch)

        @wraps(branch)
        def chosen(
            xz, params, *, mask=None, active=None, lengths=None, reverse=False, in_place=False
        ):
            options = (mask, active, lengths, reverse, in_place)
            if torch.compiler.is_compiling():
                return operator(xz, *params, *options)
            return branch(xz, params, **dict(zip(_OPTIONS, options, strict=True)))

        return chosen

    return decorate


def _register(name: str, branch: Callable) -> torch._ops.OpOverload:
    def forward(xz, *rest):
        options = dict(zip(_OPTIONS, rest[COUNT:], strict=True))
        return branch(xz, BranchParams(*rest[:COUNT]), **options).contiguous()

    def gradients(grad, *arguments):
        leaves = [_leaf(tensor) for tensor in arguments[:_LEAVES]]
        wanted = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
        with recording():
            y = forward(*leaves, *arguments[_LEAVES:])
            grads = torch.autograd.grad(y, wanted, grad, materialize_grads=True)
        return [g.contiguous() for g in grads]

    def fake_gradients(grad, *arguments):
        given = [t for t in arguments[:_LEAVES] if _takes_gradient(t)]
        return [t.new_empty(t.shape) for t in given]

    back = register(
        f"{name}_branch_backward(Tensor grad, {_ARGUMENTS}) -> Tensor[]", gradients, fake_gradients
    )

    def setup_context(ctx, inputs, output):
        *tensors, reverse, in_place = inputs
        ctx.flags = reverse, in_place
        ctx.save_for_backward(*tensors)

    def backward(ctx, grad):
        tensors = ctx.saved_tensors
        grads = iter(back(grad, *tensors, *ctx.flags))
        leaves = [next(grads) if _takes_gradient(t) else None for t in tensors[:_LEAVES]]
        return (*leaves, *(None for _ in _OPTIONS[1:]))

    return register(
        f"{name}_branch({_ARGUMENTS}) -> Tensor",
        forward,
        _fake_output,
        setup_context=setup_context,
        backward=backward,
    )


def _takes_gradient(tensor: Tensor | None) -> bool:
    """A mask of booleans or integers has no gradient."""
    return tensor is not None and tensor.is_floating_point()


def _leaf(tensor: Tensor | None) -> Tensor | None:
    return tensor.detach().requires_grad_() if _takes_gradient(tensor) else tensor


def _fake_output(xz: Tensor, *rest) -> Tensor:
    return xz.new_empty(*xz.shape[:2], rest[0].shape[0])
