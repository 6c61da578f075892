"""Selective scan in lean PyTorch, for every device: the state is updated in place and the backward
pass recomputes it.

Under plain autograd the loop of `reference.py` keeps every state, [B, L, N, E] several times over.
Here the steps are done in chunks: what does not depend on the state (decays, inputs, outputs) is
computed for a whole chunk at once into reused buffers, only `state = decay * state + input` runs
step by step, and the state at the head of each chunk is all that is saved. The time index comes
first and channels last, so that each step works on contiguous memory.

B images, L tokens, E inner channels, N states, R step rank, T steps of a chunk.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ops.operators import needs_gradient, register

from .params import BranchParams
from .windows import window_conv

CHUNK = 8  # T; a chunk's buffers, [T, B, N, E] each, should stay in the processor's cache


def available() -> str | None:
    """None: runs everywhere."""
    return None


def takes(xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    """None: takes every argument that the public function lets through."""
    return None


def _chunks(length: int, reverse: bool) -> list[tuple[slice, list[int]]]:
    """Chunks in scan order: the tokens of each, and the order in which the scan visits them within
    the chunk.
    """
    spans = [slice(start, min(start + CHUNK, length)) for start in range(0, length, CHUNK)]
    if reverse:
        return [(span, list(range(span.stop - span.start))[::-1]) for span in reversed(spans)]
    return [(span, list(range(span.stop - span.start))) for span in spans]


def _chunk_states(
    state: Tensor,
    delta: Tensor,
    inputs: Tensor,
    A: Tensor,
    B: Tensor,
    order: list[int],
    decays: Tensor,
    states: Tensor,
) -> None:
    """Decays and states of one chunk, written to `decays` and `states` [T, B, N, E].

    state [B, N, E] at the chunk's head; delta, inputs (= delta u) [T, B, E]; A [N, E]; B [T, B, N].
    """
    torch.mul(delta.unsqueeze(2), A, out=decays).exp_()
    torch.mul(inputs.unsqueeze(2), B.unsqueeze(3), out=states)
    for step in order:
        state = states[step].addcmul_(decays[step], state)


def _scan(
    delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """y_t = C_t h_t with h_t = exp(delta_t A) h_{t-1} + inputs_t B_t, along the first dimension.

    delta, inputs [L, B, E]; A [N, E]; B, C [L, B, N] -> y [L, B, E] and, for the backward pass, the
    states at the chunks' heads [chunks, B, N, E] in scan order; none of them unless `save`.
    """
    y, heads = _scan_results(delta, inputs, A, B, C, reverse, save)
    length, (images, states_count, channels) = delta.shape[0], heads.shape[1:]
    buffers = delta.new_empty(2, min(CHUNK, length), images, states_count, channels)
    state = delta.new_zeros(images, states_count, channels)
    for index, (span, order) in enumerate(_chunks(length, reverse)):
        if save:
            heads[index] = state
        decays, states = buffers[:, : len(order)]
        _chunk_states(state, delta[span], inputs[span], A, B[span], order, decays, states)
        torch.matmul(C[span].unsqueeze(2), states, out=y[span].unsqueeze(2))
        state = states[order[-1]].clone()
    return y, heads


def _scan_results(
    delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool, save: bool
) -> tuple[Tensor, Tensor]:
    """y and heads as `_scan` fills them."""
    length, images, channels = delta.shape
    chunks = -(-length // CHUNK) if save else 0
    return torch.empty_like(inputs), delta.new_empty(chunks, images, A.shape[0], channels)


def _scan_backward(
    grad_y: Tensor,
    delta: Tensor,
    inputs: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    heads: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of delta, inputs, A, B and C."""
    grad_delta, grad_inputs, grad_A, grad_B, grad_C = _scan_gradients(
        grad_y, delta, inputs, A, B, C, heads, reverse
    )
    grad_A.zero_()
    buffers = delta.new_empty(3, min(CHUNK, delta.shape[0]), *heads.shape[1:])
    carried = 0  # decay_{t+1} dL/dh_{t+1}
    for (span, order), head in zip(
        reversed(_chunks(delta.shape[0], reverse)), reversed(heads.unbind()), strict=True
    ):
        decays, states, grads = buffers[:, : len(order)]
        _chunk_states(head, delta[span], inputs[span], A, B[span], order, decays, states)
        torch.mul(grad_y[span].unsqueeze(2), C[span].unsqueeze(3), out=grads)
        grad_C[span] = torch.matmul(states, grad_y[span].unsqueeze(3)).squeeze(3)
        for position in range(len(order) - 1, -1, -1):
            step = order[position]
            grads[step] += carried
            before = states[order[position - 1]] if position else head
            # `states` now turns into dL/d(delta_t A) = dL/dh_t * decay_t * h_{t-1}
            carried = decays[step].mul_(grads[step])
            torch.mul(carried, before, out=states[step])
        carried = carried.clone()  # its buffer is written by the next chunk
        grad_inputs[span] = torch.matmul(B[span].unsqueeze(2), grads).squeeze(2)
        grad_B[span] = torch.matmul(grads, inputs[span].unsqueeze(3)).squeeze(3)
        grad_delta[span] = (states * A).sum(2)
        grad_A += states.mul_(delta[span].unsqueeze(2)).sum((0, 1))
    return grad_delta, grad_inputs, grad_A, grad_B, grad_C


def _scan_gradients(
    grad_y: Tensor,
    delta: Tensor,
    inputs: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    heads: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients as `_scan_backward` fills them."""
    return tuple(torch.empty_like(t) for t in (delta, inputs, A, B, C))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.reverse, _ = inputs
    _, heads = output
    ctx.mark_non_differentiable(heads)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, heads)


def _differentiate(ctx, grad_y, _):
    grads = _scan_backward_operator(grad_y, *ctx.saved_tensors, ctx.reverse)
    return (*grads, None, None)


_SCANNED = "Tensor delta, Tensor inputs, Tensor A, Tensor B, Tensor C"
_scan_backward_operator = register(
    f"torch_scan_backward(Tensor grad_y, {_SCANNED}, Tensor heads, bool reverse)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _scan_backward,
    _scan_gradients,
)
_scan_operator = register(
    f"torch_scan({_SCANNED}, bool reverse, bool save) -> (Tensor y, Tensor heads)",
    _scan,
    _scan_results,
    setup_context=_setup_context,
    backward=_differentiate,
)


def _conv_silu(x: Tensor, params: BranchParams, reverse: bool) -> Tensor:
    """Causal convolution + SiLU of x [L, B, E] along the first dimension; reverse looks at later
    tokens instead.
    """
    width, length = params.conv_weight.shape[1], x.shape[0]
    x = F.pad(x, (0, 0, 0, 0, 0, width - 1) if reverse else (0, 0, 0, 0, width - 1, 0))
    y = params.conv_bias
    for offset in range(width):
        tap = width - 1 - offset if reverse else offset
        y = torch.addcmul(y, x[offset : offset + length], params.conv_weight[:, tap])
    return F.silu(y)


def _masked_conv(
    x: Tensor, mask: Tensor | None, params: BranchParams, reverse: bool, in_place: bool
) -> Tensor:
    """x [L, B, E], mask [L, B] -> u [L, B, E]"""
    if mask is None:
        return _conv_silu(x, params, reverse)
    if in_place:
        conv = x.transpose(0, 1), mask.t(), params.conv_weight, params.conv_bias
        return F.silu(window_conv(*conv, reverse)).transpose(0, 1)
    return _conv_silu(x * mask.unsqueeze(-1), params, reverse) * mask.unsqueeze(-1)


def _branch(
    xz: Tensor, params: BranchParams, reverse: bool, mask: Tensor | None, in_place: bool
) -> Tensor:
    """xz [L, B, 2E], mask [L, B] -> y [L, B, E]; everything in one floating-point type."""
    x, z = xz.chunk(2, dim=-1)
    u = _masked_conv(x, mask, params, reverse, in_place)
    rank, states = params.dt_proj_weight.shape[1], params.A.shape[1]
    dt, B, C = F.linear(u, params.x_proj_weight).split([rank, states, states], dim=-1)
    delta = F.softplus(F.linear(dt, params.dt_proj_weight, params.dt_proj_bias))
    if in_place:
        delta = delta * mask.unsqueeze(-1)
    scan_arguments = (delta, delta * u, params.A.t().contiguous(), B, C)
    y, _ = _scan_operator(*scan_arguments, reverse, needs_gradient(scan_arguments))
    return torch.addcmul(y, params.D, u) * F.silu(z)


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
    dtype, (images, length, _), channels = xz.dtype, xz.shape, params.D.shape[0]
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    rows = None
    # Elsewhere, choosing rows would make the host wait; a compiled program has one shape for all.
    chooses = xz.device.type == "cpu" and not torch.compiler.is_compiling()
    if active is not None and chooses:
        rows = active.nonzero().squeeze(1)
        xz = xz.index_select(0, rows)
        mask, lengths = (None if t is None else t.index_select(0, rows) for t in (mask, lengths))
    with torch.autocast(xz.device.type, enabled=False):
        params = BranchParams(*(p.to(compute) for p in params))
        mask = None if mask is None else mask.to(compute)
        prefix = None
        if lengths is not None:
            prefix = torch.arange(length, device=xz.device) < lengths.unsqueeze(1)
            mask = prefix.to(compute) if mask is None else torch.where(prefix, mask, 0)
        along = None if mask is None else mask.t()
        y = _branch(xz.to(compute).transpose(0, 1), params, reverse, along, in_place)
        y = y.transpose(0, 1)
        if prefix is not None:
            y = torch.where(prefix.unsqueeze(-1), y, 0)
        if rows is not None:
            y = y.new_zeros(images, length, channels).index_copy(0, rows, y)
        elif active is not None:
            y = torch.where(active.bool()[:, None, None], y, 0)
    return y.to(dtype)
