"""The scan's backward pass as its kernels take it: what they read, what they write; and Triton's.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2), K channel
blocks.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ops import triton_support

from .kernels.common import CHUNK
from .kernels.scan_backward import GROUP, scan_backward

# Channels per program: one a thread, since it fills the registers. In the interpreter a program
# costs the same whatever its width.
TRITON_BLOCK = 64 if triton_support.interpreted() else 32


class Given(NamedTuple):
    """What the kernels read; contiguous but for the rows of bc and for `active`."""

    grad_y: Tensor  # [B, L, E], of the sum of both directions before the gate
    u: Tensor  # [G, B, L, E]
    dt: Tensor  # [G, B, L, E], without the bias
    bc: Tensor  # [G, B, L, 2N]: B, then C
    mask: Tensor | None  # [B, L], multiplies the step sizes
    lengths: Tensor | None  # [B]
    active: Tensor | None  # [B, G]
    gates: Tensor | None  # [B, 2]
    A: Tensor  # [G, N, E]
    D: Tensor  # [G, E]
    dt_bias: Tensor  # [G, E]
    states: Tensor  # [G, B, saved, N, E], float32: after every CHUNK steps
    reverse: bool  # whether the only direction is the reversed one


class Result(NamedTuple):
    """What the kernels write. Zero where there are no tokens; partial sums in float32 but for bc's,
    which are in the type of u, or float32 for float16: with a loss scale they could overflow.
    """

    u: Tensor  # [G, B, L, E]
    dt: Tensor  # [G, B, L, E]
    bc: Tensor  # [K, G, B, L, 2N]
    A: Tensor  # [G, B, N, E]
    channel: Tensor  # [G, B, 2, E]: of D, then of the step bias
    gate: Tensor  # [G, B, K], undefined without gates
    mask: Tensor | None  # [K, G, B, L], as far as it comes through the step sizes


def empty_result(given: Given, block: int) -> Result:
    """Memory for the result of kernels that take `block` channels at a time."""
    G, B, L, E = given.u.shape
    N, K = given.bc.shape[-1] // 2, triton.cdiv(E, block)
    half = given.u.dtype == torch.float16

    def full(*shape):
        return given.u.new_empty(shape, dtype=torch.float32)

    return Result(
        torch.empty_like(given.u),
        torch.empty_like(given.u),
        given.u.new_empty(K, G, B, L, 2 * N, dtype=torch.float32 if half else None),
        full(G, B, N, E),
        full(G, B, 2, E),
        full(G, B, K),
        None if given.mask is None else full(K, G, B, L),
    )


def run_triton(given: Given) -> Result:
    G, B, L, E = given.u.shape
    N = given.bc.shape[-1] // 2
    result = empty_result(given, TRITON_BLOCK)
    scratch = given.states.new_empty(G, B, CHUNK // GROUP, N, E)
    active = (0, 0) if given.active is None else given.active.stride()
    scan_backward[(B * triton.cdiv(E, TRITON_BLOCK), G)](
        given.grad_y,
        given.u,
        given.dt,
        given.bc,
        given.bc.stride(2),
        given.mask,
        given.lengths,
        given.active,
        *active,
        given.gates,
        given.A,
        given.D,
        given.dt_bias,
        given.states,
        scratch,
        *result,
        B,
        L,
        E,
        given.states.shape[2],
        N=N,
        REVERSE=given.reverse,
        CHUNK=CHUNK,
        GROUP=GROUP,
        BLOCK=TRITON_BLOCK,
        num_warps=1,
    )
    return result
