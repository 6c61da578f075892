"""What our models and kernels are compared with: other implementations of one mixer's selective
scan, for `benchmarks/ops.py`, and DeiT with this project's products.

Each entry of the former is a function (xz [B, L, 2E], forward, backward) -> y [B, L, E] that
computes what `bidirectional_ssm` does with scale 0.5. B images, L tokens, E inner channels, N
states, R step rank.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops import onednn
from ops.linear import Linear
from ops.selective_scan import BranchParams, branch_inputs
from ops.selective_scan.reference import ssm_branch as reference_branch

Core = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Rival = Callable[[Tensor, BranchParams, BranchParams], Tensor]
CHUNK = 8
PACKAGES = ("transformers", "mambapy")


def sequential_loop(xz: Tensor, forward: BranchParams, backward: BranchParams) -> Tensor:
    """The definition."""
    return (reference_branch(xz, forward) + reference_branch(xz, backward, reverse=True)) * 0.5


def with_core(core: Core) -> Rival:
    """Both directions around a `core` without skip.

    core: (u, delta [B, L, E], A [E, N], B, C [B, L, N]) -> y [B, L, E].
    """

    def rival(xz: Tensor, forward: BranchParams, backward: BranchParams) -> Tensor:
        total = 0
        for params, reverse in ((forward, False), (backward, True)):
            u, dt, B, C = branch_inputs(xz, params, reverse=reverse)
            delta = F.softplus(dt + params.dt_proj_bias)
            inputs = [t.flip(1) if reverse else t for t in (u, delta, B, C)]
            y = core(inputs[0], inputs[1], params.A, *inputs[2:])
            total = total + (y.flip(1) if reverse else y) + params.D * u
        return total * F.silu(xz.chunk(2, dim=-1)[1]) * 0.5

    return rival


def einsum_loop(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The usual way to write it: decays and inputs as [B, E, L, N], then a loop over slices."""
    u, delta = u.transpose(1, 2), delta.transpose(1, 2)
    decay = torch.exp(torch.einsum("bel,en->beln", delta, A))
    inputs = torch.einsum("bel,bln,bel->beln", delta, B, u)
    state, outputs = u.new_zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + inputs[:, :, t]
        outputs.append(torch.einsum("ben,bn->be", state, C[:, t]))
    return torch.stack(outputs, 1)


def chunk_steps(
    state: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """A few steps from `state` [B, E, N]: (y of these steps, the state after them)."""
    decay = torch.exp(delta.unsqueeze(-1) * A)
    inputs = (delta * u).unsqueeze(-1) * B.unsqueeze(2)
    states = []
    for t in range(u.shape[1]):
        state = decay[:, t] * state + inputs[:, t]
        states.append(state)
    return torch.einsum("blen,bln->ble", torch.stack(states, 1), C), state


def chunked(steps: Callable) -> Core:
    """Chunk by chunk; what does not depend on the state is computed per chunk at once."""

    def core(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        state, outputs = u.new_zeros(u.shape[0], *A.shape), []
        for begin in range(0, u.shape[1], CHUNK):
            span = slice(begin, begin + CHUNK)
            y, state = steps(state, u[:, span], delta[:, span], A, B[:, span], C[:, span])
            outputs.append(y)
        return torch.cat(outputs, 1)

    return core


def compiled_chunks() -> Core:
    torch.compiler.reset()  # earlier shapes and gradient modes count as recompilations
    return chunked(torch.compile(chunk_steps, dynamic=False))


def mambapy_scan() -> Core | None:
    """mambapy's parallel scan, or None if it is not installed."""
    try:
        from mambapy.pscan import pscan
    except ImportError:
        return None

    def core(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        decay = torch.exp(delta.unsqueeze(-1) * A)
        states = pscan(decay, (delta * u).unsqueeze(-1) * B.unsqueeze(2))
        return (states @ C.unsqueeze(-1)).squeeze(3)

    return core


def transformers_mixer(forward: BranchParams, backward: BranchParams) -> Rival | None:
    """transformers' Mamba mixer without its projections, or None if it is not installed."""
    try:
        from transformers import MambaConfig
        from transformers.models.mamba.modeling_mamba import MambaMixer
    except ImportError:
        return None
    projection = nn.Identity()
    projection.weight = forward.D  # the mixer looks at its weight's device

    def mixer_of(params: BranchParams) -> nn.Module:
        channels, states = params.A.shape
        mixer = MambaMixer(
            MambaConfig(
                hidden_size=channels // 2,
                state_size=states,
                use_conv_bias=True,
                time_step_rank=params.dt_proj_weight.shape[1],
            ),
            layer_idx=0,
        )
        mixer.in_proj = mixer.out_proj = projection
        weights = {
            "conv1d.weight": params.conv_weight.unsqueeze(1),
            "conv1d.bias": params.conv_bias,
            "x_proj.weight": params.x_proj_weight,
            "dt_proj.weight": params.dt_proj_weight,
            "dt_proj.bias": params.dt_proj_bias,
            "A_log": torch.log(-params.A),
            "D": params.D,
        }
        with torch.no_grad():
            for name, value in weights.items():
                mixer.get_parameter(name).copy_(value)
        return mixer.to(forward.D.device)

    mixers = mixer_of(forward), mixer_of(backward)

    def rival(xz: Tensor, forward: BranchParams, backward: BranchParams) -> Tensor:
        return (mixers[0](xz) + mixers[1](xz.flip(1)).flip(1)) * 0.5

    return rival


def products_differ(device: str) -> bool:
    """Whether our models' products are by oneDNN where PyTorch's own are not."""
    return device == "cpu" and onednn.is_faster()


def with_our_products(model: nn.Module) -> nn.Module:
    """A copy whose linear layers are `ops.linear.Linear`."""
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if type(layer) is nn.Linear:
            # On no device: no random numbers are drawn for it.
            ours = Linear(layer.in_features, layer.out_features, device="meta")
            ours.weight, ours.bias = layer.weight, layer.bias
            ours.train(layer.training)
            model.set_submodule(name, ours, strict=True)
    return model
