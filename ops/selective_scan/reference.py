"""The definition of the selective scan branch, in plain PyTorch. Every fast backend is tested
against it.

B images, L tokens, E inner channels, N states, R step rank, W convolution width.
Source: Gu & Dao, "Mamba" (arXiv 2312.00752), algorithm 2; the masks are those of
"Dynamic Vision Mamba" (arXiv 2504.04787), section 3, or in place.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .opaque import opaque
from .params import BranchParams


def available() -> str | None:
    """None: runs everywhere."""
    return None


def takes(xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    """None: takes every argument that the public function lets through."""
    return None


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Depthwise causal convolution. x [B, E, L], weight [E, W], bias [E] -> [B, E, L]; activation
    None or "silu".
    """
    if activation not in (None, "silu"):
        raise ValueError(f"activation must be None or 'silu', not {activation!r}")
    channels, width = weight.shape
    y = F.conv1d(F.pad(x, (width - 1, 0)), weight.unsqueeze(1), bias, groups=channels)
    return F.silu(y) if activation == "silu" else y


def kept_conv1d(x: Tensor, mask: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Depthwise convolution of every token and its nearest W - 1 kept predecessors.

    x [B, L, E], mask [B, L], weight [E, W], bias [E] -> [B, L, E].

    The window is a queue that kept tokens enter. It is affine in the mask of each single token, so
    that autograd's derivative is exactly the window with that token minus the window without it.
    Windows of dropped tokens are read from a queue that has no such gradient.
    """
    mask, kept = mask.to(x.dtype), mask > 0.5
    enters = (kept + (mask - mask.detach())).unsqueeze(-1)
    fixed = queue = [torch.zeros_like(x[:, 0])] * (weight.shape[1] - 1) if x.shape[1] else []
    outputs = []
    for t, token in enumerate(x.unbind(1)):
        before = [torch.where(kept[:, t, None], *pair) for pair in zip(queue, fixed, strict=True)]
        outputs.append((torch.stack([*before, token], dim=-1) * weight).sum(-1) + bias)
        queue = _enter(queue, token, enters[:, t])
        fixed = _enter(fixed, token, enters[:, t].detach())
    return torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x)


def _enter(queue: list[Tensor], token: Tensor, enters: Tensor) -> list[Tensor]:
    """The queue, nearest token last, behind a token [B, E] that enters it (1) or not (0)."""
    moved = [*queue, token][1:]
    return [enters * new + (1 - enters) * old for new, old in zip(moved, queue, strict=True)]


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sequential scan: h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t, y_t = (C_t h_t + D u_t) *
    silu(z_t).

    u, delta, z [B, E, L]; A [E, N]; B, C [B, N, L]; D, delta_bias [E] -> y [B, E, L], last state
    [B, E, N].
    """
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    state = u.new_zeros(u.shape[0], u.shape[1], A.shape[1])
    outputs = []
    for t in range(u.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        state = decay * state + (delta[:, :, t] * u[:, :, t]).unsqueeze(-1) * B[:, None, :, t]
        outputs.append((state * C[:, None, :, t]).sum(-1))
    y = torch.stack(outputs, dim=2) if outputs else torch.zeros_like(u)
    if D is not None:
        y = y + D[:, None] * u
    if z is not None:
        y = y * F.silu(z)
    return y, state


def branch_inputs(
    xz: Tensor,
    params: BranchParams,
    *,
    reverse: bool = False,
    mask: Tensor | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the scan of one direction reads, in token order (a reversed direction is flipped back).
    A mask in place is in the windows of the convolution alone.

    xz [B, L, 2E] -> u [B, L, E], raw step dt_proj.weight dt_raw [B, L, E] (no bias, no softplus), B
    and C [B, L, N].
    """
    x = xz.chunk(2, dim=-1)[0]
    in_place = in_place and mask is not None
    if mask is not None and not in_place:
        x = x * mask.unsqueeze(-1)
    if reverse:
        x = x.flip(1)
    if in_place:
        along = mask.flip(1) if reverse else mask
        u = F.silu(kept_conv1d(x, along, params.conv_weight, params.conv_bias))
    else:
        u = causal_conv1d(
            x.transpose(1, 2), params.conv_weight, params.conv_bias, "silu"
        ).transpose(1, 2)
    if reverse:
        u = u.flip(1)
    if mask is not None and not in_place:
        u = u * mask.unsqueeze(-1)
    rank, states = params.dt_proj_weight.shape[1], params.A.shape[1]
    dt, B, C = F.linear(u, params.x_proj_weight).split([rank, states, states], dim=-1)
    return u, F.linear(dt, params.dt_proj_weight), B, C


@opaque("reference")
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
    """One scan direction; arguments and result as in `ops.selective_scan.ssm_branch`.

    Arithmetic in float32 (float64 for float64 inputs); the result has the dtype of xz.
    """
    dtype = xz.dtype
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    with torch.autocast(xz.device.type, enabled=False):
        xz = xz.to(compute)
        params = BranchParams(*(p.to(compute) for p in params))
        mask = None if mask is None else mask.to(compute)
        if lengths is not None:
            prefix = torch.arange(xz.shape[1], device=xz.device) < lengths.unsqueeze(1)
            mask = prefix.to(compute) if mask is None else torch.where(prefix, mask, 0)
        u, dt, B, C = branch_inputs(xz, params, reverse=reverse, mask=mask, in_place=in_place)
        step_bias = params.dt_proj_bias
        if in_place:
            dt, step_bias = F.softplus(dt + step_bias) * mask.unsqueeze(-1), None
        z = xz.chunk(2, dim=-1)[1]
        inputs = [t.flip(1) if reverse else t for t in (u, dt, B, C, z)]
        u, dt, B, C, z = (t.transpose(1, 2) for t in inputs)
        softplus = step_bias is not None
        y, _ = selective_scan(u, dt, params.A, B, C, params.D, z, step_bias, softplus)
        y = y.transpose(1, 2)
        y = y.flip(1) if reverse else y
        if lengths is not None:
            y = torch.where(prefix.unsqueeze(-1), y, 0)
        if active is not None:
            y = torch.where(active.bool()[:, None, None], y, 0)
    return y.to(dtype)
