"""The `triton` backend: fused kernels for CUDA GPUs, and for the CPU in Triton's interpreter (to
test them).

Per call: one convolution kernel writes u of both directions, two GEMMs by PyTorch give (step, B, C)
and the raw step size, one kernel scans, adds the directions and gates. The state is float32
whatever the dtype of xz; GEMMs run in the dtype of xz. Kept for the backward pass: xz, (step, B,
C), the sum before the gate and sparse states; u and the raw step size are computed again. Nothing
waits for the device, so a forward pass can be captured in a CUDA graph. With a mask in place the
convolution is PyTorch's (in_place.py), and the scan's kernels multiply the step sizes. Where it can
be compiled, a kernel in CUDA C++ runs the scan's backward pass (cuda/).

B images, L tokens, E inner channels, N states, R step rank.
"""

import torch
from torch import Tensor

from ops import triton_support
from ops.operators import needs_gradient, plain

from ..params import BranchParams, Directions, flatten

if (_reason := triton_support.refusal(anywhere=True)) is not None:
    raise ImportError(_reason)

from .operator import infer, operator

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_STATES = 64
_CONV_WIDTH = 4


def available() -> str | None:
    """None, or why the kernels cannot run on this machine."""
    return triton_support.refusal()


def takes(xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    states, width = params.A.shape[1], params.conv_weight.shape[1]
    if xz.device.type != "cuda" and not (triton_support.interpreted() and xz.device.type == "cpu"):
        return f"runs on CUDA tensors, not on {xz.device}"
    for name, tensor in (("xz", xz), *zip(params._fields, params, strict=True)):
        if tensor.dtype not in _DTYPES:
            return f"takes float32, bfloat16 and float16, but {name} is {tensor.dtype}"
    if width != _CONV_WIDTH:
        return f"takes convolutions of width {_CONV_WIDTH}, not {width}"
    if states > _MAX_STATES or states & (states - 1):
        return f"takes a number of states that is a power of two up to {_MAX_STATES}, not {states}"
    return None


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
    active = None if active is None else active.unsqueeze(1)
    directions = (None, params) if reverse else (params, None)
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
    """Both directions; arguments and result as in `ops.selective_scan.bidirectional_ssm`."""
    return _run(xz, (forward, backward), mask, gates, active, lengths, scale, in_place)


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
    """The general form of both public functions; active [B, G]."""
    if xz.numel() == 0:
        return xz.chunk(2, dim=-1)[0] * scale
    inputs, weights = (xz, mask, gates, active, lengths), flatten(directions)
    wanted = needs_gradient((*inputs, *weights))
    if not wanted and plain(*inputs, *weights):
        return infer(*inputs, directions, scale, in_place)
    return operator(*inputs, *weights, scale, in_place, wanted)[0]
