"""The forward pass on a GPU.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2).
"""

import torch
import triton
from torch import Tensor

from ..params import BranchParams
from . import in_place
from .call import Call, conv_weights, scan_weights, stack
from .kernels.common import CHUNK
from .kernels.convolution import conv_forward
from .kernels.scan_forward import scan_forward


def convolve(
    call: Call, xz: Tensor, mask: Tensor | None, params: tuple[BranchParams, ...]
) -> Tensor:
    """u [G, B, L, E]."""
    if call.in_place:
        return in_place.forward(call.branches(xz, mask, params), xz.dtype)
    B, L, E = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    u = xz.new_empty(len(params), B, L, E)
    rows, block = 8, 128
    conv_forward[(B, triton.cdiv(L, rows), triton.cdiv(E, block))](
        xz,
        xz.stride(0),
        xz.stride(1),
        mask,
        *call.routing(),
        *conv_weights(params),
        u,
        B,
        L,
        E,
        BOTH=len(params) == 2,
        REVERSE=call.directions[0],
        ROWS=rows,
        BLOCK=block,
        num_warps=1,
    )
    return u


def forward(
    call: Call,
    xz: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    params: tuple[BranchParams, ...],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, L, E]; for the backward pass, and without elements unless `save`: (step, B, C) [G, B,
    L, R + 2N], the sum before the gate [B, L, E] and the states [G, B, chunks - 1, N, E].
    """
    B, L, E = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    R, N = params[0].dt_proj_weight.shape[1], params[0].A.shape[1]
    u = convolve(call, xz, mask, params)
    projected = torch.bmm(u.flatten(1, 2), stack(params, "x_proj_weight", xz.dtype).mT)
    dt = torch.bmm(projected[..., :R], stack(params, "dt_proj_weight", xz.dtype).mT)
    out = xz.new_empty(B, L, E)
    # Kernels leave out what does not exist; nothing that is kept may be undefined there.
    whole = call.lengths is None and call.active is None
    kept = xz.new_empty if whole else xz.new_zeros
    part = kept(B, L, E) if save else out
    saved = max(triton.cdiv(L, CHUNK) - 1, 0)
    block = 32
    states = kept((len(params), B, saved, N, E) if save else (0,), dtype=torch.float32)
    scan_forward[(B * triton.cdiv(E, block),)](
        u,
        dt,
        projected[..., R:],
        R + 2 * N,
        xz[..., E:],
        xz.stride(0),
        xz.stride(1),
        call.step_mask(mask),
        *call.routing(),
        gates,
        *scan_weights(params),
        part,
        out,
        states,
        B,
        L,
        E,
        saved,
        call.scale,
        N=N,
        BOTH=len(params) == 2,
        REVERSE=call.directions[0],
        SAVE=save,
        CHUNK=CHUNK,
        BLOCK=block,
        PREFETCH=True,
        num_warps=1,
    )
    if not save:
        return out, xz.new_empty(0), xz.new_empty(0), states
    return out, projected.view(len(params), B, L, R + 2 * N), part, states
