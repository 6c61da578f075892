"""The backbone of all models: one loop over the layers, dense and dynamic.

`VisionMamba` is dense (a teacher is one); `dynamic.py` adds score predictors and routers. What
differs between the families is a `Family`, what becomes of tokens at a stage a `Reduction`.

B images, M patches, L = M + n tokens (n class or register tokens), d width, C classes; h, w the
grid of patches. Clips are images with an axis of time: [B, 3, T, H, W], whose patches are one
sequence.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ops.linear import Linear
from ops.rms_norm import add_rms_norm

from .embedding import ClipEmbed, PatchEmbed, Size, check_patches, check_positive
from .family import Family
from .heads import MapHead
from .initialization import initialize
from .layouts import extract, insert, masked_sum
from .mixer import BidirectionalMamba, Layer
from .reduction import Reduction, cumulative_keep
from .rope import RotaryEmbedding
from .timm_interface import TimmInterface
from .tokens import FeatureMaps, Result, Tokens


def as_residual(x: Tensor) -> Tensor:
    """The residual stream is float32 under mixed precision too."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class VisionMamba(TimmInterface, nn.Module):
    """Dense bidirectional Mamba backbone with a classification head.

    Args:
        img_size, patch_size, stride: pixels, one number or (height, width); patches overlap if the
            stride is smaller.
        num_classes: 0 for no head.
        class_token: False drops it, with its row of the position embedding; the head then reads
            the mean of the patch tokens.
        global_pool: what the head reads, "token" or "avg" (default: the class token if there is
            one).
        num_registers, register_reduction: MambaReg's; the other families have one class token.
        num_frames, tubelet_size: for clips of so many frames (VideoMamba's), of which a patch spans
            `tubelet_size`; None for images.
        rope: rotary position embedding besides the learned one, as in Vim's segmentation; for dense
            models without class token.

    Raises:
        ValueError: sizes that do not fit together.
    """

    pruning_layers: tuple[int, ...] = ()  # layers before which a stage drops tokens
    route_blocks = False

    def __init__(
        self,
        family: Family,
        *,
        img_size: Size = 224,
        patch_size: Size = 16,
        stride: Size | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        class_token: bool = True,
        global_pool: str | None = None,
        num_registers: int = 1,
        register_reduction: int = 1,
        drop_path_rate: float = 0.0,
        num_frames: int | None = None,
        tubelet_size: int = 1,
        rope: bool = False,
    ):
        super().__init__()
        stride = patch_size if stride is None else stride
        check_positive(
            img_size=img_size,
            patch_size=patch_size,
            stride=stride,
            in_chans=in_chans,
            embed_dim=embed_dim,
            num_classes=num_classes or 1,
            depth=depth,
            d_state=d_state,
            num_registers=num_registers,
            num_frames=1 if num_frames is None else num_frames,
            tubelet_size=tubelet_size,
        )
        check_patches(img_size, patch_size, stride)
        family.check_clips(class_token, num_frames, tubelet_size)
        family.check_registers(class_token, num_registers, register_reduction, embed_dim)
        self.family, self.embed_dim, self.d_state = family, embed_dim, d_state
        self.num_classes = num_classes
        self.layout = family.make_layout(num_registers, class_token)
        self.global_pool = self.check_pool(global_pool or ("token" if class_token else "avg"))
        self.reduction = Reduction()
        sizes = img_size, patch_size, stride, in_chans, embed_dim
        self.num_frames = num_frames
        self.patch_embed = (
            PatchEmbed(*sizes)
            if num_frames is None
            else ClipEmbed(num_frames, tubelet_size, *sizes)
        )
        self.num_patches = math.prod(self.patch_embed.grid)
        if rope and (class_token or self.route_blocks):
            raise ValueError("rope is for dense models with class_token=False")
        self.rope = RotaryEmbedding(embed_dim, self.patch_embed.grid) if rope else None
        self._make_class_tokens(register_reduction)
        self.head = self.make_head(num_classes)
        rates = [0.0, *torch.linspace(0, drop_path_rate, depth, device="cpu").tolist()]
        self.layers = nn.ModuleList(self._layer(i, rates[i]) for i in range(depth))
        self.drop_path = DropPath(drop_path_rate)
        self.norm_f = nn.RMSNorm(embed_dim, eps=1e-5)
        self.grad_checkpointing = False  # recompute each layer in the backward pass
        initialize(self)

    def _make_class_tokens(self, register_reduction: int) -> None:
        """Class tokens, position embeddings, and MambaReg's neck."""
        count, width = self.layout.num_tokens, self.embed_dim
        if count:
            self.cls_token = nn.Parameter(torch.zeros(1, count, width))
        if self.family.registers:
            self.pos_embed = nn.Parameter(torch.zeros(1, self.num_patches, width))
            self.pos_embed_cls = nn.Parameter(torch.zeros(1, count, width))
            reduced = width // register_reduction
            self.neck = Linear(width, reduced, bias=False)
            self.norm_neck = nn.RMSNorm(count * reduced, eps=1e-5)
        else:
            rows = math.prod(self.patch_embed.plane) + count
            self.pos_embed = nn.Parameter(torch.zeros(1, rows, width))
        if self.num_frames is not None:
            slots = self.patch_embed.slots
            self.temporal_pos_embedding = nn.Parameter(torch.zeros(1, slots, width))

    def _layer(self, index: int, drop_path_rate: float) -> Layer:
        halve = self.family.halve_directions
        mixer = BidirectionalMamba(self.embed_dim, self.d_state, halve, self.route_blocks, index)
        return Layer(mixer, self.embed_dim, DropPath(drop_path_rate))

    @property
    def depth(self) -> int:
        return len(self.layers)

    @property
    def token_keep(self) -> tuple[float, ...]:
        """Fraction of the original patches that each stage keeps at evaluation."""
        return self.reduction.token_keep

    def set_token_keep(self, token_keep: float | Sequence[float]) -> None:
        """Set the fraction of the original patches kept by each stage; a number r means r, r^2, ...

        Raises ValueError unless there is one for each stage, and they descend within (0, 1].
        """
        if not isinstance(token_keep, Sequence):
            token_keep = cumulative_keep(token_keep, len(self.pruning_layers))
        token_keep = tuple(token_keep)
        if len(token_keep) != len(self.pruning_layers):
            raise ValueError(
                f"token_keep {list(token_keep)} must have one fraction for each of the pruning "
                f"layers {list(self.pruning_layers)}"
            )
        pairs = zip((1.0, *token_keep), token_keep, strict=False)
        if not all(0 < low <= high <= 1 for high, low in pairs):
            raise ValueError(
                f"token_keep {list(token_keep)} must not ascend and must lie in (0, 1]"
            )
        before, self.reduction.token_keep = self.reduction.token_keep, token_keep
        try:
            self.reduction.check_counts(self.num_patches)
        except ValueError:
            self.reduction.token_keep = before
            raise
        self.reduction.thresholds = ()

    def set_token_thresholds(self, log_odds: Sequence[float]) -> None:
        """Let each image keep the tokens whose score exceeds its stage's threshold at evaluation,
        as many as they are; none: `token_keep` of every image's.

        Raises ValueError for a model that learns no scores, one that merges, and another number of
        thresholds than stages.
        """
        log_odds = tuple(log_odds)
        if log_odds and (not self.reduction.learns or self.reduction.merges):
            raise ValueError("only tokens that are pruned by learned scores have thresholds")
        if log_odds and len(log_odds) != len(self.pruning_layers):
            raise ValueError(
                f"log_odds {list(log_odds)} must have one threshold for each of the pruning layers "
                f"{list(self.pruning_layers)}"
            )
        self.reduction.thresholds = log_odds

    def kept_counts(self) -> list[int]:
        """Patches that each stage keeps at evaluation."""
        return self.reduction.kept_counts(self.num_patches)

    def set_gate_threshold(self, logit: float) -> None:
        """Set the logit that a gate must exceed at evaluation; 0 (probability 0.5) in the paper."""
        for layer in self.layers:
            layer.mixer.gate_threshold = logit

    def set_noise(self, factor: float) -> None:
        """Set the factor of the Gumbel noise in training's decisions and gates; 1 in the paper."""
        if self.reduction.noise is None:
            # A tensor: a compiled model would be compiled anew for each number.
            self.reduction.noise = torch.ones((), device=self.pos_embed.device)
            for layer in self.layers:
                layer.mixer.noise = self.reduction.noise
        self.reduction.noise.fill_(factor)

    @property
    def gate_threshold(self) -> float:
        return self.layers[0].mixer.gate_threshold

    def class_row(self) -> int | None:
        """Row of the class token in `pos_embed`, or None."""
        if self.family.registers or not self.has_class_token:
            return None
        return self.layout.class_slots(math.prod(self.patch_embed.plane))[0]

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images -> patch tokens [B, M, d], class tokens [B, n, d], with position embeddings."""
        patches = self.patch_embed(images)
        if not self.has_class_token:
            return patches + self.pos_embed, patches[:, :0]
        if self.family.registers:
            pos_patches, pos_class = self.pos_embed, self.pos_embed_cls
        else:
            pos_patches, pos_class = extract(self.pos_embed, (self.class_row(),))
        class_tokens = (self.cls_token + pos_class).expand(images.shape[0], -1, -1)
        if self.num_frames is None:
            return patches + pos_patches, class_tokens
        slots = patches.unflatten(1, (self.patch_embed.slots, -1)) + pos_patches.unsqueeze(1)
        return (slots + self.temporal_pos_embedding.unsqueeze(2)).flatten(1, 2), class_tokens

    def run_layer(self, layer: Layer, *inputs) -> tuple[Tensor, Tensor, Tensor | None]:
        """Run a layer; with `grad_checkpointing` the backward pass repeats it, with equal noise."""
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def run(
        self, images: Tensor, maps: FeatureMaps, stop: int | None = None
    ) -> tuple[Tokens, list[Tensor | None]]:
        """The one loop over the layers, to the last one or up to layer `stop`.

        -> the tokens after it, and each layer's gates [B, 2] (None if nothing is routed).
        """
        patches, class_tokens = self.embed(images)
        class_slots = self.layout.class_slots(self.num_patches)
        sequence = as_residual(insert(patches, class_tokens, class_slots))
        tokens, gates = Tokens.first(sequence, class_slots, self.num_patches), []
        if self.rope is not None:
            tokens = self.rope(tokens)
        for index, layer in enumerate(self.layers):
            if index == stop:
                break
            if index in self.pruning_layers:
                maps.look(tokens)
                tokens = self.reduction(self.pruning_layers.index(index), tokens, self, images)
            hidden, residual, gate = self.run_layer(
                layer,
                tokens.hidden,
                tokens.residual,
                tokens.class_slots,
                tokens.mask,
                tokens.lengths,
            )
            tokens = replace(tokens, hidden=hidden, residual=residual)
            gates.append(gate)
            following = tokens
            if self.rope is not None and index + 1 < self.depth:
                following = self.rope(tokens)
            maps.after_layer(index, tokens, following)
            tokens = following
        return tokens, gates

    def finish(
        self, tokens: Tokens, gates: Sequence[Tensor | None], maps: FeatureMaps | None = None
    ) -> Result:
        """The last norm -> Result without logits."""
        hidden = self.drop_path(tokens.hidden)
        if isinstance(self.norm_f, nn.RMSNorm):
            normed, _ = add_rms_norm(hidden, tokens.residual, self.norm_f.weight, self.norm_f.eps)
        else:  # timm's feature extraction has removed it
            normed = tokens.residual + hidden
        patches, class_tokens = extract(normed, tokens.class_slots)
        ones = tokens.residual.new_ones(hidden.shape[0], 2, dtype=torch.float32)
        return Result(
            logits=None,
            tokens=patches,
            origin=tokens.origin,
            alive=tokens.alive.detach(),
            gates=torch.stack([ones if gate is None else gate for gate in gates]),
            decisions=list(tokens.decisions),
            kept=list(tokens.kept),
            groups=list(tokens.groups),
            scored=list(tokens.scored),
            owner=tokens.owner,
            class_tokens=class_tokens,
            maps={} if maps is None else maps.maps,
        )

    def forward_features(
        self, images: Tensor, layers: Sequence[int] = (), features: str = "residual"
    ) -> Result:
        """images [B, 3, H, W] -> Result without logits, with the maps [B, d, h, w] after `layers`.

        features: what the maps show, see `FeatureMaps`.
        """
        maps = FeatureMaps(tuple(layers), features, self.patch_embed.grid)
        return self.finish(*self.run(images, maps), maps)

    def forward_head(self, result: Result, pre_logits: bool = False) -> Tensor:
        """A Result -> logits [B, C], or with `pre_logits` the classifier's input."""
        if self.family.registers:
            joined = as_residual(self.neck(result.class_tokens)).flatten(1)
            weight = self.norm_neck.weight.to(joined.dtype)
            pooled = F.rms_norm(joined, weight.shape, weight, self.norm_neck.eps)
            pooled = pooled.to(result.class_tokens.dtype)
        elif self.global_pool == "token":
            pooled = result.class_tokens[:, 0]
        else:
            weight = result.alive.unsqueeze(-1).to(result.tokens.dtype)
            pooled = masked_sum(result.tokens, weight)[:, 0] / weight.sum(1).clamp_min(1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Result:
        """images [B, 3, H, W] -> Result."""
        head = self.head
        if isinstance(head, MapHead):
            result = self.forward_features(images, head.layers, head.features)
            logits, aux_logits = head([result.maps[layer] for layer in head.layers])
            return replace(result, logits=logits, aux_logits=aux_logits)
        result = self.forward_features(images)
        return replace(result, logits=self.forward_head(result))
