"""The scan in PyTorch's own control flow, for programs that are traced to run elsewhere.

`torch.export` makes the loop a `scan` node and a direction that may be off a `cond` node, which
ONNX has too (`Scan`, `If`); a batch of which no image wants a direction costs nothing for it.
Nothing in it needs this project. Run by Python it is slow: only
`ops.selective_scan.traced_with` asks for it.

B images, L tokens, E inner channels, N states, R step rank.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from .params import BranchParams


def _scan(delta: Tensor, inputs: Tensor, A: Tensor, B: Tensor, C: Tensor, reverse: bool) -> Tensor:
    """y_t = C_t h_t with h_t = exp(delta_t A) h_{t-1} + inputs_t B_t, along the first dimension.

    delta, inputs [L, B, E]; A [N, E]; B, C [L, B, N] -> [L, B, E].
    """

    def step(state: Tensor, token: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        delta_t, input_t, B_t, C_t = token
        state = torch.exp(delta_t * A) * state + input_t * B_t
        return state, torch.matmul(C_t, state)

    # The shapes that broadcast: nothing is left to a step but its arithmetic.
    rows = delta.unsqueeze(2), inputs.unsqueeze(2), B.unsqueeze(3), C.unsqueeze(2)
    start = delta.new_zeros(delta.shape[1], *A.shape)
    return scan(step, start, rows, reverse=reverse)[1].squeeze(2)


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x), from operators that runtimes have vectorised; ONNX Runtime's own takes several
    times as long. The last term is what rounding takes from 1 + w.
    """
    w = torch.exp(-x.abs())
    rounded = 1.0 + w
    return torch.relu(x) + torch.log(rounded) + (w - (rounded - 1.0)) / rounded


def _branch(xz: Tensor, params: BranchParams, reverse: bool) -> Tensor:
    """xz [B, L, 2E] -> y [B, L, E]"""
    x, z = xz.chunk(2, dim=-1)
    weight, width = params.conv_weight, params.conv_weight.shape[1]
    x = F.pad(x.transpose(1, 2), (0, width - 1) if reverse else (width - 1, 0))
    weight = (weight.flip(1) if reverse else weight).unsqueeze(1)
    u = F.silu(F.conv1d(x, weight, params.conv_bias, groups=len(weight))).permute(2, 0, 1)
    rank, states = params.dt_proj_weight.shape[1], params.A.shape[1]
    dt, B, C = F.linear(u, params.x_proj_weight).split([rank, states, states], dim=-1)
    delta = _softplus(F.linear(dt, params.dt_proj_weight, params.dt_proj_bias))
    # Dense: the state keeps its layout from step to step.
    y = _scan(delta, delta * u, params.A.t().contiguous(), B, C, reverse)
    return ((y + params.D * u).transpose(0, 1) * F.silu(z)).contiguous()


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
    """As in `ops.selective_scan`; NotImplementedError for mask, gates and lengths."""
    if mask is not None or gates is not None or lengths is not None:
        raise NotImplementedError("the portable scan is for evaluation: no mask, gates or lengths")
    total = 0
    for direction, params in enumerate((forward, backward)):
        reverse = direction == 1

        def run(xz: Tensor, params=params, reverse=reverse) -> Tensor:
            return _branch(xz, params, reverse)

        if active is None:
            total = total + run(xz)
            continue
        on = active[:, direction]
        y = torch.cond(on.any(), run, lambda xz: torch.zeros_like(xz.chunk(2, dim=-1)[0]), (xz,))
        total = total + y * on.to(y.dtype)[:, None, None]
    return total * scale if scale != 1.0 else total
