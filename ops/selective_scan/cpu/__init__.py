"""Selective scan on the CPU: C++ kernels (kernel.cpp), in training around PyTorch's matrix
products.

One pass over x does the convolution and SiLU of both directions, one matrix product a direction
projects to (step, B, C), one pass does step, scan, skip, gate and the sum of the directions. In
inference a thread takes a whole image through all of it. The backward pass recomputes the states
from checkpoints every 16 steps, and the outputs of the two directions along with them.

Work is only done for tokens that exist. A direction that is not `active`, tokens behind `lengths`,
and tokens behind the last one that `mask` lets through are left out of the packed rows that all
passes and matrix products work on: without input from behind, neither direction's state differs
from zero when it reaches, or after it has left, the last visible token.

B images, L tokens, E inner channels, N states, R step rank, P = E rounded up to whole vectors.
"""

import ctypes
import logging
import threading
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ops.linear import linear

from ..reference import BranchParams
from .build import BuildError, load_library

_CONV_WIDTH = 4
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

_logger = logging.getLogger(__name__)
_library: ctypes.CDLL | None = None
_scratch = threading.local()


class _Given(ctypes.Structure):
    """Given of problem.h."""

    _fields_ = [(name, ctypes.c_void_p) for name in BranchParams._fields]


class _Direction(ctypes.Structure):
    """Direction of problem.h."""

    _fields_ = [("given", _Given)]
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
            "grad_BC",
            "grad_weights",
        )
    ]


class _Problem(ctypes.Structure):
    """Problem of problem.h."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in ("images", "tokens", "channels", "padded", "states", "rank")
    ]
    _fields_ += [
        ("rows", ctypes.c_int64 * 2),
        ("groups", ctypes.c_int64),
        ("threads", ctypes.c_int64),
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
            "grad_out",
            "grad_xz",
            "grad_mask",
            "grad_factor",
        )
    ]
    _fields_ += [("direction", _Direction * 2)]


def available() -> str | None:
    """None once the kernels are built and loaded, or the reason why they are not."""
    global _library
    try:
        _library = load_library()
    except BuildError as error:
        _logger.warning("the CPU kernels are not available: %s", error)
        return str(error)
    if _library.problem_bytes() != ctypes.sizeof(_Problem):
        raise AssertionError("problem.h and its ctypes mirror disagree")
    return None


def takes(xz: Tensor, params: BranchParams) -> str | None:
    """None, or the reason why these arguments are not taken."""
    if xz.device.type != "cpu":
        return f"runs on the CPU, not on {xz.device}"
    if xz.dtype not in _DTYPES:
        return f"takes float32, bfloat16 or float16, not {xz.dtype}"
    if params.conv_weight.shape[1] != _CONV_WIDTH:
        return f"takes a convolution of width {_CONV_WIDTH}, not {params.conv_weight.shape[1]}"
    return None


class _Extent(NamedTuple):
    """Which tokens are worked on, and where their packed rows stand."""

    limit: Tensor  # [B] tokens that exist
    length: Tensor  # [B] of these, tokens up to the last one that the mask lets through
    start: Tensor  # [2, B] first row of each image, -1 where the direction is off
    chunk: Tensor  # [2, B] first checkpoint of each image
    rows: Tensor  # [2]
    chunks: Tensor  # [2]


def _extent(on: Tensor, limit: Tensor, length: Tensor) -> _Extent:
    """on [2, B] bool; limit, length [B] int64."""
    on = on.contiguous()  # and with it all that follows: the kernels read data pointers
    spans = length * on
    chunks = (spans + (_library.tile_steps() - 1)).div(_library.tile_steps(), rounding_mode="floor")
    start = torch.where(on, spans.cumsum(1) - spans, -1)
    return _Extent(limit, length, start, chunks.cumsum(1) - chunks, spans.sum(1), chunks.sum(1))


def _visible(mask: Tensor | None, limit: Tensor) -> Tensor:
    """[B] tokens up to the last one, within `limit`, whose mask is not zero."""
    if mask is None or mask.shape[1] == 0:
        return limit
    position = torch.arange(1, mask.shape[1] + 1, device="cpu")
    return ((mask != 0) & (position <= limit.unsqueeze(1))).mul(position).amax(1)


def _pack(
    directions: tuple[BranchParams | None, ...], infer: bool
) -> tuple[tuple[Tensor | None, ...], ...]:
    """(weights, projections) of both directions as the kernels read them, see problem.h;
    projections to `infer` alone.

    The parameters are float32 and contiguous.
    """
    given = next(p for p in directions if p is not None)
    channels, (states, rank), lanes = given.D.shape[0], _sizes(directions), _library.lanes()
    padded, columns = -(-channels // lanes) * lanes, -(-(rank + 2 * states) // lanes) * lanes
    problem = _Problem(
        channels=channels, padded=padded, states=states, rank=rank, threads=torch.get_num_threads()
    )
    weights, projections = [None, None], [None, None]
    for which, params in enumerate(directions):
        if params is None:
            continue
        direction = problem.direction[which]
        direction.given = _Given(*map(_pointer, params))
        weights[which] = given.D.new_empty(_CONV_WIDTH + 3 + states + rank, padded)
        direction.weights = _pointer(weights[which])
        if infer:
            projections[which] = given.D.new_empty(channels, columns)
            direction.projection = _pointer(projections[which])
    _library.pack(ctypes.byref(problem))
    return tuple(weights), tuple(projections)


def _scratch_rows(which: int, rows: int, padded: int) -> Tensor:
    """[rows, P] of this thread, overwritten by the next call: memory fresh from the system costs as
    much as the convolution that writes it.
    """
    name, size = f"u{which}", rows * padded
    held = getattr(_scratch, name, None)
    if held is None or held.numel() < size:
        held = torch.empty(size, dtype=torch.float32, device="cpu")
        setattr(_scratch, name, held)
    return held[:size].view(rows, padded)


class _Saved(NamedTuple):
    """Tensors of a forward pass, two of each that belongs to a direction (None for one that was not
    asked for).
    """

    extent: _Extent
    weights: tuple[Tensor | None, ...]
    u: tuple[Tensor | None, ...]  # [rows, P]
    projected: tuple[Tensor | None, ...]  # [rows, R + 2N]
    checkpoints: tuple[Tensor | None, ...]  # [chunks, P, N] floats

    def flatten(self) -> tuple[Tensor | None, ...]:
        return (*self.extent, *self.weights, *self.u, *self.projected, *self.checkpoints)

    @classmethod
    def unflatten(cls, tensors: tuple[Tensor | None, ...]) -> "_Saved":
        count = len(_Extent._fields)
        pairs = [tensors[i : i + 2] for i in range(count, len(tensors), 2)]
        return cls(_Extent(*tensors[:count]), *pairs)


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _problem(
    xz: Tensor, mask: Tensor, factor: Tensor, states: int, rank: int, saved: _Saved
) -> _Problem:
    """The structure with everything that both passes share filled in. Its tensors must outlive it."""
    images, tokens, width = xz.shape
    lanes, extent = _library.lanes(), saved.extent
    problem = _Problem(
        images=images,
        tokens=tokens,
        channels=width // 2,
        padded=-(-width // 2 // lanes) * lanes,
        states=states,
        rank=rank,
        threads=torch.get_num_threads(),
        xz=_pointer(xz),
        mask=_pointer(mask),
        factor=_pointer(factor),
        length=_pointer(extent.length),
        limit=_pointer(extent.limit),
    )
    problem.rows[:] = extent.rows.tolist()
    for which, direction in enumerate(problem.direction):
        if saved.weights[which] is not None:
            direction.start = _pointer(extent.start[which])
            direction.chunk = _pointer(extent.chunk[which])
            for name in ("weights", "u", "projected", "checkpoints"):
                setattr(direction, name, _pointer(getattr(saved, name)[which]))
    return problem


def _sizes(directions: tuple[BranchParams | None, ...]) -> tuple[int, int]:
    params = next(p for p in directions if p is not None)
    return params.A.shape[1], params.dt_proj_weight.shape[1]


def _forward(
    xz: Tensor,
    mask: Tensor,
    factor: Tensor,
    extent: _Extent,
    directions: tuple[BranchParams | None, ...],
    weights: tuple[Tensor | None, ...],
    out: Tensor,
) -> _Saved:
    """Everything float32 and contiguous: xz [B, L, 2E], mask [B, L], factor [B, 2] -> out [B, L,
    E].
    """
    channels, (states, rank) = xz.shape[2] // 2, _sizes(directions)
    rows, chunks = extent.rows.tolist(), extent.chunks.tolist()
    u, checkpoints = [None, None], [None, None]
    for which, weight in enumerate(weights):
        if weight is not None:
            u[which] = xz.new_empty(rows[which], weight.shape[1])
            checkpoints[which] = xz.new_empty(chunks[which], weight.shape[1], states)
    saved = _Saved(extent, weights, tuple(u), (None, None), tuple(checkpoints))
    problem = _problem(xz, mask, factor, states, rank, saved)
    _library.convolve(ctypes.byref(problem))
    projected = tuple(
        None if params is None else linear(u[which][:, :channels], params.x_proj_weight)
        for which, params in enumerate(directions)
    )
    for direction, tensor in zip(problem.direction, projected, strict=True):
        direction.projected = _pointer(tensor)
    problem.out = _pointer(out)
    _library.scan(ctypes.byref(problem))
    return saved._replace(projected=projected)


def _infer(
    xz: Tensor,
    mask: Tensor,
    factor: Tensor,
    extent: _Extent,
    directions: tuple[BranchParams | None, ...],
) -> Tensor:
    """y [B, L, E] without a backward pass. An image's result depends on neither its batch nor the
    threads.
    """
    images, tokens, threads = *xz.shape[:2], torch.get_num_threads()
    (states, rank), out = _sizes(directions), xz.new_empty(images, tokens, xz.shape[2] // 2)
    weights, projections = _pack(directions, infer=True)
    # Whole images to each thread is faster, unless threads would stand idle.
    by_image, nothing = images % threads == 0 or images >= 4 * threads, (None, None)
    u = projected = nothing
    if not by_image:
        rows = extent.rows.tolist()
        u = tuple(
            None if weight is None else _scratch_rows(which, rows[which], weight.shape[1])
            for which, weight in enumerate(weights)
        )
        projected = tuple(
            None if weight is None else xz.new_empty(rows[which], rank + 2 * states)
            for which, weight in enumerate(weights)
        )
    problem = _problem(
        xz, mask, factor, states, rank, _Saved(extent, weights, u, projected, nothing)
    )
    problem.out = _pointer(out)
    for direction, weight in zip(problem.direction, projections, strict=True):
        direction.projection = _pointer(weight)
    passes = (
        (_library.infer,)
        if by_image
        else (_library.convolve, _library.project_images, _library.scan)
    )
    for run in passes:
        run(ctypes.byref(problem))
    return out


class _Gradients(NamedTuple):
    """What the kernels write for one direction in the backward pass; see problem.h."""

    grad_u: Tensor
    grad_delta: Tensor
    grad_BC: Tensor
    grad_weights: Tensor

    @classmethod
    def empty(cls, images: int, rows: int, padded: int, states: int, groups: int) -> "_Gradients":
        sizes = (rows, padded), (rows, padded), (groups, rows, 2 * states)
        kind = {"dtype": torch.float32, "device": "cpu"}
        return cls(
            *(torch.empty(size, **kind) for size in sizes),
            torch.zeros(images, _CONV_WIDTH + 2 + states, padded, **kind),
        )


def _projection_gradients(
    grads: _Gradients, u: Tensor, projected: Tensor, params: BranchParams
) -> tuple[Tensor, Tensor, Tensor]:
    """Back through the projections of one direction: completes grads.grad_u.

    Returns the gradients of x_proj_weight, dt_proj_weight and dt_proj_bias.
    """
    channels, rank = params.dt_proj_weight.shape
    grad_delta, u = grads.grad_delta[:, :channels], u[:, :channels]
    grad_projected = torch.cat((grad_delta @ params.dt_proj_weight, grads.grad_BC.sum(0)), dim=1)
    grads.grad_u[:, :channels].addmm_(grad_projected, params.x_proj_weight)
    return grad_projected.t() @ u, grad_delta.t() @ projected[:, :rank], grad_delta.sum(0)


def _backward(
    grad_out: Tensor,
    xz: Tensor,
    mask: Tensor,
    factor: Tensor,
    saved: _Saved,
    directions: tuple[BranchParams | None, ...],
) -> tuple[Tensor, Tensor, Tensor, list[Tensor | None]]:
    """Gradients of xz, mask, factor, and of the directions' weights in the order of BranchParams."""
    (images, tokens, channels), (states, rank) = grad_out.shape, _sizes(directions)
    problem = _problem(xz, mask, factor, states, rank, saved)
    problem.grad_out = _pointer(grad_out)
    if _library.gradient_behind(ctypes.byref(problem)):
        # The shortcut of the forward pass is none here: masked tokens are read by what comes after.
        extent = _extent(saved.extent.start >= 0, saved.extent.limit, saved.extent.limit)
        saved = _forward(
            xz, mask, factor, extent, directions, saved.weights, torch.empty_like(grad_out)
        )
        problem = _problem(xz, mask, factor, states, rank, saved)
        problem.grad_out = _pointer(grad_out)
    blocks = problem.padded // _library.lanes()
    # enough tasks for all threads when there are few images
    problem.groups = max(1, min(blocks, -(-4 * problem.threads // max(images, 1))))
    grad_xz = torch.empty_like(xz)
    grad_mask, grad_factor = xz.new_empty(blocks, images, tokens), xz.new_zeros(blocks, images, 2)
    problem.grad_xz, problem.grad_mask, problem.grad_factor = map(
        _pointer, (grad_xz, grad_mask, grad_factor)
    )
    grads = [
        None
        if params is None
        else _Gradients.empty(images, problem.rows[which], problem.padded, states, problem.groups)
        for which, params in enumerate(directions)
    ]
    for direction, tensors in zip(problem.direction, grads, strict=True):
        for name in _Gradients._fields if tensors is not None else ():
            setattr(direction, name, _pointer(getattr(tensors, name)))
    _library.scan_backward(ctypes.byref(problem))
    projections = [
        None if params is None else _projection_gradients(tensors, u, projected, params)
        for params, tensors, u, projected in zip(
            directions, grads, saved.u, saved.projected, strict=True
        )
    ]
    _library.convolve_backward(ctypes.byref(problem))
    weights = []
    for tensors, projection in zip(grads, projections, strict=True):
        if tensors is None:
            weights += [None] * len(BranchParams._fields)
            continue
        packed = tensors.grad_weights.sum(0)[:, :channels]
        weights += BranchParams(
            packed[:_CONV_WIDTH].t(),
            packed[_CONV_WIDTH],
            *projection,
            packed[_CONV_WIDTH + 2 :].t(),
            packed[_CONV_WIDTH + 1],
        )
    return grad_xz, grad_mask.sum(0), grad_factor.sum(0), weights


class _BidirectionalSSM(torch.autograd.Function):
    """Inputs float32 and contiguous; extent is not differentiated."""

    @staticmethod
    def forward(ctx, xz, mask, factor, extent, *params):
        with torch.autocast("cpu", enabled=False):
            directions, out = _split(params), xz.new_empty(*xz.shape[:2], xz.shape[2] // 2)
            saved = _forward(
                xz, mask, factor, extent, directions, _pack(directions, infer=False)[0], out
            )
        ctx.save_for_backward(xz, mask, factor, *params, *saved.flatten())
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):
        xz, mask, factor, *rest = ctx.saved_tensors
        count = 2 * len(BranchParams._fields)
        with torch.autocast("cpu", enabled=False):
            grad_xz, grad_mask, grad_factor, weights = _backward(
                grad_out.contiguous(),
                xz,
                mask,
                factor,
                _Saved.unflatten(rest[count:]),
                _split(rest[:count]),
            )
        return grad_xz, grad_mask, grad_factor, None, *weights


def _split(params: tuple[Tensor | None, ...]) -> tuple[BranchParams | None, ...]:
    """The flat weights of both directions, None for each of a missing one, as two BranchParams or
    None.
    """
    count = len(BranchParams._fields)
    return tuple(
        BranchParams(*half) if half[0] is not None else None
        for half in (params[:count], params[count:])
    )


def _run(
    xz: Tensor,
    directions: tuple[BranchParams | None, ...],
    mask: Tensor | None,
    gates: Tensor | None,
    on: Tensor,
    lengths: Tensor | None,
    scale: float,
) -> Tensor:
    """The general form of both public functions; on [2, B] bool."""
    dtype, (images, tokens, _) = xz.dtype, xz.shape
    limit = (
        on.new_full((images,), tokens, dtype=torch.int64)
        if lengths is None
        else lengths.long().clamp(0, tokens)
    )
    extent = _extent(on, limit, _visible(mask, limit))
    # casts in sight of autograd, which casts the gradients back
    tensors = [
        xz,
        on.new_ones((images, tokens), dtype=torch.float32) if mask is None else mask,
        on.new_full((images, 2), scale, dtype=torch.float32)
        if gates is None
        else gates.float() * scale,
    ]
    for params in directions:
        tensors += [None] * len(BranchParams._fields) if params is None else params
    tensors = [None if t is None else t.float().contiguous() for t in tensors]
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = _BidirectionalSSM.apply(*tensors[:3], extent, *tensors[3:])
    else:
        with torch.autocast("cpu", enabled=False):
            out = _infer(*tensors[:3], extent, _split(tensors[3:]))
    return out.to(dtype)


def ssm_branch(
    xz: Tensor,
    params: BranchParams,
    *,
    reverse: bool = False,
    mask: Tensor | None = None,
    active: Tensor | None = None,
    lengths: Tensor | None = None,
) -> Tensor:
    """One scan direction; arguments and result as in `ops.selective_scan.ssm_branch`."""
    on = xz.new_zeros(2, xz.shape[0], dtype=torch.bool)
    on[int(reverse)] = True if active is None else active.bool()
    return _run(xz, (None, params) if reverse else (params, None), mask, None, on, lengths, 1.0)


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
) -> Tensor:
    """Both directions, gated and summed; arguments and result as in
    `ops.selective_scan.bidirectional_ssm`.
    """
    on = xz.new_ones(2, xz.shape[0], dtype=torch.bool) if active is None else active.t().bool()
    return _run(xz, (forward, backward), mask, gates, on, lengths, scale)
