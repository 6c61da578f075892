"""The `triton` backend: fused kernels for CUDA GPUs, and for the CPU in Triton's interpreter (to
test them).

Per call: one convolution kernel writes u of both directions, two GEMMs by PyTorch give (step, B, C)
and the raw step size, one kernel scans, adds the directions and gates. The state is float32
whatever the dtype of xz; GEMMs run in the dtype of xz. Kept for the backward pass: xz, (step, B,
C), the sum before the gate and sparse states; u and the raw step size are computed again. Nothing
waits for the device, so a forward pass can be captured in a CUDA graph, after one call outside the
capture that tunes the kernels (kept between runs in Triton's cache). With a mask in place the
convolution is PyTorch's (triton_in_place.py), and the scan's kernels multiply the step sizes.

B images, L tokens, E inner channels, N states, R step rank, G directions (1 or 2), K channel
blocks.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from ops.operators import needs_gradient, register

from . import triton_in_place
from .params import COUNT, DIRECTIONS_SCHEMA, BranchParams, Directions, flatten, unflatten
from .triton_backward import SMALLEST_GROUP, conv_backward, gate_backward, scan_backward
from .triton_forward import CHUNK, conv_forward, scan_forward

_INTERPRETED = triton.knobs.runtime.interpret
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MAX_STATES = 64
_CONV_WIDTH = 4
# Channels per program of the backward scan: one a thread, since it fills the registers. In the
# interpreter a program costs the same whatever its width.
_BACKWARD_BLOCK = 64 if _INTERPRETED else 32


def _tuned(kernel, configs: list, key: list[str]):
    """The interpreter cannot measure: there the first configuration runs."""
    return triton.autotune(configs[:1] if _INTERPRETED else configs, key=key, cache_results=True)(
        kernel
    )


_scan_forward_kernel = _tuned(
    scan_forward,
    [
        triton.Config({"BLOCK": block, "PREFETCH": prefetch}, num_warps=warps, num_stages=1)
        for block, warps, prefetch in (
            (64, 1, False),
            (64, 2, True),
            (128, 4, False),
            (32, 1, True),
            (32, 1, False),
        )
    ],
    key=["E", "N", "SAVE", "BOTH", "batch_class"],
)
_scan_backward_kernel = _tuned(
    scan_backward,
    [triton.Config({"GROUP": group}, num_warps=1, num_stages=1) for group in (4, SMALLEST_GROUP)],
    key=["E", "N", "BOTH"],
)


class _Call(NamedTuple):
    """What a call is about besides the tensors that receive gradients."""

    directions: tuple[bool, ...]  # is it reversed, per direction
    active: Tensor | None  # [B, G]
    lengths: Tensor | None  # [B]
    scale: float
    in_place: bool

    def step_mask(self, mask: Tensor | None) -> Tensor | None:
        """What multiplies the step sizes."""
        return mask if self.in_place else None

    def branches(
        self, xz: Tensor, mask: Tensor, params: tuple[BranchParams, ...]
    ) -> list[triton_in_place.Branch]:
        """What convolves in place."""
        return triton_in_place.branches(
            xz, mask, params, self.directions, self.active, self.lengths
        )

    def routing(self) -> tuple:
        """Kernel arguments that give an image's number of tokens per direction."""
        strides = (0, 0) if self.active is None else self.active.stride()
        return self.lengths, self.active, *strides


def available() -> str | None:
    if torch.cuda.is_available() or _INTERPRETED:
        return None
    return "needs a CUDA GPU (or TRITON_INTERPRET=1, which is for tests only)"


def takes(xz: Tensor, params: BranchParams, in_place: bool = False) -> str | None:
    states, width = params.A.shape[1], params.conv_weight.shape[1]
    if xz.device.type != "cuda" and not (_INTERPRETED and xz.device.type == "cpu"):
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
    tensors = (xz, mask, gates, active, lengths, *flatten(directions))
    return _operator(*tensors, scale, in_place, needs_gradient(tensors))[0]


def _device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensor's."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


def _stack(params: tuple[BranchParams, ...], field: str, dtype: torch.dtype) -> Tensor:
    return torch.stack([getattr(branch, field) for branch in params]).to(dtype)


def _scan_weights(params: tuple[BranchParams, ...]) -> list[Tensor]:
    """A [N, E], so that neighbouring threads read neighbouring channels, D and the step bias; twice
    the same for one direction.
    """
    return [
        tensor
        for branch in (params[0], params[-1])
        for tensor in (
            branch.A.t().contiguous(),
            branch.D.contiguous(),
            branch.dt_proj_bias.contiguous(),
        )
    ]


def _conv_weights(params: tuple[BranchParams, ...]) -> list[Tensor]:
    return [
        tensor.contiguous()
        for branch in (params[0], params[-1])
        for tensor in (branch.conv_weight, branch.conv_bias)
    ]


def _convolve(
    call: _Call, xz: Tensor, mask: Tensor | None, params: tuple[BranchParams, ...]
) -> Tensor:
    """u [G, B, L, E]."""
    if call.in_place:
        return triton_in_place.forward(call.branches(xz, mask, params), xz.dtype)
    B, L, E = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    u = xz.new_empty(len(params), B, L, E)
    rows, block = 8, 128
    conv_forward[(B, triton.cdiv(L, rows), triton.cdiv(E, block))](
        xz,
        xz.stride(0),
        xz.stride(1),
        mask,
        *call.routing(),
        *_conv_weights(params),
        u,
        B,
        L,
        E,
        BOTH=len(params) == 2,
        REVERSE=call.directions[0],
        ROWS=rows,
        BLOCK=block,
        num_warps=1,
    )
    return u


def _forward(
    call: _Call,
    xz: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    params: tuple[BranchParams, ...],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, L, E]; for the backward pass, and without elements unless `save`: (step, B, C) [G, B,
    L, R + 2N], the sum before the gate [B, L, E] and the states [G, B, chunks - 1, N, E].
    """
    B, L, E = xz.shape[0], xz.shape[1], xz.shape[2] // 2
    R, N = params[0].dt_proj_weight.shape[1], params[0].A.shape[1]
    u = _convolve(call, xz, mask, params)
    projected = torch.bmm(u.flatten(1, 2), _stack(params, "x_proj_weight", xz.dtype).mT)
    dt = torch.bmm(projected[..., :R], _stack(params, "dt_proj_weight", xz.dtype).mT)
    out = xz.new_empty(B, L, E)
    # Kernels leave out what does not exist; nothing that is kept may be undefined there.
    whole = call.lengths is None and call.active is None
    kept = xz.new_empty if whole else xz.new_zeros
    part = kept(B, L, E) if save else out
    saved = max(triton.cdiv(L, CHUNK) - 1, 0)
    states = kept((len(params), B, saved, N, E) if save else (0,), dtype=torch.float32)
    _scan_forward_kernel[lambda config: (B * triton.cdiv(E, config["BLOCK"]),)](
        u,
        dt,
        projected[..., R:],
        R + 2 * N,
        xz[..., E:],
        xz.stride(0),
        xz.stride(1),
        call.step_mask(mask),
        *call.routing(),
        gates,
        *_scan_weights(params),
        part,
        out,
        states,
        B,
        L,
        E,
        saved,
        call.scale,
        B.bit_length(),
        N=N,
        BOTH=len(params) == 2,
        REVERSE=call.directions[0],
        SAVE=save,
        CHUNK=CHUNK,
    )
    if not save:
        return out, xz.new_empty(0), xz.new_empty(0), states
    return out, projected.view(len(params), B, L, R + 2 * N), part, states


def _backward(
    call: _Call,
    xz: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    params: tuple[BranchParams, ...],
    projected: Tensor,
    part: Tensor,
    states: Tensor,
    grad_out: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of xz, mask [B, L] and gates [G, B] (without elements where there are none); of the
    convolutions [G, 5, E] (taps, bias), x_proj_weight [G, R + 2N, E], dt_proj_weight [G, E, R], A
    [G, N, E], and of D and the step bias [G, 2, E].
    """
    G, B, L, E = len(params), xz.shape[0], xz.shape[1], xz.shape[2] // 2
    R = params[0].dt_proj_weight.shape[1]
    x_weight, dt_weight = (
        _stack(params, name, xz.dtype) for name in ("x_proj_weight", "dt_proj_weight")
    )
    step = projected.flatten(1, 2)[..., :R]
    u = _convolve(call, xz, mask, params)
    dt = torch.bmm(step, dt_weight.mT)

    grad_xz = torch.empty_like(xz, memory_format=torch.contiguous_format)
    grad_z = grad_xz[..., E:]
    grad_y = torch.empty_like(grad_out)
    rows, block = 8, 128
    gate_backward[(B, triton.cdiv(L, rows), triton.cdiv(E, block))](
        grad_out,
        xz[..., E:],
        xz.stride(0),
        xz.stride(1),
        part,
        *call.routing(),
        grad_y,
        grad_z,
        grad_z.stride(0),
        grad_z.stride(1),
        L,
        E,
        call.scale,
        BOTH=G == 2,
        ROWS=rows,
        BLOCK=block,
        num_warps=4,
    )

    grad_u, grad_dt, grad_bc, grad_A, grad_channel, grad_gate, by_step = _scan_backward(
        call, grad_y, u, dt, projected, mask, gates, params, states
    )
    grad_dt = grad_dt.flatten(1, 2)
    grad_projected = torch.cat([torch.bmm(grad_dt, dt_weight), grad_bc.flatten(1, 2)], dim=-1)
    grad_x_weight = torch.bmm(grad_projected.mT, u.flatten(1, 2))
    grad_dt_weight = torch.bmm(grad_dt.mT, step)
    grad_u.flatten(1, 2).baddbmm_(grad_projected, x_weight)

    if call.in_place:
        branches = call.branches(xz, mask, params)
        grad_x, grad_weights, grad_mask = triton_in_place.backward(branches, grad_u)
        grad_xz[..., :E] = grad_x
        grad_mask = grad_mask + by_step
    else:
        grad_weights, grad_mask = _convolve_backward(call, xz, mask, params, grad_u, grad_xz)
    nothing = grad_weights.new_empty
    return (
        grad_xz,
        nothing(0) if mask is None else grad_mask,
        nothing(0) if gates is None else grad_gate.sum(-1),
        grad_weights,
        grad_x_weight,
        grad_dt_weight,
        grad_A,
        grad_channel,
    )


def _as_gradient(grad: Tensor, tensor: Tensor | None) -> Tensor | None:
    """A mask of booleans or integers has no gradient."""
    given = tensor is not None and tensor.is_floating_point()
    return grad.to(tensor.dtype) if given else None


def _scan_backward(
    call: _Call,
    grad_y: Tensor,
    u: Tensor,
    dt: Tensor,
    projected: Tensor,
    mask: Tensor | None,
    gates: Tensor | None,
    params: tuple[BranchParams, ...],
    states: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of u, dt [G, B, L, E] and (B, C) [G, B, L, 2N] in their dtype; in float32 of A [G,
    N, E], of D and the step bias [G, 2, E], of the gates [G, B, K], still to be added up, and of a
    mask in place [B, L] through the steps (else None).
    """
    G, B, L, E = u.shape
    R, N = params[0].dt_proj_weight.shape[1], params[0].A.shape[1]
    blocks = triton.cdiv(E, _BACKWARD_BLOCK)
    full = u.new_empty((0,), dtype=torch.float32).new_empty
    scratch = full(G, B, CHUNK // SMALLEST_GROUP, N, E)
    grad_u, grad_dt = torch.empty_like(u), torch.empty_like(u)
    grad_bc = u.new_empty(blocks, G, B, L, 2 * N)
    grad_A, grad_channel, grad_gate = full(G, B, N, E), full(G, B, 2, E), full(G, B, blocks)
    grad_mask = full(blocks, G, B, L) if call.in_place else None
    _scan_backward_kernel[(B * blocks, G)](
        grad_y,
        u,
        dt,
        projected[..., R:],
        R + 2 * N,
        call.step_mask(mask),
        *call.routing(),
        gates,
        *_scan_weights(params),
        states,
        scratch,
        grad_u,
        grad_dt,
        grad_bc,
        grad_A,
        grad_channel,
        grad_gate,
        grad_mask,
        B,
        L,
        E,
        states.shape[2],
        N=N,
        BOTH=G == 2,
        REVERSE=call.directions[0],
        CHUNK=CHUNK,
        BLOCK=_BACKWARD_BLOCK,
    )
    grad_bc = grad_bc.sum(0, dtype=torch.float32).to(u.dtype)
    by_step = grad_mask.sum((0, 1)) if call.in_place else None
    return grad_u, grad_dt, grad_bc, grad_A.sum(1), grad_channel.sum(1), grad_gate, by_step


def _convolve_backward(
    call: _Call,
    xz: Tensor,
    mask: Tensor | None,
    params: tuple[BranchParams, ...],
    grad_u: Tensor,
    grad_xz: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Writes the gradient of x into grad_xz; gives those of the weights [G, 5, E] (taps, bias) and
    the mask [B, L].
    """
    G, B, L, E = grad_u.shape
    block = 64
    blocks = triton.cdiv(E, block)
    grad_weights = grad_u.new_empty(G, B, 5, E, dtype=torch.float32)
    grad_mask = None if mask is None else grad_u.new_empty(blocks, B, L, dtype=torch.float32)
    conv_backward[(B * blocks,)](
        xz,
        xz.stride(0),
        xz.stride(1),
        mask,
        *call.routing(),
        *_conv_weights(params),
        grad_u,
        grad_xz,
        grad_xz.stride(0),
        grad_xz.stride(1),
        grad_weights,
        grad_mask,
        B,
        L,
        E,
        FORWARD=False in call.directions,
        REVERSE=True in call.directions,
        BLOCK=block,
        num_warps=1,
    )
    return grad_weights.sum(1), None if mask is None else grad_mask.sum(0)


_ARGUMENTS = (
    "Tensor xz, Tensor? mask, Tensor? gates, Tensor? active, Tensor? lengths, "
    f"{DIRECTIONS_SCHEMA}, float scale, bool in_place"
)
_LEAVES = 5 + 2 * COUNT  # tensors among the arguments


class _Arguments(NamedTuple):
    """An operator's arguments as the passes take them."""

    call: _Call
    xz: Tensor
    mask: Tensor | None
    gates: Tensor | None
    params: tuple[BranchParams, ...]


def _arguments(xz, mask, gates, active, lengths, *rest) -> _Arguments:
    *tensors, scale, in_place = rest
    directions = unflatten(tuple(tensors))
    reverse = tuple(d == 1 for d, params in enumerate(directions) if params is not None)
    return _Arguments(
        _Call(reverse, active, None if lengths is None else lengths.contiguous(), scale, in_place),
        xz if xz.stride(2) == 1 else xz.contiguous(),
        None if mask is None else mask.contiguous(),
        None if gates is None else gates.contiguous(),
        tuple(params for params in directions if params is not None),
    )


def _scan(*given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, save = given
    with torch.autocast(given[0].device.type, enabled=False), _device(given[0]):
        return _forward(*_arguments(*given), save)


def _fake_scan(*given) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *given, save = given
    _, xz, _, _, params = _arguments(*given)
    (B, L, width), (E, N), G = xz.shape, params[0].A.shape, len(params)
    K, saved = params[0].x_proj_weight.shape[0], -(-L // CHUNK) - 1
    sizes = ((G, B, L, K), (B, L, E), (G, B, saved, N, E)) if save else ((0,), (0,), (0,))
    projected, part, states = sizes
    return (
        xz.new_empty(B, L, width // 2),
        xz.new_empty(projected),
        xz.new_empty(part),
        xz.new_empty(states, dtype=torch.float32),
    )


def _gradients(grad_out: Tensor, projected, part, states, *given) -> tuple[Tensor, ...]:
    with torch.autocast(grad_out.device.type, enabled=False), _device(grad_out):
        return _backward(*_arguments(*given), projected, part, states, grad_out.contiguous())


def _fake_gradients(grad_out: Tensor, projected, part, states, *given) -> tuple[Tensor, ...]:
    _, xz, mask, gates, params = _arguments(*given)
    (E, N), (B, L, _), G = params[0].A.shape, xz.shape, len(params)
    K, R = params[0].x_proj_weight.shape[0], params[0].dt_proj_weight.shape[1]
    full = states.new_empty
    return (
        xz.new_empty(xz.shape),
        full(0 if mask is None else (B, L)),
        full(0 if gates is None else (G, B)),
        full(G, 5, E),
        xz.new_empty(G, K, E),
        xz.new_empty(G, E, R),
        full(G, N, E),
        full(G, 2, E),
    )


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.in_place, _ = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *saved)


def _differentiate(ctx, grad_out: Tensor, *_) -> tuple[Tensor | None, ...]:
    kept = ctx.saved_tensors
    tensors, saved = kept[:_LEAVES], kept[_LEAVES:]
    grad_xz, grad_mask, grad_gates, *packed = _backward_operator(
        grad_out, *saved, *tensors, ctx.scale, ctx.in_place
    )
    _, mask, gates, _, _, *weights = tensors
    grads, which = [], 0
    for params in unflatten(tuple(weights)):
        if params is None:
            grads += [None] * COUNT
            continue
        conv, x_weight, dt_weight, A, channel = (tensor[which] for tensor in packed)
        which += 1
        values = (conv[:4].t(), conv[4], x_weight, dt_weight, channel[1], A.t(), channel[0])
        grads += [value.to(tensor.dtype) for value, tensor in zip(values, params, strict=True)]
    grad_gates = None if gates is None else grad_gates.t().to(gates.dtype)
    grad_mask = _as_gradient(grad_mask, mask)
    return grad_xz, grad_mask, grad_gates, None, None, *grads, *(None for _ in range(3))


_backward_operator = register(
    "triton_scan_backward(Tensor grad_out, Tensor projected, Tensor part, Tensor states, "
    f"{_ARGUMENTS}) -> ({', '.join(['Tensor'] * 8)})",
    _gradients,
    _fake_gradients,
)
_operator = register(
    f"triton_scan({_ARGUMENTS}, bool save) -> (Tensor, Tensor, Tensor, Tensor)",
    _scan,
    _fake_scan,
    setup_context=_setup_context,
    backward=_differentiate,
)
