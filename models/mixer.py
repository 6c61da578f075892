"""The bidirectional Mamba mixer and the residual layer around it.

B images, L tokens, d width, E = 2 d inner width, N states, R = ceil(d / 16) step rank, n class
tokens. Source: Vim (arXiv 2401.09417), section 3; the block router is DyVM's (arXiv 2504.04787),
section 3.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ops.kept import Kept
from ops.linear import Linear
from ops.operators import plain_on_cpu
from ops.rms_norm import add_rms_norm
from ops.selective_scan import BranchParams, KeptParams, bidirectional_ssm, branch_inputs
from utils import processor

from . import cpu_layer, sampling
from .layouts import ClassSlots, RouterMean, read

CONV_WIDTH = 4
LOG2_E = math.log2(math.e)
ROUTER_BIAS = 5.0  # a new router keeps nearly every scan
# Of xz per group of images in CPU inference: half of the cache, the other half is for what is made
# of it. At least 8 MiB, and not more than 24: the C library gives memory of 32 back to the system
# each time, and getting it anew takes longer than the cache saves.
GROUP_BYTES = min(max(processor.largest_cache() // 2, 8 << 20), 24 << 20)
FEW_OFF = 1 / 8  # a share of images whose products take no longer than moving the others


@dataclass
class Observation:
    """A number for each token, which a reduction wants of a mixer's last forward pass.

    An object of its own: `torch.export` lets a module keep no new tensors.
    """

    of: str = ""  # "steps", "outputs" or nothing
    value: Tensor | None = None  # [B, L]


def decay(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) [E, N] in float32."""
    if A_log.device.type != "cpu" or torch.compiler.is_compiling():
        return -torch.exp(A_log.float())
    # PyTorch's exp wakes MKL's threads for a few thousand numbers, which takes longer than they do.
    return -torch.exp2(A_log.float() * LOG2_E)


class Router(Linear):
    """Logits of a layer's two scans from what it projects of its class tokens."""

    def before(self, projection: Linear, classes: Tensor) -> Tensor:
        """The logits [B, 2] of classes [B, n, d] that are not projected yet.

        By one small matrix for both weights, in place of rows that fill up two products, where
        nothing else is to see the projection.
        """
        given = classes, self.weight, projection.weight
        alone = type(projection) is Linear and projection.bias is None
        alone = alone and not projection._forward_hooks and not projection._forward_pre_hooks
        if (
            alone
            and all(each.dtype == torch.float32 for each in given)
            and not torch.is_autocast_enabled("cpu")
            and plain_on_cpu(*given)
        ):
            return self(classes.mean(dim=1), self.product(projection))
        return self(projection(classes).mean(dim=1))

    def product(self, projection: Linear) -> Tensor:
        """The weight [2, d] that gives the logits of what is not projected yet."""
        weights = self.weight, projection.weight
        return self._kept.get("product", weights, lambda: weights[0] @ weights[1])

    def forward(self, inputs: Tensor, weight: Tensor | None = None) -> Tensor:
        """inputs [B, i], weight [2, i], the router's own by default -> [B, 2]"""
        if weight is None:
            return super().forward(inputs)
        # Not a product: its rows would depend on those beside them (`ops.linear`).
        return (inputs[:, None] * weight).sum(dim=-1) + self.bias


class BidirectionalMamba(nn.Module):
    """Two selective scans over one input projection, forward and backward (suffix `_b`).

    With `router`, the class token decides per image which of the two run: noisy straight-through
    gates in training, logit > `gate_threshold` at evaluation.

    `mask_in_place` says what a mask of tokens means to the scans; see `in_place` of
    `ops.selective_scan.ssm_branch`.
    """

    mask_in_place = False

    def __init__(
        self, dim: int, d_state: int, halve: bool, router: bool = False, layer_index: int = 0
    ):
        super().__init__()
        inner, rank = 2 * dim, math.ceil(dim / 16)
        self.scale = 0.5 if halve else 1.0
        self.layer_index = layer_index
        self.in_proj = Linear(dim, 2 * inner, bias=False)
        for suffix in ("", "_b"):
            setattr(self, f"conv1d{suffix}", nn.Conv1d(inner, inner, CONV_WIDTH, groups=inner))
            setattr(self, f"x_proj{suffix}", nn.Linear(inner, rank + 2 * d_state, bias=False))
            setattr(self, f"dt_proj{suffix}", nn.Linear(rank, inner))
            setattr(self, f"D{suffix}", nn.Parameter(torch.ones(inner)))
        states = torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(inner, 1)
        self.A_log = nn.Parameter(states)
        self.A_b_log = nn.Parameter(states.clone())
        self.block_head = Router(2 * inner, 2) if router else None
        self.out_proj = Linear(inner, dim, bias=False)
        self.gate_threshold = 0.0  # a logit
        self.noise: Tensor | None = None  # factor of the gates' noise in training, see `set_noise`
        self.router_mean = RouterMean()
        self.observation = Observation()
        self.kept = Kept()

    def branch_weights(self, backward: bool) -> tuple[Tensor, ...]:
        """What `branch` is made of."""
        suffix = "_b" if backward else ""
        conv, dt_proj = getattr(self, f"conv1d{suffix}"), getattr(self, f"dt_proj{suffix}")
        return (
            conv.weight,
            conv.bias,
            getattr(self, f"x_proj{suffix}").weight,
            dt_proj.weight,
            dt_proj.bias,
            self.A_b_log if backward else self.A_log,
            getattr(self, f"D{suffix}"),
        )

    def branch(self, backward: bool) -> BranchParams:
        """The weights of one direction, as the scan reads them."""
        weights = self.branch_weights(backward)

        def read() -> BranchParams:
            taps, *others, A_log, D = weights
            given = (taps.squeeze(1), *others, decay(A_log), D)
            return BranchParams(*given) if torch.is_grad_enabled() else KeptParams(*given)

        return self.kept.get("branch_b" if backward else "branch", weights, read)

    def train(self, mode: bool = True) -> "BidirectionalMamba":
        self.kept.clear()
        return super().train(mode)

    def route(self, logits: Tensor) -> Tensor:
        """Gates [B, 2] (forward, backward) from the router's logits [B, 2]."""
        logits = logits.float()
        if self.training:
            return sampling.binary_gate(logits, f"router.layer{self.layer_index}", self.noise)
        return (logits > self.gate_threshold).float()

    def forward(
        self,
        hidden: Tensor,
        class_slots: ClassSlots,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [B, L, d], mask [B, L] -> output [B, L, d], gates [B, 2] (None if not routed).

        lengths [B]: only so many tokens of each image exist (evaluation).
        """
        if (
            hidden.device.type == "cpu"
            and not torch.is_grad_enabled()
            and mask is None
            and not self.training
            and not self.observation.of
            and not torch.compiler.is_compiling()  # groups depend on the images
        ):
            return self._infer_in_groups(hidden, class_slots, lengths)
        xz = self.in_proj(hidden)
        gates, routing = None, {}
        if self.block_head is not None:
            mean = self.router_mean if self.training else None
            classes = read(xz, class_slots, mask, mean, lengths)
            single = classes.shape[1] == 1
            gates = self.route(self.block_head(classes[:, 0] if single else classes.mean(dim=1)))
            routing = {"gates": gates} if self.training else {"active": gates > 0.5}
        y = bidirectional_ssm(
            xz,
            self.branch(False),
            self.branch(True),
            mask=mask,
            lengths=lengths,
            scale=self.scale,
            in_place=self.mask_in_place,
            **routing,
        )
        if self.observation.of == "steps":
            self.observation.value = self._steps(xz.detach())
        elif self.observation.of == "outputs":
            self.observation.value = y.detach().float().clamp_min(0).sum(dim=-1)
        return self.out_proj(y), gates

    @torch.no_grad()
    def _steps(self, xz: Tensor) -> Tensor:
        """Step sizes [B, L], mean over channels, summed over both directions."""
        steps = 0
        for backward in (False, True):
            branch = self.branch(backward)
            _, raw, _, _ = branch_inputs(xz, branch, reverse=backward)
            steps = steps + F.softplus(raw.float() + branch.dt_proj_bias.float()).mean(dim=-1)
        return steps

    def step_operations(self, tokens: int) -> int:
        """Multiply-adds of `_steps`, which repeats the scans' projections, for so many tokens."""
        inner, rank = self.dt_proj.out_features, self.dt_proj.in_features
        projections = self.x_proj.weight.numel() + rank * inner
        return 2 * tokens * (CONV_WIDTH * inner + projections)

    def scan_inputs_operations(self, tokens: int) -> int:
        """The same of `scan_inputs`, which repeats the input projection too."""
        return self.step_operations(tokens) + tokens * self.in_proj.weight.numel()

    def group_size(self, batch: int, tokens: int, bytes_each: int) -> int:
        """Images at a time whose xz fits the cache, in CPU inference."""
        count = math.ceil(batch * tokens * self.in_proj.out_features * bytes_each / GROUP_BYTES)
        size = math.ceil(batch / max(1, count))
        return max(1, size + -size % torch.get_num_threads())  # so that no thread is idle

    def _infer_in_groups(
        self, hidden: Tensor, class_slots: ClassSlots, lengths: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """`forward` on a CPU without gradient, a few images at a time.

        Images whose scans are both off are left out where they are enough to pay for moving the
        others together. Where images differ in length, those of a group are as alike as can be.
        """
        batch, tokens, _ = hidden.shape
        size = self.group_size(batch, tokens, hidden.element_size())
        groups = [slice(begin, begin + size) for begin in range(0, batch, size)]
        gates, active, whole = None, None, True
        if self.block_head is not None:
            classes = read(hidden, class_slots, lengths=lengths)
            gates = self.route(self.block_head.before(self.in_proj, classes))
            active = gates > 0.5
            running = active.any(dim=1)
            left_out = batch - int(running.sum())
            if left_out == batch:
                return torch.zeros_like(hidden), gates
            whole = left_out <= FEW_OFF * batch
            if not whole:
                groups = running.nonzero()[:, 0].split(size)
        if lengths is not None and len(groups) > 1:
            order = lengths.argsort()
            groups = (order if whole else order[running[order]]).split(size)
        forward, backward = self.branch(False), self.branch(True)

        def run(x: Tensor, on: Tensor | None, own: Tensor | None) -> Tensor:
            y = bidirectional_ssm(
                self.in_proj(x), forward, backward, scale=self.scale, active=on, lengths=own
            )
            return self.out_proj(y)

        def part(of: Tensor | None, group: slice | Tensor) -> Tensor | None:
            return None if of is None else of[group]

        if whole and len(groups) == 1:
            return run(hidden, active, lengths), gates
        out = torch.empty_like(hidden) if lengths is None else torch.zeros_like(hidden)
        if not whole and lengths is None:
            out[~running] = 0
        for group in groups:
            own, longest = part(lengths, group), tokens
            if own is not None:
                longest = int(own.max())
            x = hidden[:, :longest][group]
            out[:, :longest][group] = run(x, part(active, group), own)
        return out, gates

    def scan_inputs(self, hidden: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What ablated score predictors read instead of the hidden state, mean of both directions.

        hidden [B, L, d] -> B [B, L, N], raw step dt_proj.weight dt_raw [B, L, E].
        """
        xz = self.in_proj(hidden)
        masking = {"mask": mask, "in_place": self.mask_in_place}
        _, step, B, _ = branch_inputs(xz, self.branch(False), **masking)
        _, step_b, B_b, _ = branch_inputs(xz, self.branch(True), reverse=True, **masking)
        return (B + B_b) / 2, (step + step_b) / 2


class Layer(nn.Module):
    """Prenorm residual layer: residual += drop_path(hidden); hidden = mixer(RMSNorm(residual)).

    The residual stays in float32.
    """

    def __init__(self, mixer: BidirectionalMamba, dim: int, drop_path: nn.Module):
        super().__init__()
        self.norm = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.drop_path = drop_path

    def forward(
        self,
        hidden: Tensor | None,
        residual: Tensor,
        class_slots: ClassSlots,
        mask: Tensor | None = None,
        lengths: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """hidden, residual [B, L, d] -> both for the next layer, gates [B, 2].

        hidden None: nothing to add.
        """
        if hidden is not None:
            hidden = self.drop_path(hidden)
        if mask is None and self._is_usual():
            evaluated = cpu_layer.evaluate(self, hidden, residual, class_slots, lengths)
            if evaluated is not None:
                return evaluated
        normed, residual = add_rms_norm(hidden, residual, self.norm.weight, self.norm.eps)
        hidden, gates = self.mixer(normed, class_slots, mask, lengths)
        return hidden, residual, gates

    def _is_usual(self) -> bool:
        """Whether the mixer and its router are of these very classes, not of derived ones."""
        router = self.mixer.block_head
        return type(self.mixer) is BidirectionalMamba and (router is None or type(router) is Router)
