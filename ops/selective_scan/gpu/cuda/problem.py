"""The arguments of scan_backward.cu."""

import ctypes

import torch
from torch import Tensor

from ..kernels.common import CHUNK
from ..scan_gradient import Given, Result

BLOCK = 32  # channels of a warp
STATES = 16
_MOST_IMAGES = 65535  # of a grid's second axis
_INDICES = 2**31  # within an image they have 32 bits

SCALARS = {torch.float32: "float", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}


class Problem(ctypes.Structure):
    """Problem of scan_backward.cu."""

    _fields_ = [
        (name, ctypes.c_void_p)
        for name in ("grad_y", "u", "dt", "bc", "mask", "lengths", "active", "gates")
    ]
    _fields_ += [(name, ctypes.c_void_p * 2) for name in ("a", "skip", "bias")]
    _fields_ += [("kept", ctypes.c_void_p)]
    _fields_ += [(f"grad_{name}", ctypes.c_void_p) for name in Result._fields]
    _fields_ += [("stride_active", ctypes.c_longlong * 2)]
    _fields_ += [
        (name, ctypes.c_int) for name in ("tokens", "channels", "stride_bc", "saved", "reverse")
    ]


def refusal(given: Given) -> str | None:
    """None, or why the kernel does not take this."""
    _, B, L, E = given.u.shape
    states = given.bc.shape[-1] // 2
    if states != STATES:
        return f"takes {STATES} states, not {states}"
    dtypes = {given.u.dtype, given.dt.dtype, given.bc.dtype, given.grad_y.dtype}
    if len(dtypes) > 1 or given.u.dtype not in SCALARS:
        return f"takes one type of {', '.join(SCALARS.values())}, not {dtypes}"
    if B > _MOST_IMAGES:
        return f"takes {_MOST_IMAGES} images, not {B}"
    if L * max(E, given.bc.stride(2)) >= _INDICES:
        return f"takes images of less than {_INDICES} values, not {L} x {E}"
    return None


def options(dtype: torch.dtype, masked: bool) -> tuple[str, ...]:
    """What the source is compiled with."""
    return f"-DSCALAR={SCALARS[dtype]}", f"-DMASKED={str(masked).lower()}", f"-DCHUNK={CHUNK}"


def prepared(given: Given) -> Given:
    """The same in the types that the kernel reads; rarely a copy."""

    def cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if tensor is None else tensor.to(dtype)

    return given._replace(
        mask=cast(given.mask, torch.float32),
        lengths=cast(given.lengths, torch.int64),
        active=cast(given.active, torch.bool),
        gates=cast(given.gates, torch.float32),
        A=given.A.float(),
        D=given.D.float(),
        dt_bias=given.dt_bias.float(),
    )


def fill(given: Given, result: Result) -> Problem:
    """`given`: prepared; the tensors must outlive the launch."""

    def pointer(tensor: Tensor | None) -> int | None:
        return None if tensor is None else tensor.data_ptr()

    problem = Problem()
    for name in ("grad_y", "u", "dt", "bc", "mask", "lengths", "active", "gates"):
        setattr(problem, name, pointer(getattr(given, name)))
    for name, tensor in (("a", given.A), ("skip", given.D), ("bias", given.dt_bias)):
        getattr(problem, name)[:] = pointer(tensor[0]), pointer(tensor[-1])
    problem.kept = pointer(given.states)
    for name, tensor in result._asdict().items():
        setattr(problem, f"grad_{name}", pointer(tensor))
    if given.active is not None:
        problem.stride_active[:] = given.active.stride()
    problem.tokens, problem.channels = given.u.shape[2:]
    problem.stride_bc, problem.saved = given.bc.stride(2), given.states.shape[2]
    problem.reverse = given.reverse
    return problem
