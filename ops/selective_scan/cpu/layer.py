"""A layer's head and scans at evaluation, with weights that stay as they are: little Python stands
between the kernels, since at a few images it takes as long as they do.

B images, L tokens, d width, E inner channels.
"""

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..params import BranchParams
from .library import Head, Problem, kernels, pointer, threads_for
from .passes import Call, Packed, run_measured, scratch


class RouterWeights(NamedTuple):
    """What decides from the normed tokens which scans run."""

    weight: Tensor  # [2, d]
    bias: Tensor  # [2]


class Entered(NamedTuple):
    """A layer before its input projection. What is not returned by the layer is overwritten by the
    next one of this thread.
    """

    problem: Problem
    constant: tuple[Tensor, Tensor]  # that the problem points to
    running: Tensor  # [b], the images that any scan runs for, those with most to scan first
    in_order: bool  # whether these are all images, each whole and where it was
    origin: Sequence[int]  # [b + 1], where each begins in the rows, and behind the last one
    normed: Tensor  # [rows, d], their tokens that exist
    residual: Tensor  # [B, L, d]
    gates: Tensor | None  # [B, 2]

    def group(self, begin: int, end: int) -> Problem:
        """The problem of these of the running images; mask and factor are the same for all."""
        problem = Problem.from_buffer_copy(self.problem)
        problem.images = end - begin
        offset = begin * ctypes.sizeof(ctypes.c_int64)
        problem.length += offset
        problem.limit += offset
        problem.origin += offset
        for direction in problem.direction:
            direction.start += offset
        return problem


@lru_cache(maxsize=64)
def _constant(images: int, tokens: int, scale: float) -> tuple[Tensor, Tensor]:
    """The mask and the factors of images that are neither masked nor gated."""
    kind = {"dtype": torch.float32, "device": "cpu"}
    return torch.ones(images, tokens, **kind), torch.full((images, 2), scale, **kind)


class PreparedLayer:
    """Made of float32 weights on the CPU. Threads may share it.

    Args:
        forward, backward: the scans' weights.
        scale: multiplies their outputs.
        norm_weight: [d], of the RMSNorm before them; eps: its epsilon.
        router: None: all scans run.
    """

    def __init__(
        self,
        forward: BranchParams,
        backward: BranchParams,
        scale: float,
        norm_weight: Tensor,
        eps: float,
        router: RouterWeights | None,
    ):
        norm_weight = norm_weight.contiguous()
        if router is not None:
            router = RouterWeights(*(weight.contiguous() for weight in router))
        self._scale, self._norm_weight, self._router = scale, norm_weight, router
        forward, backward = (
            BranchParams(*(weight.contiguous() for weight in params))
            for params in (forward, backward)
        )
        self.channels, states = forward.A.shape
        nothing = norm_weight.new_empty(0, 0, 2 * self.channels)
        mask, factor = _constant(0, 0, scale)
        call = Call(nothing, mask, factor, False, False, False, None, None, (forward, backward))
        self._packed = Packed.of(call)
        self._problem = Problem(
            channels=self.channels,
            padded=self._packed.weights[0].shape[1],
            states=states,
            rank=forward.dt_proj_weight.shape[1],
        )
        self._packed.attach(self._problem)
        self._head = Head(
            width=len(norm_weight),
            norm_weight=pointer(norm_weight),
            router_weight=pointer(router.weight) if router else None,
            router_bias=pointer(router.bias) if router else None,
            eps=eps,
        )

    def enter(
        self,
        hidden: Tensor | None,
        residual: Tensor,
        slots: tuple[int, ...] | Tensor,
        threshold: float,
        lengths: Tensor | None = None,
    ) -> Entered:
        """Everything up to the input projection, of contiguous float32 tensors [B, L, d].

        slots: the tokens whose mean the router reads, [B, n] where the images differ; none: all
        that exist. threshold: a logit; scans above it run. lengths: [B] int64, so many tokens of
        each image exist, all by default.
        """
        images, tokens, _ = residual.shape
        # Copies: calls may come from several threads at once.
        problem, head = Problem.from_buffer_copy(self._problem), Head.from_buffer_copy(self._head)
        constant = _constant(images, tokens, self._scale)
        problem.images, problem.tokens = images, tokens
        problem.threads = torch.get_num_threads()
        problem.mask, problem.factor = map(pointer, constant)
        normed = scratch("normed", images * tokens, head.width)
        table = scratch("table", 6 * images + 4, dtype=torch.int64)
        running = scratch("running", images, dtype=torch.int64)
        origin = scratch("origin", images + 1, dtype=torch.int64)
        total, gates = residual, None
        head.threads = threads_for(residual)
        head.residual, head.normed = pointer(residual), pointer(normed)
        head.running, head.origin, head.table = map(pointer, (running, origin, table))
        if lengths is not None:
            lengths = lengths.contiguous()
            head.length = pointer(lengths)
        if hidden is not None:
            total = torch.empty_like(residual)
            head.hidden, head.total = pointer(hidden), pointer(total)
        if self._router is not None:
            gates = residual.new_empty(images, 2)
            head.gates, head.threshold = pointer(gates), threshold
            head.active = pointer(scratch("active", images, 2, dtype=torch.bool))
            if isinstance(slots, Tensor):
                chosen = slots.contiguous()  # a name: it is to live as long as the call
                head.slots = head.slot_stride = slots.shape[1]
                head.slot = pointer(chosen) if head.slots else None
            elif slots:
                chosen = (ctypes.c_int64 * len(slots))(*slots)
                head.slots, head.slot = len(slots), ctypes.addressof(chosen)
        in_order = bool(kernels().enter(ctypes.byref(problem), ctypes.byref(head)))
        count = problem.images
        if lengths is None:
            starts = range(0, (count + 1) * tokens, tokens)
        else:
            starts = origin[: count + 1].tolist()
        normed = normed[: starts[-1]]
        running = running[:count]
        return Entered(problem, constant, running, in_order, starts, normed, total, gates)

    def scan(self, problem: Problem, xz: Tensor) -> Tensor:
        """y [rows, E], overwritten by the next scan of this thread, of a group whose projection
        xz [rows, 2E] is.
        """
        y = scratch("y", len(xz), self.channels)
        problem.xz, problem.out = pointer(xz), pointer(y)
        run_measured(problem)
        return y


def spread(problem: Problem, images: Tensor, rows: Tensor, out: Tensor) -> None:
    """Move the rows [rows, d] of a group to out [B, L, d] at `images`, their numbers; 0 where
    tokens do not exist.
    """
    kernels().spread(
        ctypes.byref(problem),
        *(ctypes.c_void_p(pointer(tensor)) for tensor in (images, rows, out)),
        ctypes.c_int64(out.shape[2]),
        ctypes.c_int64(threads_for(rows)),
    )
