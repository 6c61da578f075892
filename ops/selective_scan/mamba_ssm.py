"""The `mamba_ssm` backend: the CUDA kernels of the packages mamba-ssm and causal-conv1d, where they
are installed.

Both packages import without their kernels (built for other GPUs, another PyTorch, or not at all),
so each kernel is called once before the backend counts as available. The kernels know neither masks
nor lengths nor direction: sequences are masked and flipped around them, and images that are
switched off are computed and zeroed, which costs time but never makes the host wait for the device.
A mask in place is refused.

B images, L tokens, E inner channels, N states, R step rank, W convolution width.
"""

import importlib.util
import sys

import torch
import torch.nn.functional as F
from torch import Tensor

from .opaque import opaque
from .params import BranchParams

_DEVICE = "cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_STATES = 256
_IN_PLACE = "has no in-place form of the mask"
# The packages as Python and as pip name them, and the module with each one's kernels.
_CUDA_PARTS = {
    "mamba_ssm": ("mamba-ssm", "selective_scan_cuda"),
    "causal_conv1d": ("causal-conv1d", "causal_conv1d_cuda"),
}


def _kernels():
    """The packages' functions (selective_scan_fn, causal_conv1d_fn). Raises ImportError where they
    are missing.
    """
    from causal_conv1d import causal_conv1d_fn
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    return selective_scan_fn, causal_conv1d_fn


def available() -> str | None:
    if _DEVICE == "cuda" and not torch.cuda.is_available():
        return "needs a CUDA GPU"
    try:
        selective_scan_fn, causal_conv1d_fn = _kernels()
        x = torch.zeros(1, 8, 8, device=_DEVICE)
        weights = torch.zeros(8, 4, device=_DEVICE)
        causal_conv1d_fn(x, weights, weights[:, 0].contiguous(), activation="silu")
        selective_scan_fn(
            x, x, weights, x[:, :4].contiguous(), x[:, :4].contiguous(), delta_softplus=True
        )
    except Exception as error:  # whatever a package with missing or foreign kernels comes up with
        return (
            "the kernels of mamba-ssm and causal-conv1d do not run here "
            f"({type(error).__name__}: {error}){_without_cuda_part()}"
        )
    return None


def _without_cuda_part() -> str:
    """What to do for packages that are installed without their kernels; empty if none is."""
    names = [
        package
        for module, (package, part) in _CUDA_PARTS.items()
        if _installed(module) and not _installed(part)
    ]
    if not names:
        return ""
    return (
        f"; {' and '.join(names)} installed without the CUDA part: rebuild with "
        "MAMBA_KEEP_CUDA_BUILD=TRUE, see requirements-cuda.txt"
    )


def _installed(module: str) -> bool:
    return module in sys.modules or importlib.util.find_spec(module) is not None


def takes(xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    if in_place:
        return _IN_PLACE
    if xz.device.type != _DEVICE:
        return f"runs on CUDA tensors, not on {xz.device}"
    if xz.dtype not in _DTYPES:
        return f"takes float32, bfloat16 and float16, not {xz.dtype}"
    if not 2 <= params.conv_weight.shape[1] <= 4:
        return f"takes convolutions of width 2 to 4, not {params.conv_weight.shape[1]}"
    if params.A.shape[1] > _MAX_STATES:
        return f"takes at most {_MAX_STATES} states, not {params.A.shape[1]}"
    return None


@opaque("mamba_ssm")
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

    The packages' kernels read [B, E, L], contiguous along L; A, D and the step bias in float32, the
    rest in the dtype of xz. Raises ValueError for a mask in place, which `takes` refuses.
    """
    if in_place:
        raise ValueError(f"mamba_ssm {_IN_PLACE}")
    if xz.numel() == 0:
        return xz.chunk(2, dim=-1)[0].clone()
    selective_scan_fn, causal_conv1d_fn = _kernels()
    dtype = xz.dtype
    prefix = None
    mask = None if mask is None else mask.to(dtype)
    if lengths is not None:
        prefix = torch.arange(xz.shape[1], device=xz.device) < lengths.unsqueeze(1)
        mask = prefix.to(dtype) if mask is None else torch.where(prefix, mask, 0)
    with torch.autocast(xz.device.type, enabled=False):
        flipped = xz.flip(1) if reverse else xz
        x, z = flipped.mT.chunk(2, dim=1)
        along = None if mask is None else (mask.flip(1) if reverse else mask).unsqueeze(1)
        x = (x if along is None else x * along).contiguous()
        u = causal_conv1d_fn(
            x, params.conv_weight.to(dtype), params.conv_bias.to(dtype), activation="silu"
        )
        if along is not None:
            u = u * along
        rank, states = params.dt_proj_weight.shape[1], params.A.shape[1]
        step, B, C = F.linear(u.mT, params.x_proj_weight.to(dtype)).split(
            [rank, states, states], dim=-1
        )
        delta = F.linear(step, params.dt_proj_weight.to(dtype)).mT.contiguous()
        y = selective_scan_fn(
            u.contiguous(),
            delta,
            params.A.float().contiguous(),
            B.mT.contiguous(),
            C.mT.contiguous(),
            params.D.float(),
            z=z.contiguous(),
            delta_bias=params.dt_proj_bias.float(),
            delta_softplus=True,
        ).mT
        y = y.flip(1) if reverse else y
        if prefix is not None:
            y = torch.where(prefix.unsqueeze(-1), y, 0)
        if active is not None:
            y = torch.where(active.bool()[:, None, None], y, 0)
    return y
