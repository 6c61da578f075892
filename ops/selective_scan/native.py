"""The scan's inference as operators of a C++ library (cpu/operator.cpp), for programs that are
traced to run without Python, on a CPU of this kind.

Weights are packed by an operator of their own: what depends on weights alone, a compiler does once.
Only `ops.selective_scan.traced_with` asks for it.

B images, L tokens, E inner channels, N states, R step rank.
"""

from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from .cpu import build
from .cpu.library import padded
from .cpu.passes import CONV_WIDTH
from .params import BranchParams


@lru_cache(maxsize=None)
def library() -> Path:
    """The library, built where this machine has not yet, and loaded. Raises BuildError."""
    path = build.library_path(_flags(), "operator.cpp")
    torch.ops.load_library(path)
    torch.library.register_fake(
        "dyvm_cpu::receive", lambda images, size: images.new_empty(images.shape)
    )
    torch.library.register_fake("dyvm_cpu::pack", _fake_pack)
    torch.library.register_fake("dyvm_cpu::scan", _fake_scan)
    return path


def _flags() -> tuple[str, ...]:
    from torch.utils.cpp_extension import include_paths, library_paths

    return (
        f'-DBUILT_WITH="{torch.__version__}"',  # another version is built anew
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        "-fvisibility=hidden",
        f"-ffile-prefix-map={build.FOLDER}=.",  # no path of this machine in its messages
        *(f"-I{path}" for path in include_paths()),
        *(f"-L{path}" for path in library_paths()),
        "-ltorch_cpu",
        "-lc10",
    )


def _fake_pack(conv_weight, conv_bias, x_proj_weight, dt_proj_weight, dt_proj_bias, A, D):
    (channels, states), rank = A.shape, dt_proj_weight.shape[1]
    return (
        A.new_empty(CONV_WIDTH + 3 + states + rank, padded(channels)),
        A.new_empty(channels, padded(rank + 2 * states)),
    )


def _fake_scan(xz, *rest):
    return xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)


def receive(images: Tensor) -> Tensor:
    """images; the traced program refuses every size but theirs, except that of the batch."""
    library()
    return torch.ops.dyvm_cpu.receive(images, images.shape[1:])


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
        raise NotImplementedError("this scan is for evaluation: no mask, gates or lengths")
    library()
    packed = (*torch.ops.dyvm_cpu.pack(*forward), *torch.ops.dyvm_cpu.pack(*backward))
    states, rank = forward.A.shape[1], forward.dt_proj_weight.shape[1]
    return torch.ops.dyvm_cpu.scan(xz, *packed, active, states, rank, scale)
