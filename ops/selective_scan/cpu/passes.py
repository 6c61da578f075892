"""Inference, forward and backward pass of the scan by the C++ kernels.

B images, L tokens, E inner channels, N states, R step rank, P = E rounded up to whole vectors.
"""

import ctypes
import math
import threading
from typing import NamedTuple

import torch
from torch import Tensor

from ops import onednn
from ops.linear import SPARE_ROWS

from ..params import BranchParams, Directions
from .library import Given, Problem, kernels, padded, pointer

CONV_WIDTH = 4
_scratch = threading.local()


class Call(NamedTuple):
    """What a pass reads; all floating-point tensors are float32 and all tensors contiguous."""

    xz: Tensor  # [B, L, 2E]
    mask: Tensor  # [B, L]
    factor: Tensor  # [B, 2], multiplies the directions' outputs
    masked: bool  # tokens behind the last one that the mask lets through are left out
    has_mask: bool  # else `mask` is made up, of ones
    in_place: bool  # the mask multiplies the step size and chooses the convolution's windows
    active: Tensor | None  # [B, 2] bool
    lengths: Tensor | None  # [B] int64
    directions: Directions

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """B, L, E, N, R."""
        params = next(p for p in self.directions if p is not None)
        images, tokens, width = self.xz.shape
        return images, tokens, width // 2, params.A.shape[1], params.dt_proj_weight.shape[1]


class Saved(NamedTuple):
    """Tensors of a forward pass; two of each that belongs to a direction, without elements for one
    that was not asked for. They have room for all tokens of all images; the rows and chunks that
    were worked on come first.
    """

    extent: Tensor  # [6 B + 4], see extent.h
    weights: tuple[Tensor, Tensor]  # [W + 3 + N + R, P], see problem.h
    u: tuple[Tensor, Tensor]  # [B L, P]
    projected: tuple[Tensor, Tensor]  # [B L, R + 2N]
    checkpoints: tuple[Tensor, Tensor]  # [B ceil(L / tile), P, N]

    def flatten(self) -> tuple[Tensor, ...]:
        return (self.extent, *self.weights, *self.u, *self.projected, *self.checkpoints)

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor, ...]) -> "Saved":
        extent, *rest = tensors
        return cls(extent, *(tuple(rest[i : i + 2]) for i in range(0, len(rest), 2)))

    @classmethod
    def empty(cls, call: Call, weights: tuple[Tensor, Tensor] | None = None) -> "Saved":
        images, tokens, channels, states, rank = call.sizes
        width, chunks = padded(channels), images * -(-tokens // kernels().tile_steps())
        return cls(
            call.xz.new_empty(6 * images + 4, dtype=torch.int64),
            _pair(call, CONV_WIDTH + 3 + states + rank, width) if weights is None else weights,
            _pair(call, images * tokens, width),
            _pair(call, images * tokens, rank + 2 * states),
            _pair(call, chunks, width, states),
        )


def _pair(call: Call, *size: int) -> tuple[Tensor, Tensor]:
    """A tensor for each direction, without elements for one that was not asked for."""
    return tuple(call.xz.new_empty((0,) if params is None else size) for params in call.directions)


def _problem(call: Call) -> Problem:
    """The structure with what all passes share filled in."""
    images, tokens, channels, states, rank = call.sizes
    return Problem(
        images=images,
        tokens=tokens,
        channels=channels,
        padded=padded(channels),
        states=states,
        rank=rank,
        threads=torch.get_num_threads(),
        in_place=call.in_place,
        xz=pointer(call.xz),
        mask=pointer(call.mask),
        factor=pointer(call.factor),
    )


def _given(call: Call) -> list[int]:
    """Indexes of the directions that were asked for."""
    return [which for which, params in enumerate(call.directions) if params is not None]


class Packed(NamedTuple):
    """The weights as the forward pass reads them."""

    weights: tuple[Tensor, Tensor]  # [W + 3 + N + R, P], see problem.h
    projections: tuple[Tensor, Tensor]  # [E, R + 2N rounded up to whole vectors]

    @classmethod
    def of(cls, call: Call) -> "Packed":
        _, _, channels, states, rank = call.sizes
        problem = _problem(call)
        packed = cls(
            _pair(call, CONV_WIDTH + 3 + states + rank, problem.padded),
            _pair(call, channels, padded(rank + 2 * states)),
        )
        packed.attach(problem)
        for which in _given(call):
            problem.direction[which].given = Given(*map(pointer, call.directions[which]))
        kernels().pack(ctypes.byref(problem))
        return packed

    def attach(self, problem: Problem) -> None:
        for which in (0, 1):
            problem.direction[which].weights = pointer(self.weights[which])
            problem.direction[which].projection = pointer(self.projections[which])


def _measure(problem: Problem, call: Call, extent: Tensor, masked: bool) -> None:
    """Which tokens are worked on, written to `extent`, and from there to the problem."""
    kernels().measure(
        ctypes.byref(problem),
        ctypes.c_void_p(pointer(call.lengths)),
        ctypes.c_void_p(pointer(call.active)),
        ctypes.c_int64(masked),
        ctypes.c_void_p(pointer(extent)),
    )


def scratch(name: str, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory of this thread, overwritten by the next call that asks for this name: fresh from the
    system it costs as much as the convolution that writes it. There is room behind rows for a
    product of them (`ops.linear`). A name has one type; equal calls get the same tensor, whose size
    and flags must stay as they are.
    """
    rooms = vars(_scratch)
    held, used, known = rooms.get(name, (None, None, None))
    if used == size:
        return known
    count = math.prod(size)
    room = count + (SPARE_ROWS * size[-1] if len(size) > 1 else 0)
    with torch.inference_mode(False):  # the next call may come without
        if held is None or held.numel() < room:
            held = torch.empty(room, dtype=dtype, device="cpu")
        known = held[:count].view(size)
    rooms[name] = held, size, known
    return known


def infer(call: Call, packed: Packed) -> Tensor:
    """y [B, L, E] without a backward pass. An image's result depends on neither its batch nor the
    threads. packed: the weights of `call`, whose `directions` give the sizes alone.
    """
    problem = _problem(call)
    images, tokens, channels, _, _ = call.sizes
    out = call.xz.new_empty(images, tokens, channels)
    extent = call.xz.new_empty(6 * images + 4, dtype=torch.int64)
    packed.attach(problem)
    _measure(problem, call, extent, call.masked)
    problem.out = pointer(out)
    run_measured(problem)
    return out


def run_measured(problem: Problem) -> None:
    """From the weights to the output of a problem whose extent is known."""
    # Whole images to each thread is faster, unless threads would stand idle.
    images, threads = problem.images, problem.threads
    if (images % threads == 0 or images >= 4 * threads) and not problem.in_place:
        kernels().forward_images(ctypes.byref(problem))
        return
    for which, direction in enumerate(problem.direction):
        if direction.start is not None and direction.u is None:
            rows, columns = problem.rows[which], problem.rank + 2 * problem.states
            direction.u = pointer(scratch(f"u{which}", rows, problem.padded))
            direction.projected = pointer(scratch(f"projected{which}", rows, columns))
    for run in (kernels().convolve, kernels().project_images, kernels().scan):
        run(ctypes.byref(problem))


def _run_forward(problem: Problem, call: Call, out: Tensor, masked: bool) -> Saved:
    """Everything from the weights to the output; masked: as in `_measure`."""
    packed = Packed.of(call)
    saved = Saved.empty(call, packed.weights)
    packed.attach(problem)
    _measure(problem, call, saved.extent, masked)
    for which in _given(call):
        direction = problem.direction[which]
        for name in ("u", "projected", "checkpoints"):
            setattr(direction, name, pointer(getattr(saved, name)[which]))
    problem.out = pointer(out)
    run_measured(problem)
    return saved


def forward(call: Call) -> tuple[Tensor, Saved]:
    """y [B, L, E] and what the backward pass needs."""
    problem = _problem(call)
    out = call.xz.new_empty(*call.xz.shape[:2], call.xz.shape[2] // 2)
    saved = _run_forward(problem, call, out, call.masked)
    for which in _given(call):
        # Nothing undefined behind what counts.
        rows, chunks = problem.rows[which], problem.chunks[which]
        for tensor, used in ((saved.u, rows), (saved.projected, rows), (saved.checkpoints, chunks)):
            tensor[which][used:].zero_()
    return out, saved


class Gradients(NamedTuple):
    """Two of each that belongs to a direction, without elements for one that was not asked for."""

    xz: Tensor  # [B, L, 2E]
    mask: Tensor  # [B, L], without elements where there is none
    factor: Tensor  # [B, 2]
    weights: tuple[Tensor, Tensor]  # [W + 3 + N + R, P], of the packed weights
    x_proj: tuple[Tensor, Tensor]  # [R + 2N, E]

    def flatten(self) -> tuple[Tensor, ...]:
        return (self.xz, self.mask, self.factor, *self.weights, *self.x_proj)

    @classmethod
    def empty(cls, call: Call) -> "Gradients":
        _, _, channels, states, rank = call.sizes
        return cls(
            torch.empty_like(call.xz),
            call.xz.new_empty(call.mask.shape if call.has_mask else 0),
            torch.empty_like(call.factor),
            _pair(call, CONV_WIDTH + 3 + states + rank, padded(channels)),
            _pair(call, rank + 2 * states, channels),
        )


class _Written(NamedTuple):
    """What the kernels write for one direction in the backward pass; see problem.h."""

    grad_u: Tensor
    grad_delta: Tensor
    grad_projected: Tensor
    grad_weights: Tensor

    @classmethod
    def empty(cls, problem: Problem, rows: int) -> "_Written":
        width, states, rank = problem.padded, problem.states, problem.rank

        def empty(*size: int) -> Tensor:
            return torch.empty(size, dtype=torch.float32, device="cpu")

        return cls(
            empty(rows, width),
            empty(rows, width),
            empty(problem.groups, rows, rank + 2 * states),
            empty(problem.images, CONV_WIDTH + 3 + states + rank, width),
        )


def _through_projections(grads: _Written, u: Tensor, params: BranchParams, usual: bool) -> Tensor:
    """Back through the projections of one direction: completes grads.grad_u, and returns the
    gradient of x_proj_weight.

    usual: the number of rows comes back from step to step. oneDNN compiles a product for each
    number, which takes longer than so thin a product.
    """
    channels, rank = params.dt_proj_weight.shape
    grad_projected = grads.grad_projected[0]
    if len(grads.grad_projected) > 1:
        grad_projected[:, rank:] += grads.grad_projected[1:, :, rank:].sum(0)
    grad_delta, grad_u = grads.grad_delta[:, :channels], grads.grad_u[:, :channels]
    if usual and onednn.takes(grad_delta, grad_projected):
        grad_projected[:, :rank] = onednn.product(grad_delta, params.dt_proj_weight.t())
        grad_u += onednn.product(grad_projected, params.x_proj_weight.t())
        return onednn.weight_gradient(grad_projected, u[: len(grad_u), :channels])
    # beta = 0: what is there is undefined, and not read.
    grad_projected[:, :rank].addmm_(grad_delta, params.dt_proj_weight, beta=0)
    grad_u.addmm_(grad_projected, params.x_proj_weight)
    return grad_projected.t() @ u[: len(grad_u), :channels]


def _saved_problem(call: Call, saved: Saved, grad_out: Tensor) -> Problem:
    """The problem as the forward pass left it."""
    problem = _problem(call)
    for which in _given(call):
        direction = problem.direction[which]
        for name in ("weights", "u", "projected", "checkpoints"):
            setattr(direction, name, pointer(getattr(saved, name)[which]))
    kernels().attach(ctypes.byref(problem), ctypes.c_void_p(pointer(saved.extent)))
    problem.grad_out = pointer(grad_out)
    return problem


def backward(grad_out: Tensor, call: Call, saved: Saved) -> Gradients:
    """grad_out [B, L, E] contiguous."""
    library, problem = kernels(), _saved_problem(call, saved, grad_out)
    if library.gradient_behind(ctypes.byref(problem)):
        # The shortcut of the forward pass is none here: masked tokens are read by what comes after.
        saved = _run_forward(problem, call, torch.empty_like(grad_out), masked=False)
    blocks = problem.padded // library.lanes()
    # enough tasks for all threads when there are few images
    problem.groups = max(1, min(blocks, -(-4 * problem.threads // max(problem.images, 1))))
    grad_xz = torch.empty_like(call.xz)
    grad_mask = call.xz.new_empty((blocks, *call.mask.shape) if call.has_mask else (1, 0))
    grad_factor = call.xz.new_zeros(blocks, *call.factor.shape)
    problem.grad_xz, problem.grad_factor = map(pointer, (grad_xz, grad_factor))
    problem.grad_mask = pointer(grad_mask if call.has_mask else None)
    written = {which: _Written.empty(problem, problem.rows[which]) for which in _given(call)}
    for which, tensors in written.items():
        for name, tensor in tensors._asdict().items():
            setattr(problem.direction[which], name, pointer(tensor))
    library.scan_backward(ctypes.byref(problem))
    every = problem.images * problem.tokens
    x_proj = [
        _through_projections(
            written[which], saved.u[which], call.directions[which], problem.rows[which] == every
        )
        if which in written
        else grad_xz.new_empty(0)
        for which in (0, 1)
    ]
    library.convolve_backward(ctypes.byref(problem))
    weights = [
        written[which].grad_weights.sum(0) if which in written else grad_xz.new_empty(0)
        for which in (0, 1)
    ]
    return Gradients(grad_xz, grad_mask.sum(0), grad_factor.sum(0), tuple(weights), tuple(x_proj))
