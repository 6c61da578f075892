"""Selective scan on the CPU: C++ kernels (kernel.cpp), in the backward pass around PyTorch's matrix
products.

One pass over x does the convolution and SiLU of both directions, one projects to (step, B, C), one
does step, scan, skip, gate and the sum of the directions. Where there are images enough, a thread
takes a whole one through all of it. The backward pass recomputes the states from checkpoints every
16 steps, and the outputs of the two directions along with them.

Work is only done for tokens that exist. A direction that is not `active`, tokens behind `lengths`,
and tokens behind the last one that `mask` lets through are left out of the packed rows that all
passes and matrix products work on: without input from behind, neither direction's state differs
from zero when it reaches, or after it has left, the last visible token. A mask in place leaves out
nothing, since dropped tokens look at the states that pass them.

B images, L tokens, E inner channels, N states, R step rank, P = E rounded up to whole vectors.
"""

import logging

import torch
from torch import Tensor

from ops.operators import direct_on_cpu, needs_gradient, plain_on_cpu, register

from ..params import (
    COUNT,
    DIRECTIONS_SCHEMA,
    BranchParams,
    Directions,
    KeptParams,
    flatten,
    unflatten,
)
from . import passes
from .build import BuildError
from .library import load
from .passes import CONV_WIDTH, Call, Gradients, Packed, Saved

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_logger = logging.getLogger(__name__)


def available() -> str | None:
    """None once the kernels are built and loaded, or the reason why they are not."""
    try:
        load()
    except BuildError as error:
        _logger.warning("the CPU kernels are not available: %s", error)
        return str(error)
    return None


def takes(xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    """None, or the reason why these arguments are not taken."""
    if xz.device.type != "cpu":
        return f"runs on the CPU, not on {xz.device}"
    if xz.dtype not in _DTYPES:
        return f"takes float32, bfloat16 or float16, not {xz.dtype}"
    if params.conv_weight.shape[1] != CONV_WIDTH:
        return f"takes a convolution of width {CONV_WIDTH}, not {params.conv_weight.shape[1]}"
    return None


# The operators. Floating-point arguments are float32: casts happen in sight of autograd, which
# casts the gradients back.

_ARGUMENTS = (
    "Tensor xz, Tensor? mask, Tensor? gates, Tensor? active, Tensor? lengths, "
    f"{DIRECTIONS_SCHEMA}, float scale, bool in_place"
)
_LEAVES = 5 + 2 * COUNT  # tensors among the arguments
_SAVED = 9


def _call(xz, mask, gates, active, lengths, *rest) -> Call:
    """From the arguments of an operator, contiguous as the kernels need them."""
    *params, scale, in_place = rest
    images, tokens, _ = xz.shape
    has_mask = mask is not None
    return Call(
        xz.contiguous(),
        mask.contiguous() if has_mask else xz.new_ones(images, tokens),
        xz.new_full((images, 2), scale) if gates is None else gates.contiguous() * scale,
        has_mask and not in_place,
        has_mask,
        has_mask and in_place,
        None if active is None else active.contiguous(),
        None if lengths is None else lengths.contiguous(),
        unflatten(tuple(None if p is None else p.contiguous() for p in params)),
    )


def _infer(*arguments) -> Tensor:
    call = _call(*arguments)
    return passes.infer(call, Packed.of(call))


def _packed(directions: Directions, arguments: tuple) -> tuple[Call, Packed] | None:
    """For `passes.infer`, with weights that stay as they are packed once; None where they may
    change, or a tracer or counter has to see the operator.
    """
    given = [params for params in directions if params is not None]
    if not all(isinstance(params, KeptParams) for params in given) or not plain_on_cpu(
        *(tensor for tensor in arguments if isinstance(tensor, Tensor))
    ):
        return None
    call, serials = _call(*arguments), tuple(params.serial for params in given)
    made, key = given[0].made, ("cpu", *(params is None for params in directions))
    known, packed = made.get(key, (None, None))
    if known != serials:
        packed = Packed.of(call)
        made[key] = serials, packed
    return call, packed


def _fake_infer(xz, *rest) -> Tensor:
    return xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)


def _scan(*arguments) -> tuple[Tensor, ...]:
    """y and the tensors of `Saved`."""
    with torch.autocast("cpu", enabled=False):
        out, saved = passes.forward(_call(*arguments))
    return out, *saved.flatten()


def _fake_scan(*arguments) -> tuple[Tensor, ...]:
    return _fake_infer(*arguments), *Saved.empty(_call(*arguments)).flatten()


def _scan_backward(grad_out: Tensor, *rest) -> tuple[Tensor, ...]:
    """The tensors of `Gradients`, of the gates instead of the factor."""
    saved, arguments = rest[:_SAVED], rest[_SAVED:]
    with torch.autocast("cpu", enabled=False):
        grads = passes.backward(grad_out.contiguous(), _call(*arguments), Saved.unflatten(saved))
    *_, scale, _ = arguments
    return grads._replace(factor=grads.factor * scale).flatten()


def _fake_scan_backward(grad_out: Tensor, *rest) -> tuple[Tensor, ...]:
    return Gradients.empty(_call(*rest[_SAVED:])).flatten()


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.in_place = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _differentiate(ctx, grad_out, *_) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors  # once: checkpointing gives them out a single time
    tensors, saved = kept[:_LEAVES], kept[_LEAVES:]
    xz, mask, gates, *rest = _run_scan_backward(grad_out, *saved, *tensors, ctx.scale, ctx.in_place)
    channels, weights = tensors[0].shape[2] // 2, []
    for which, params in enumerate(unflatten(tensors[5:])):
        if params is None:
            weights += [None] * COUNT
            continue
        packed, x_proj = rest[which::2]
        taps, bias, D, A, dt_bias, dt_proj = packed[:, :channels].split(
            (CONV_WIDTH, 1, 1, params.A.shape[1], 1, params.dt_proj_weight.shape[1])
        )
        # With the strides of the weight also where R is 1, as DistributedDataParallel wants them.
        dt_proj = dt_proj.t().clone(memory_format=torch.contiguous_format)
        weights += BranchParams(taps.t(), bias[0], x_proj, dt_proj, dt_bias[0], A.t(), D[0])
    wanted = (xz, None if tensors[1] is None else mask, None if tensors[2] is None else gates)
    return *wanted, None, None, *weights, None, None


_infer_operator = register(f"cpu_infer({_ARGUMENTS}) -> Tensor", _infer, _fake_infer)
_scan_backward_operator = register(
    f"cpu_scan_backward(Tensor grad_out, {', '.join(f'Tensor saved{i}' for i in range(_SAVED))}, "
    f"{_ARGUMENTS}) -> ({', '.join(['Tensor'] * 7)})",
    _scan_backward,
    _fake_scan_backward,
)
_scan_operator = register(
    f"cpu_scan({_ARGUMENTS}) -> (Tensor, {', '.join(['Tensor'] * _SAVED)})",
    _scan,
    _fake_scan,
    setup_context=_setup_context,
    backward=_differentiate,
)
_run_scan_backward = direct_on_cpu(_scan_backward_operator, _scan_backward)
_run_scan = direct_on_cpu(
    _scan_operator, _scan, setup_context=_setup_context, backward=_differentiate
)


def _run(
    xz: Tensor,
    directions: Directions,
    mask: Tensor | None,
    gates: Tensor | None,
    active: Tensor | None,
    lengths: Tensor | None,
    scale: float,
    in_place: bool,
) -> Tensor:
    """The general form of both public functions; active [B, 2]."""
    leaves = [None if t is None else t.float() for t in (xz, mask, gates, *flatten(directions))]
    arguments = (
        *leaves[:3],
        None if active is None else active.bool(),
        None if lengths is None else lengths.long(),
        *leaves[3:],
        scale,
        in_place,
    )
    if needs_gradient(leaves):
        return _run_scan(*arguments)[0].to(xz.dtype)
    packed = _packed(directions, arguments)
    if packed is not None:
        return passes.infer(*packed).to(xz.dtype)
    return _infer_operator(*arguments).to(xz.dtype)


def ssm_branch(
    xz: Tensor,
    params: BranchParams,
    *,
    reverse: bool = False,
    mask: Tensor | None = None,
    active: Tensor | None = None,
    lengths: Tensor | None = None,
    in_place: bool = False,
) -> Tensor:
    """One scan direction; arguments and result as in `ops.selective_scan.ssm_branch`."""
    directions = (None, params) if reverse else (params, None)
    active = None if active is None else active.unsqueeze(1).expand(-1, 2)
    return _run(xz, directions, mask, None, active, lengths, 1.0, in_place)


def bidirectional_ssm(
    xz: Tensor,
    forward: BranchParams,
    backward: BranchParams,
    *,
    mask: Tensor | None = None,
    gates: Tensor | None = None,
    active: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    in_place: bool = False,
) -> Tensor:
    """Both directions, gated and summed; arguments and result as in
    `ops.selective_scan.bidirectional_ssm`.
    """
    return _run(xz, (forward, backward), mask, gates, active, lengths, scale, in_place)
