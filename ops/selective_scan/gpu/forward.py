"""The forward pass on a GPU.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2).
"""

import torch
import triton
from torch import Tensor

from . import in_place
from .call import Call
from .kernels.common import CHUNK
from .kernels.convolution import conv_forward
from .kernels.gating import join_directions
from .kernels.scan_forward import scan_forward
from .kernels.split_scan import piece_ends, scan_pieces
from .plan import STEPS, plan
from .weights import Weights


def convolve(call: Call, xz: Tensor, mask: Tensor | None, weights: Weights) -> Tensor:
    """u [G, B, L, E]."""
    if call.in_place:
        return in_place.forward(call.branches(xz, mask, weights.params), xz.dtype)
    B, L, E = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    u = xz.new_empty(len(weights.params), B, L, E)
    rows, block = 8, 128
    conv_forward[(B, triton.cdiv(L, rows), triton.cdiv(E, block))](
        xz,
        xz.stride(0),
        xz.stride(1),
        mask,
        *call.routing(),
        weights.conv_weight,
        weights.conv_bias,
        u,
        B,
        L,
        E,
        BOTH=len(weights.params) == 2,
        REVERSE=call.directions[0],
        ROWS=rows,
        BLOCK=block,
        num_warps=1,
    )
    return u


def forward(
    call: Call, xz: Tensor, mask: Tensor | None, gates: Tensor | None, weights: Weights, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, L, E]; for the backward pass, and without elements unless `save`: (step, B, C) [G, B,
    L, R + 2N], the sum before the gate [B, L, E] and the states [G, B, chunks - 1, N, E].
    """
    u = convolve(call, xz, mask, weights)
    G, B, L, E = u.shape
    projected = torch.bmm(u.flatten(1, 2), weights.x_proj.mT)
    dt = torch.bmm(projected[..., : weights.rank], weights.dt_proj.mT)
    # Kernels leave out what does not exist; nothing that is kept may be undefined there.
    whole = call.lengths is None and call.active is None
    kept = xz.new_empty if whole else xz.new_zeros
    out = xz.new_empty(B, L, E)
    part = kept(B, L, E) if save else out
    saved = max(triton.cdiv(L, CHUNK) - 1, 0)
    N = weights.states
    states = kept((G, B, saved, N, E) if save else (0,), dtype=torch.float32)
    _scan(call, xz, mask, gates, weights, u, dt, projected, part, out, states, saved, save)
    if not save:
        return out, xz.new_empty(0), xz.new_empty(0), states
    return out, projected.view(G, B, L, weights.rank + 2 * N), part, states


def _scan(
    call: Call,
    xz: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    weights: Weights,
    u: Tensor,
    dt: Tensor,
    projected: Tensor,
    part: Tensor,
    out: Tensor,
    states: Tensor,
    saved: int,
    save: bool,
) -> None:
    """Writes out, and with `save` part and states."""
    (G, B, L, E), N = u.shape, weights.states
    bc = projected[..., weights.rank :]
    given = u, dt, bc, bc.stride(-2)
    scan_weights = weights.A, weights.D, weights.dt_bias
    z = xz[..., E:], xz.stride(0), xz.stride(1)
    layout = plan(xz.device, B, E, L, G)
    constants = {
        "N": N,
        "REVERSE": call.directions[0],
        "BLOCK": layout.block,
        "STEPS": STEPS,
        "PACKED": _packed(bc),
        "num_warps": layout.warps,
    }
    keeping = {"SAVE": save, "CHUNK": CHUNK}
    programs = B * triton.cdiv(E, layout.block)
    if not layout.pieces:
        scan_forward[(programs,)](
            *given,
            *z,
            call.step_mask(mask),
            *call.routing(),
            gates,
            *scan_weights,
            part,
            out,
            states,
            B,
            L,
            E,
            saved,
            call.scale,
            BOTH=G == 2,
            **keeping,
            **constants,
        )
        return
    pieces, width = layout.pieces, layout.width
    full = states.new_empty
    ends, sums = full(G, B, pieces - 1, N, E), full(G, B, pieces - 1, E)
    parts = full(G, B, L, E)
    if pieces > 1:
        piece_ends[(programs * (pieces - 1), G)](
            *given,
            call.step_mask(mask),
            *call.routing(),
            *scan_weights,
            ends,
            sums,
            B,
            L,
            E,
            width,
            pieces,
            **constants,
        )
    scan_pieces[(programs * pieces, G)](
        *given,
        call.step_mask(mask),
        *call.routing(),
        gates,
        *scan_weights,
        ends,
        sums,
        parts,
        states,
        B,
        L,
        E,
        saved,
        width,
        pieces,
        **keeping,
        **constants,
    )
    rows, block = 8, 128
    join_directions[(B, triton.cdiv(L, rows), triton.cdiv(E, block))](
        parts,
        *z,
        *call.routing(),
        part,
        out,
        B,
        L,
        E,
        call.scale,
        BOTH=G == 2,
        SAVE=save,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )


def _packed(bc: Tensor) -> bool:
    """Whether B and C of every token are whole and aligned 64-bit words."""
    bytes_of = bc.element_size()
    places = (bc.data_ptr(), *(stride * bytes_of for stride in bc.stride()[:-1]))
    return bc.shape[-1] * bytes_of % 8 == 0 and all(place % 8 == 0 for place in places)
