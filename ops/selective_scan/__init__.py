"""The selective scan: what the model calls, and the one place that chooses its implementation.

`ssm_branch` is one scan direction; `bidirectional_ssm` is the gated sum of both, which a backend
may fuse. A backend is a module of this package with

    takes(xz, params, in_place) -> None, or the reason why it does not take these arguments (device,
                                   dtype, sizes, a mask in place)
    available()                 -> None, or the reason why it cannot run on this machine; called
                                   once, after `takes`
    ssm_branch(...)                the function below
    bidirectional_ssm(...)         optional: both directions in one go

`DYVM_BACKEND=NAME` forces one; otherwise the first of `PREFERENCE` that is available and takes the
arguments runs.

B images, L tokens, E inner channels, N states, R step rank.
"""

import importlib
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ops.operators import refuse_forward_mode
from utils.errors import UserError

from . import cpu, reference, torch_lean  # noqa: F401 (register their operators)
from .params import BranchParams, KeptParams
from .reference import branch_inputs

__all__ = [
    "BackendError",
    "BranchParams",
    "KeptParams",
    "backend_for",
    "bidirectional_ssm",
    "branch_inputs",
    "runs_on",
    "ssm_branch",
    "traced_with",
]

PREFERENCE = ("cpu", "triton", "mamba_ssm", "torch", "reference")  # fastest first
_MODULES = {
    "torch": "torch_lean",
    "triton": "gpu",
    "portable": "portable_scan",
}  # modules not named like their backend

_logger = logging.getLogger(__name__)
_reported: set[str] = set()
_chosen: dict[str, ModuleType] = {}
_traced_with: str | None = None
_MUCH_SLOWER = ("torch", "reference")


class BackendError(UserError, RuntimeError):
    """A backend that was asked for by name cannot run here or does not take the arguments."""


@contextmanager
def traced_with(name: str) -> Iterator[None]:
    """Within it, `bidirectional_ssm` is traced for programs that run where this project is not
    installed: "portable" in PyTorch's own operators alone, "native" in those of a C++ library.
    """
    global _traced_with
    before, _traced_with = _traced_with, name
    try:
        yield
    finally:
        _traced_with = before


@lru_cache(maxsize=None)
def _load(name: str) -> tuple[ModuleType | None, str | None]:
    """The backend's module, or the reason why it cannot be imported."""
    try:
        return importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}"), None
    except ImportError as error:
        return None, f"cannot be imported ({error})"


@lru_cache(maxsize=None)
def _unavailable(name: str) -> str | None:
    """Why the backend cannot run on this machine; asked once, since the answer may take a build."""
    return _load(name)[0].available()


def _machine_refusal(name: str) -> str | None:
    """Why a backend cannot run on this machine, whatever its arguments."""
    return _load(name)[1] or _unavailable(name)


def available(name: str) -> bool:
    """Whether a backend can run on this machine, whatever its arguments."""
    return _unavailable(name) is None


def _refusal(name: str, xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    module, reason = _load(name)
    return reason or module.takes(xz, params, in_place) or _unavailable(name)


def runs_on(name: str, device: str) -> bool:
    """Whether a backend is available here and takes float32 tensors of usual sizes on a device
    ("cpu", "cuda").
    """
    E, N, R = 16, 16, 1
    sizes = ((E, 4), (E,), (R + 2 * N, E), (E, R), (E,), (E, N), (E,))
    params = BranchParams(*(torch.zeros(size, device=device) for size in sizes))
    return _refusal(name, torch.zeros(1, 1, 2 * E, device=device), params) is None


def backend_for(xz: Tensor, params: BranchParams, in_place: bool = False) -> str:
    """Name of the backend that runs these arguments; `in_place`: with a mask in place.

    In a program that is compiled or exported the choice is made while it is traced.

    Raises BackendError when `DYVM_BACKEND` names one that is unknown, unavailable or does not take
    them.
    """
    if torch.compiler.is_compiling():
        dtypes = tuple(tensor.dtype for tensor in params)
        shapes = tuple(tuple(tensor.shape) for tensor in params)
        return _backend_while_tracing(xz.device, xz.dtype, dtypes, shapes, in_place)
    return _choose(xz, params, in_place)


@torch.compiler.assume_constant_result
def _backend_while_tracing(
    device: torch.device,
    dtype: torch.dtype,
    dtypes: tuple[torch.dtype, ...],
    shapes: tuple[tuple[int, ...], ...],
    in_place: bool,
) -> str:
    """`backend_for` as a constant of the traced program, from what a backend may ask of tensors."""
    with unset_fake_temporarily():
        params = BranchParams(
            *(
                torch.empty(shape, dtype=d, device=device)
                for shape, d in zip(shapes, dtypes, strict=True)
            )
        )
        channels = params.A.shape[0]
        xz = torch.empty(1, 1, 2 * channels, dtype=dtype, device=device)
        return _choose(xz, params, in_place)


def _choose(xz: Tensor, params: BranchParams, in_place: bool) -> str:
    forced = os.environ.get("DYVM_BACKEND")
    if forced:
        if forced not in PREFERENCE:
            raise BackendError(
                f"DYVM_BACKEND={forced}: no such backend; choose one of {', '.join(PREFERENCE)}"
            )
        reason = _refusal(forced, xz, params, in_place)
        if reason is not None:
            raise BackendError(f"DYVM_BACKEND={forced}: {reason}")
        chosen = forced
    else:
        chosen = next(n for n in PREFERENCE if _refusal(n, xz, params, in_place) is None)
    _chosen[chosen], _ = _load(chosen)
    if chosen not in _reported:
        _reported.add(chosen)
        _logger.info("selective scan on %s runs on the '%s' backend", xz.device, chosen)
    if xz.device.type == "cuda" and not forced:
        _warn_without_triton(chosen)
    return chosen


@lru_cache(maxsize=None)
def _warn_without_triton(chosen: str) -> None:
    """Say once that a GPU runs without the kernels written for it, if the machine is why."""
    reason = _machine_refusal("triton")
    if reason is not None:
        slower = ", many times slower" if chosen in _MUCH_SLOWER else ""
        _logger.warning(
            "the 'triton' backend cannot run here, and the selective scan runs on '%s'%s: %s",
            chosen,
            slower,
            reason,
        )


def _describe(value: object) -> str:
    return (
        f"{value.dtype} {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    )


def _check(
    xz: Tensor,
    params: BranchParams,
    mask: Tensor | None,
    active: Tensor | None,
    lengths: Tensor | None,
    directions: tuple[int, ...],
) -> None:
    """One clear line for arguments that disagree; shapes, dtypes and devices only, so the host
    never waits.

    `active` has shape [B, *directions].
    """
    if not isinstance(xz, Tensor) or xz.dim() != 3 or not xz.is_floating_point():
        raise ValueError(f"xz must be a floating-point tensor [B, L, 2E], not {_describe(xz)}")
    if not isinstance(params, BranchParams):
        raise ValueError(
            f"the weights of a direction must be BranchParams, not {_describe(params)}"
        )
    for name, tensor in params._asdict().items():
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{name} must be a floating-point tensor, not {_describe(tensor)}")
    for name in ("conv_weight", "dt_proj_weight", "A"):
        if getattr(params, name).dim() != 2:
            raise ValueError(f"{name} must be a matrix, not {_describe(getattr(params, name))}")
    channels, states = params.A.shape
    rank = params.dt_proj_weight.shape[1]
    wanted = BranchParams(
        (channels, params.conv_weight.shape[-1]),
        (channels,),
        (rank + 2 * states, channels),
        (channels, rank),
        (channels,),
        (channels, states),
        (channels,),
    )
    if xz.shape[2] != 2 * channels:
        raise ValueError(
            f"xz {list(xz.shape)} must have 2E = {2 * channels} channels to agree with A "
            f"[{channels}, N]"
        )
    for name, tensor, shape in zip(BranchParams._fields, params, wanted, strict=True):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
        if tensor.device != xz.device:
            raise ValueError(f"{name} is on {tensor.device}, xz on {xz.device}")
    for name, tensor, shape in (
        ("mask", mask, tuple(xz.shape[:2])),
        ("active", active, (xz.shape[0], *directions)),
        ("lengths", lengths, (xz.shape[0],)),
    ):
        if tensor is None:
            continue
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            raise ValueError(f"{name} must be a tensor of real numbers, not {_describe(tensor)}")
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {list(shape)}, not {list(tensor.shape)}")
        if tensor.device != xz.device:
            raise ValueError(f"{name} is on {tensor.device}, xz on {xz.device}")
    if lengths is not None and lengths.is_floating_point():
        raise ValueError(f"lengths must be integers, not {lengths.dtype}")


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
    """One scan direction: convolution + SiLU, projections to (step, B, C), selective scan, skip and
    gate.

    Args:
        xz: [B, L, 2E], the halves x and z of the input projection.
        params: weights of this direction.
        reverse: walk from the last token to the first.
        mask: [B, L], multiplies x and the convolution's output; receives a gradient. Tokens behind
            the last one that is not masked need not be read: whether a NaN there shows depends on
            the backend.
        active: [B]; an image whose entry is False costs nothing and its rows are zero.
        lengths: [B]; only an image's first `lengths` tokens exist: the reversed walk starts at the
            last of them and the rows behind are zero. The same result as a mask of that prefix, at
            less cost.
        in_place: what the mask, of zeros and ones alone, means. False: as above, for kept tokens
            that were moved before dropped ones. True: for tokens that stay where they are. The mask
            multiplies the step size and neither x nor the convolution's output, so that a state
            passes a dropped token unchanged; and the convolution reads a token and its nearest
            kept predecessors (successors in reverse), kept being > 0.5. Kept tokens get what they
            would get were the dropped ones taken out; a dropped one gets what its own features
            read from the state that passes. The mask's gradient has two parts, for kept and
            dropped tokens alike: through the step; and, for the windows of kept tokens that
            contain the token or would if it were kept, the gradient of the convolution's sum times
            the difference that the token makes there. Without a mask nothing changes.

    Returns:
        y [B, L, E] in the dtype of xz.

    Raises:
        ValueError: shapes, dtypes or devices disagree.
        BackendError: see `backend_for`.
    """
    refuse_forward_mode("the selective scan")
    _check(xz, params, mask, active, lengths, ())
    in_place = in_place and mask is not None
    backend = _chosen[backend_for(xz, params, in_place)]
    return backend.ssm_branch(
        xz, params, reverse=reverse, mask=mask, active=active, lengths=lengths, in_place=in_place
    )


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
    """scale * (gates[:, 0] * forward branch + gates[:, 1] * backward branch), the body of the Mamba
    mixer.

    Args:
        gates: [B, 2], multiplies the directions' outputs after the scan; receives a gradient
            (training).
        active: [B, 2]; a direction that is False costs nothing for that image (evaluation).
        Others as in `ssm_branch`.

    Returns:
        y [B, L, E] in the dtype of xz. Raises as `ssm_branch`.
    """
    refuse_forward_mode("the selective scan")
    _check(xz, forward, mask, active, lengths, (2,))
    _check(xz, backward, None, None, None, ())
    for name, one, other in zip(BranchParams._fields, forward, backward, strict=True):
        if one.shape != other.shape:
            raise ValueError(
                f"{name} has shape {list(one.shape)} forward and {list(other.shape)} backward"
            )
    if gates is not None and (not isinstance(gates, Tensor) or gates.is_complex()):
        raise ValueError(f"gates must be a tensor of real numbers, not {_describe(gates)}")
    if gates is not None and tuple(gates.shape) != (xz.shape[0], 2):
        raise ValueError(f"gates must have shape {[xz.shape[0], 2]}, not {list(gates.shape)}")
    if gates is not None and gates.device != xz.device:
        raise ValueError(f"gates is on {gates.device}, xz on {xz.device}")
    in_place = in_place and mask is not None
    if _traced_with:
        backend = _load(_traced_with)[0]
    else:
        backend = _chosen[backend_for(xz, forward, in_place)]
    if hasattr(backend, "bidirectional_ssm"):
        return backend.bidirectional_ssm(
            xz,
            forward,
            backward,
            mask=mask,
            gates=gates,
            active=active,
            lengths=lengths,
            scale=scale,
            in_place=in_place,
        )
    total = 0
    for direction, params in enumerate((forward, backward)):
        y = backend.ssm_branch(
            xz,
            params,
            reverse=direction == 1,
            mask=mask,
            lengths=lengths,
            active=None if active is None else active[:, direction],
            in_place=in_place,
        )
        if gates is not None:
            y = y * gates[:, direction, None, None].to(y.dtype)
        total = total + y
    return total * scale if scale != 1.0 else total
