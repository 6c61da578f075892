"""The C++ kernels as Python calls them: the library, and ctypes mirrors of its structures."""

import ctypes
import logging

import torch
from torch import Tensor

from ..params import BranchParams
from .build import load_library

_SERIAL = 1 << 17  # numbers that one thread has done sooner than others are awake

_logger = logging.getLogger(__name__)
_held: ctypes.CDLL | None = None


class Given(ctypes.Structure):
    """Given of problem.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in BranchParams._fields]


class Direction(ctypes.Structure):
    """Direction of problem.h."""

    _fields_ = [("given", Given)]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in (
            "start",
            "weights",
            "u",
            "projected",
            "checkpoints",
            "chunk",
            "projection",
            "grad_u",
            "grad_delta",
            "grad_projected",
            "grad_weights",
        )
    ]


class Problem(ctypes.Structure):
    """Problem of problem.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("images", "tokens", "channels", "padded", "states", "rank")
    ]
    _fields_ += [
        ("rows", ctypes.c_int64 * 2),
        ("chunks", ctypes.c_int64 * 2),
        ("groups", ctypes.c_int64),
        ("threads", ctypes.c_int64),
        ("in_place", ctypes.c_int64),
    ]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in (
            "xz",
            "mask",
            "factor",
            "length",
            "limit",
            "out",
            "origin",
            "grad_out",
            "grad_xz",
            "grad_mask",
            "grad_factor",
        )
    ]
    _fields_ += [("direction", Direction * 2)]


class Head(ctypes.Structure):
    """Head of layer.h."""

    _fields_ = [(name, ctypes.c_int64) for name in ("width", "slots", "threads", "slot_stride")]
    _fields_ += [
        (name, ctypes.c_void_p)
        for name in (
            "slot",
            "length",
            "hidden",
            "residual",
            "norm_weight",
            "router_weight",
            "router_bias",
            "total",
            "normed",
            "gates",
            "active",
            "running",
            "origin",
            "table",
        )
    ]
    _fields_ += [("eps", ctypes.c_float), ("threshold", ctypes.c_float)]


def load() -> ctypes.CDLL:
    """The library, built where this machine has not yet. Raises BuildError."""
    global _held
    library = load_library()
    for size, mirror in ((library.problem_bytes(), Problem), (library.head_bytes(), Head)):
        if size != ctypes.sizeof(mirror):
            raise AssertionError(f"{mirror.__name__} in C++ and its ctypes mirror disagree")
    if not library.several_threads():
        _logger.warning("the compiler has no OpenMP: the CPU kernels run on one thread")
    _held = library
    return library


def kernels() -> ctypes.CDLL:
    """The library, loaded when an exported program is the first to ask. Raises BuildError."""
    return load() if _held is None else _held


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element; the tensor must outlive its use."""
    return None if tensor is None else tensor.data_ptr()


def threads_for(tensor: Tensor) -> int:
    """How many to wake for one pass over a tensor."""
    return 1 if tensor.numel() < _SERIAL else torch.get_num_threads()


def padded(channels: int) -> int:
    """P: channels rounded up to whole vectors."""
    lanes = kernels().lanes()
    return -(-channels // lanes) * lanes
