"""Vision Mamba backbones: `VisionMamba` (dense, the teacher) and `DynamicVisionMamba` (dense +
scorers + routers).

One backbone serves all families; what differs between them is a `Family`.

B images, M patches, L = M + n tokens (n class or register tokens), d width, k kept patches, C
classes.
Source: "Dynamic Vision Mamba" (arXiv 2504.04787).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.rms_norm import add_rms_norm

from . import sampling
from .initialization import initialize, initialize_router
from .layouts import Positions, TokenLayout, extract, insert, reordered, take
from .mixer import BidirectionalMamba, Block
from .pruning import ScorePredictor, best_in_order, kept_first

SCORER_INPUTS = ("hidden", "B", "delta")
TOKEN_STRATEGIES = ("learned", "random", "static")


@dataclass(frozen=True)
class Family:
    """What differs between the families of backbones.

    `layout` builds the rule for the class tokens from their number. `joint_pos_embed`: one table
    for patches and class token, the class token's row standing where the class token stands.
    """

    name: str
    layout: type[TokenLayout]
    halve_directions: bool
    registers: bool = False

    def make_layout(self, num_registers: int) -> TokenLayout:
        return self.layout(num_registers) if self.registers else self.layout()


@dataclass
class Result:
    """What a forward pass gives, dense or dynamic, training or evaluation."""

    logits: Tensor  # [B, C]
    tokens: Tensor  # [B, M or k, d], patch tokens after norm_f in slot order
    positions: Tensor  # [B, M or k], original patch index of each slot
    keep: Tensor  # [B, M or k], 1 where the slot is alive
    gates: Tensor  # [depth, B, 2], forward and backward; ones where nothing is routed
    decisions: list[Tensor] = field(
        default_factory=list
    )  # per stage, training: [B, M], with gradient
    kept: list[Tensor] = field(
        default_factory=list
    )  # per stage, evaluation: [B, k], original patch indexes


torch.export.register_dataclass(Result)


class PatchEmbed(nn.Module):
    """Images [B, 3, H, W] to patch embeddings [B, M, d] in raster order; overlapping where stride <
    patch size.
    """

    def __init__(self, img_size: int, patch_size: int, stride: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.img_size = img_size
        self.grid = (img_size - patch_size) // stride + 1
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        if images.shape[-2:] != (self.img_size, self.img_size):
            height, width = images.shape[-2:]
            raise ValueError(
                f"images are {height} x {width}, the model takes {self.img_size} x {self.img_size}"
            )
        return self.proj(images).flatten(2).transpose(1, 2)


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, not {size!r}")


def as_residual(x: Tensor) -> Tensor:
    """The residual stream is float32 under mixed precision too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VisionMamba(nn.Module):
    """Dense bidirectional Mamba backbone with a classification head.

    `num_registers` and `register_reduction` belong to MambaReg; the other families have one class
    token.
    """

    def __init__(
        self,
        family: Family,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        num_registers: int = 1,
        register_reduction: int = 1,
        drop_path_rate: float = 0.0,
    ):
        super().__init__()
        stride = patch_size if stride is None else stride
        _check_sizes(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_classes=num_classes,
            depth=depth,
            d_state=d_state,
            num_registers=num_registers,
        )
        if img_size < patch_size:
            raise ValueError(f"image size {img_size} is smaller than the patch size {patch_size}")
        rest = (img_size - patch_size) % stride
        if rest:
            raise ValueError(
                f"image size {img_size} leaves {rest} pixels that no patch of {patch_size} at "
                "stride "
                f"{stride} sees; {img_size - rest} and {img_size - rest + stride} fit"
            )
        if not family.registers and (num_registers, register_reduction) != (1, 1):
            raise ValueError(
                f"{family.name} has one class token; num_registers and register_reduction are "
                "MambaReg's"
            )
        if (
            register_reduction < 1
            or embed_dim % register_reduction
            or num_registers % register_reduction
        ):
            raise ValueError(
                f"register_reduction {register_reduction} must divide num_registers "
                f"{num_registers} and "
                f"embed_dim {embed_dim}"
            )
        self.family, self.embed_dim, self.depth, self.d_state = family, embed_dim, depth, d_state
        self.num_classes = num_classes
        self.layout = family.make_layout(num_registers)
        self.patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim)
        self.num_patches = self.patch_embed.grid**2
        count = self.layout.num_tokens
        self.cls_token = nn.Parameter(torch.zeros(1, count, embed_dim))
        if family.registers:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, embed_dim))
            self.pos_embed_cls = nn.Parameter(torch.zeros(1, count, embed_dim))
            reduced = embed_dim // register_reduction
            self.neck = nn.Linear(embed_dim, reduced, bias=False)
            self.norm_neck = nn.RMSNorm(count * reduced, eps=1e-5)
            self.head = nn.Linear(count * reduced, num_classes)
        else:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches + 1, embed_dim))
            self.head = nn.Linear(embed_dim, num_classes)
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        self.layers = nn.ModuleList(self._block(i, rates[i]) for i in range(depth))
        self.drop_path = DropPath(drop_path_rate)
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.grad_checkpointing = False  # recompute each layer in the backward pass
        initialize(self)

    def _block(self, index: int, drop_path_rate: float, router: bool = False) -> Block:
        mixer = BidirectionalMamba(
            self.embed_dim, self.d_state, self.family.halve_directions, router, index
        )
        return Block(mixer, self.embed_dim, DropPath(drop_path_rate))

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that the optimizer must not decay, beside biases and norms (which are
        one-dimensional).
        """
        names = {"cls_token", "pos_embed", "pos_embed_cls"}
        return names | {
            name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log"))
        }

    def class_row(self) -> int | None:
        """Row of the class token in `pos_embed`; None where the class tokens have a table of their
        own.
        """
        return None if self.family.registers else self.layout.positions(self.num_patches)[0]

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> patch tokens [B, M, d] and class tokens [B, n, d], position embeddings added."""
        patches = self.patch_embed(images)
        if self.family.registers:
            pos_patches, pos_class = self.pos_embed, self.pos_embed_cls
        else:
            pos_patches, pos_class = extract(
                self.pos_embed, self.layout.positions(self.num_patches)
            )
        return patches + pos_patches, (self.cls_token + pos_class).expand(images.shape[0], -1, -1)

    def run_layer(self, layer: Block, *inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's forward, its inner values kept or recomputed; its random numbers are the same
        both times.
        """
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def classify(self, class_tokens: Tensor) -> Tensor:
        """Class tokens after norm_f [B, n, d] -> logits [B, C]."""
        if self.family.registers:
            joined, norm = as_residual(self.neck(class_tokens)).flatten(1), self.norm_neck
            return self.head(add_rms_norm(None, joined, norm.weight, norm.eps)[0])
        return self.head(class_tokens[:, 0])

    def finish(
        self, hidden: Tensor, residual: Tensor, positions: Positions
    ) -> tuple[Tensor, Tensor]:
        """Last norm: -> logits [B, C], patch tokens [B, M, d]."""
        normed, _ = add_rms_norm(
            self.drop_path(hidden), residual, self.norm_f.weight, self.norm_f.eps
        )
        patches, class_tokens = extract(normed, positions)
        return self.classify(class_tokens), patches

    def forward(self, images: Tensor) -> Result:
        """images [B, 3, H, W] -> Result."""
        patches, class_tokens = self.embed(images)
        class_positions = self.layout.positions(self.num_patches)
        hidden, residual = None, as_residual(insert(patches, class_tokens, class_positions))
        for layer in self.layers:
            hidden, residual, _ = self.run_layer(layer, hidden, residual, class_positions)
        logits, tokens = self.finish(hidden, residual, class_positions)
        batch = images.shape[0]
        return Result(
            logits,
            tokens,
            positions=torch.arange(self.num_patches, device=images.device).expand(batch, -1),
            keep=tokens.new_ones(batch, self.num_patches),
            gates=tokens.new_ones(self.depth, batch, 2),
        )


def cumulative_keep(ratio: float, stages: int) -> tuple[float, ...]:
    """Fractions of the original patches that stages 1, 2, ... keep at a token keep ratio: r, r^2,
    ...
    """
    return tuple(ratio**stage for stage in range(1, stages + 1))


class DynamicVisionMamba(VisionMamba):
    """`VisionMamba` that drops patch tokens before `pruning_layers` and skips scan directions per
    image and layer.

    Args:
        pruning_layers: ascending layer indexes; before each a stage drops tokens.
        token_keep: fraction of the original patches that each stage keeps at evaluation, or one
            ratio r for r, r^2, ...
        route_blocks: with block routers (False: token pruning alone).
        prune_tokens: with pruning stages (False: block routing alone).
        scorer_input: what the score predictors read: the hidden state, or the previous layer's B or
            raw step.
        token_strategy: learned scores, or the random and static baselines.
    """

    def __init__(
        self,
        family: Family,
        *,
        pruning_layers: Sequence[int] = (6, 12, 18),
        token_keep: float | Sequence[float] = (0.7, 0.49, 0.343),
        prune_tokens: bool = True,
        route_blocks: bool = True,
        scorer_input: str = "hidden",
        token_strategy: str = "learned",
        **backbone,
    ):
        self.route_blocks = route_blocks
        super().__init__(family, **backbone)
        pruning_layers = tuple(pruning_layers) if prune_tokens else ()
        if list(pruning_layers) != sorted(set(pruning_layers)) or not all(
            0 < p < self.depth for p in pruning_layers
        ):
            raise ValueError(
                f"pruning_layers {list(pruning_layers)} must ascend within 1 ... {self.depth - 1}"
            )
        if scorer_input not in SCORER_INPUTS:
            raise ValueError(
                f"scorer_input {scorer_input!r} must be one of {', '.join(SCORER_INPUTS)}"
            )
        if token_strategy not in TOKEN_STRATEGIES:
            raise ValueError(
                f"token_strategy {token_strategy!r} must be one of {', '.join(TOKEN_STRATEGIES)}"
            )
        self.pruning_layers = pruning_layers
        self.scorer_input, self.token_strategy = scorer_input, token_strategy
        self.set_token_keep(token_keep if prune_tokens else ())
        if self.pruning_layers and token_strategy == "learned":
            width = {"hidden": self.embed_dim, "B": self.d_state, "delta": 2 * self.embed_dim}[
                scorer_input
            ]
            self.score_predictors = nn.ModuleList(
                ScorePredictor(width) for _ in self.pruning_layers
            )
            initialize(self.score_predictors)
        if route_blocks:
            initialize_router(self)

    def _block(self, index: int, drop_path_rate: float, router: bool = False) -> Block:
        return super()._block(index, drop_path_rate, router=self.route_blocks)

    def set_token_keep(self, token_keep: float | Sequence[float]) -> None:
        """Set the fractions of the original patches that the stages keep; a number r means r, r^2,
        ...

        Raises ValueError unless they descend within (0, 1], one for each stage.
        """
        if not isinstance(token_keep, Sequence):
            token_keep = cumulative_keep(token_keep, len(self.pruning_layers))
        token_keep = tuple(token_keep)
        if len(token_keep) != len(self.pruning_layers):
            raise ValueError(
                f"token_keep {list(token_keep)} must have one fraction for each of the pruning "
                "layers "
                f"{list(self.pruning_layers)}"
            )
        if not all(
            0 < low <= high <= 1 for high, low in zip((1.0, *token_keep), token_keep, strict=False)
        ):
            raise ValueError(
                f"token_keep {list(token_keep)} must not ascend and must lie in (0, 1]"
            )
        self.token_keep = token_keep

    def set_gate_threshold(self, logit: float) -> None:
        """Set the logit that a gate must exceed at evaluation; 0, a probability of 0.5, is the
        paper's.
        """
        for layer in self.layers:
            layer.mixer.gate_threshold = logit

    @property
    def gate_threshold(self) -> float:
        return self.layers[0].mixer.gate_threshold

    def kept_counts(self) -> list[int]:
        """Patches that each stage keeps at evaluation."""
        return [int(ratio * self.num_patches) for ratio in self.token_keep]

    def scores(
        self,
        stage: int,
        mixed: Tensor,
        residual: Tensor,
        policy: Tensor,
        class_positions: Positions,
        mask: Tensor | None,
    ) -> Tensor:
        """Log-probabilities (keep, drop) [B, m, 2] of the patch tokens that enter a stage.

        mixed [B, L, d]: hidden + residual; residual [B, L, d]: what the layer before normalised.
        """
        if self.scorer_input == "hidden":
            return self.score_predictors[stage](extract(mixed, class_positions)[0], policy)
        previous = self.layers[self.pruning_layers[stage] - 1]
        normed, _ = add_rms_norm(None, residual, previous.norm.weight, previous.norm.eps)
        B, step = previous.mixer.scan_inputs(normed, mask)
        features, _ = extract(B if self.scorer_input == "B" else step, class_positions)
        return self.score_predictors[stage](features, policy)

    def forward(self, images: Tensor) -> Result:
        """images [B, 3, H, W] -> Result. In training all M slots stay, re-arranged; at evaluation k
        are left.
        """
        return self._forward_train(images) if self.training else self._forward_eval(images)

    def _start(self, images: Tensor) -> tuple[Tensor, Positions, Tensor]:
        patches, class_tokens = self.embed(images)
        class_positions = self.layout.positions(self.num_patches)
        origin = torch.arange(self.num_patches, device=images.device).expand(images.shape[0], -1)
        return as_residual(insert(patches, class_tokens, class_positions)), class_positions, origin

    def _gates(self, gates: list[Tensor | None], like: Tensor) -> Tensor:
        ones = like.new_ones(like.shape[0], 2, dtype=torch.float32)
        return torch.stack([ones if gate is None else gate for gate in gates])

    def _forward_train(self, images: Tensor) -> Result:
        (residual, class_positions, origin), hidden, mask = self._start(images), None, None
        policy = residual.new_ones(origin.shape)
        decisions, gates = [], []
        for index, layer in enumerate(self.layers):
            if index in self.pruning_layers:
                stage = len(decisions)
                mixed = residual + layer.drop_path(hidden)
                decision = self._decide(
                    stage, images, mixed, residual, policy, class_positions, mask
                )
                decisions.append(decision)
                order, kept = kept_first(decision.detach())
                new_positions = self.layout.positions(kept)
                residual, hidden = (
                    take(mixed, reordered(order, class_positions, new_positions)),
                    None,
                )
                origin, policy, class_positions = (
                    take(origin, order),
                    take(decision, order),
                    new_positions,
                )
                mask = insert(policy, policy.new_ones(new_positions.shape), new_positions)
            hidden, residual, gate = self.run_layer(layer, hidden, residual, class_positions, mask)
            gates.append(gate)
        logits, tokens = self.finish(hidden, residual, class_positions)
        return Result(
            logits, tokens, origin, policy.detach(), self._gates(gates, images), decisions=decisions
        )

    def _decide(
        self,
        stage: int,
        images: Tensor,
        mixed: Tensor,
        residual: Tensor,
        policy: Tensor,
        class_positions: Positions,
        mask: Tensor | None,
    ) -> Tensor:
        """The cumulative 0/1 decision [B, M] of one stage in training; a token once dropped stays
        dropped.
        """
        if self.token_strategy == "learned":
            log_probs = self.scores(stage, mixed, residual, policy, class_positions, mask)
            return sampling.keep_decision(log_probs, f"token.stage{stage}") * policy
        count = self.kept_counts()[stage]
        alive = policy.shape[1] if stage == 0 else self.kept_counts()[stage - 1]
        # The alive tokens stand in front, the same number for every image.
        chosen = self._baseline_choice(stage, images, alive, count)
        return torch.zeros_like(policy).scatter_(1, chosen, 1.0)

    def _baseline_choice(self, stage: int, images: Tensor, alive: int, count: int) -> Tensor:
        """Slots [B, count] that the random or static strategy keeps of `alive` tokens, ascending."""
        if self.token_strategy == "static":
            slots = torch.arange(count, device=images.device) * alive // max(count, 1)
            return slots.expand(images.shape[0], -1)
        return best_in_order(sampling.image_noise(images, alive, stage, fresh=self.training), count)

    def _forward_eval(self, images: Tensor) -> Result:
        (residual, class_positions, origin), hidden = self._start(images), None
        kept, gates = [], []
        for index, layer in enumerate(self.layers):
            if index in self.pruning_layers:
                stage = len(kept)
                mixed = residual + layer.drop_path(hidden)
                patches, class_tokens = extract(mixed, class_positions)
                count = self.kept_counts()[stage]
                if self.token_strategy == "learned":
                    policy = patches.new_ones(patches.shape[:2])
                    log_probs = self.scores(stage, mixed, residual, policy, class_positions, None)
                    chosen = best_in_order(log_probs[..., 0], count)
                else:
                    chosen = self._baseline_choice(stage, images, patches.shape[1], count)
                patches, origin = take(patches, chosen), take(origin, chosen)
                kept.append(origin)
                class_positions = self.layout.positions(count)
                residual, hidden = insert(patches, class_tokens, class_positions), None
            hidden, residual, gate = layer(hidden, residual, class_positions)
            gates.append(gate)
        logits, tokens = self.finish(hidden, residual, class_positions)
        keep = tokens.new_ones(tokens.shape[:2])
        return Result(logits, tokens, origin, keep, self._gates(gates, images), kept=kept)
