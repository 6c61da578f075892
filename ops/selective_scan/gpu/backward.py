"""The backward pass on a GPU.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2), K channel
blocks.
"""

import torch
import triton
from torch import Tensor

from . import cuda, in_place
from .call import Call
from .forward import convolve
from .kernels.convolution import conv_backward
from .kernels.gating import gate_backward
from .scan_gradient import Given, run_triton
from .weights import Weights


def backward(
    call: Call,
    xz: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    weights: Weights,
    projected: Tensor,
    part: Tensor,
    states: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of xz, mask [B, L] and gates [G, B] (without elements where there are none); of the
    convolutions [G, 5, E] (taps, bias), x_proj_weight [G, R + 2N, E], dt_proj_weight [G, E, R], A
    [G, N, E], and of D and the step bias [G, 2, E].
    """
    G, B, L, E = len(weights.params), xz.shape[0], xz.shape[1], xz.shape[2] // 2
    step = projected.flatten(1, 2)[..., : weights.rank]
    u = convolve(call, xz, mask, weights)
    dt = torch.bmm(step, weights.dt_proj.mT)

    grad_xz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    grad_z = grad_xz[..., E:]
    grad_y = torch.empty_like(grad_out)
    rows, block = 8, 128
    gate_backward[(B, triton.cdiv(L, rows), triton.cdiv(E, block))](
        grad_out,
        xz[..., E:],
        xz.stride(0),
        xz.stride(1),
        part,
        *call.routing(),
        grad_y,
        grad_z,
        grad_z.stride(0),
        grad_z.stride(1),
        L,
        E,
        call.scale,
        BOTH=G == 2,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )

    grad_u, grad_dt, grad_bc, grad_A, grad_channel, grad_gate, by_step = _scan_backward(
        call, grad_y, u, dt, projected, mask, gates, weights, states
    )
    grad_dt = grad_dt.flatten(1, 2)
    grad_projected = torch.cat([torch.bmm(grad_dt, weights.dt_proj), grad_bc.flatten(1, 2)], dim=-1)
    grad_x_weight = torch.bmm(grad_projected.mT, u.flatten(1, 2))
    grad_dt_weight = torch.bmm(grad_dt.mT, step)
    grad_u.flatten(1, 2).baddbmm_(grad_projected, weights.x_proj)

    if call.in_place:
        branches = call.branches(xz, mask, weights.params)
        grad_x, grad_weights, grad_mask = in_place.backward(branches, grad_u)
        grad_xz[..., :E] = grad_x
        grad_mask = grad_mask + by_step
    else:
        grad_weights, grad_mask = _convolve_backward(call, xz, mask, weights, grad_u, grad_xz)
    nothing = grad_weights.new_empty
    return (
        grad_xz,
        nothing(0) if mask is None else grad_mask,
        nothing(0) if gates is None else grad_gate.sum(-1),
        grad_weights,
        grad_x_weight,
        grad_dt_weight,
        grad_A,
        grad_channel,
    )


def _scan_backward(
    call: Call,
    grad_y: Tensor,
    u: Tensor,
    dt: Tensor,
    projected: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    weights: Weights,
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt [G, B, L, E] and (B, C) [G, B, L, 2N] in their dtype; in float32 of A [G,
    N, E], of D and the step bias [G, 2, E], of the gates [G, B, K], still to be added up, and of a
    mask in place [B, L] through the steps (else None).
    """
    given = Given(
        grad_y,
        u,
        dt,
        projected[..., weights.rank :],
        call.step_mask(mask),
        call.lengths,
        call.active,
        gates,
        weights.A,
        weights.D,
        weights.dt_bias,
        states,
        call.directions[0],
    )
    result = cuda.scan_backward(given) or run_triton(given)
    grad_bc = result.bc.sum(0, dtype=torch.float32).to(u.dtype)
    by_step = result.mask.sum((0, 1)) if call.in_place else None
    grad_A, grad_channel = result.A.sum(1), result.channel.sum(1)
    return result.u, result.dt, grad_bc, grad_A, grad_channel, result.gate, by_step


def _convolve_backward(
    call: Call, xz: Tensor, mask: Tensor | None, weights: Weights, grad_u: Tensor, grad_xz: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Writes the gradient of x into grad_xz; gives those of the weights [G, 5, E] (taps, bias) and
    the mask [B, L].
    """
    G, B, L, E = grad_u.shape
    block = 64
    blocks = triton.cdiv(E, block)
    grad_weights = grad_u.new_empty(G, B, 5, E, dtype=torch.float32)
    grad_mask = None if mask is None else grad_u.new_empty(blocks, B, L, dtype=torch.float32)
    conv_backward[(B * blocks,)](
        xz,
        xz.stride(0),
        xz.stride(1),
        mask,
        *call.routing(),
        weights.conv_weight,
        weights.conv_bias,
        grad_u,
        grad_xz,
        grad_xz.stride(0),
        grad_xz.stride(1),
        grad_weights,
        grad_mask,
        B,
        L,
        E,
        FORWARD=False in call.directions,
        REVERSE=True in call.directions,
        BLOCK=block,
        num_warps=1,
    )
    return grad_weights.sum(1), None if mask is None else grad_mask.sum(0)
