"""timm's model interface beyond construction: features, feature pyramids, heads, layer groups.

Programs written for timm can use the backbones by these methods: layer decay, `FeatureGetterNet`
(`features_only=True`), decoders of segmentation_models_pytorch.

B images, n class tokens, d width; h, w the grid of patches; C classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from ops.linear import Linear

from .embedding import PatchEmbed
from .family import Family
from .initialization import initialize
from .layouts import TokenLayout
from .tokens import FeatureMaps, Result

POOLS = ("token", "avg")


class TimmInterface:
    """Mixed into `VisionMamba`, which has the attributes below, `depth`, `run` and `finish`."""

    family: Family
    embed_dim: int
    global_pool: str
    layout: TokenLayout
    layers: nn.ModuleList
    patch_embed: PatchEmbed
    pos_embed: nn.Parameter

    @property
    def num_features(self) -> int:
        return self.embed_dim

    @property
    def head_hidden_size(self) -> int:
        """Width of the classifier's input."""
        return self.norm_neck.weight.numel() if self.family.registers else self.embed_dim

    @property
    def num_prefix_tokens(self) -> int:
        """Number of class or register tokens; timm's name, although they need not be in front."""
        return self.layout.num_tokens

    @property
    def has_class_token(self) -> bool:
        return self.layout.num_tokens > 0

    @property
    def feature_info(self) -> list[dict[str, Any]]:
        """Name, channels and reduction of each layer's output."""
        reduction = max(self.patch_embed.stride)
        return [
            dict(module=f"layers.{i}", num_chs=self.embed_dim, reduction=reduction)
            for i in range(self.depth)
        ]

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters without weight decay, besides biases and norms, which are one-dimensional."""
        names = {"cls_token", "pos_embed", "pos_embed_cls", "temporal_pos_embedding"}
        return names | {
            name for name, _ in self.named_parameters() if name.endswith(("A_log", "A_b_log"))
        }

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Parameters by depth, for layer decay: the embedding, each layer, the last norm.

        What matches nothing (head, score predictors) comes last.
        """
        return dict(
            stem=r"^(?:cls_token|pos_embed|pos_embed_cls|temporal_pos_embedding)$|^patch_embed\.",
            blocks=[(r"^layers\.(\d+)\.", None), (r"^norm_f\.", (99999,))],
        )

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each layer in the backward pass instead of keeping its inner values."""
        self.grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one of `num_classes`; 0: no head, `logits` are its input.

        Args:
            global_pool: "token" (the class token) or "avg" (the mean of the patch tokens).

        Raises:
            ValueError: another pooling, or one that the model does not have.
        """
        if global_pool is not None:
            self.global_pool = self.check_pool(global_pool)
        self.num_classes = num_classes
        self.head = self.make_head(num_classes).to(self.pos_embed)
        initialize(self.head)

    def check_pool(self, global_pool: str) -> str:
        if global_pool not in POOLS:
            raise ValueError(f"global_pool {global_pool!r} must be one of {', '.join(POOLS)}")
        if global_pool == "token" and not self.has_class_token:
            raise ValueError("global_pool 'token' needs a class token; give 'avg'")
        if global_pool == "avg" and self.family.registers:
            raise ValueError("global_pool 'avg': MambaReg's head reads its registers; give 'token'")
        return global_pool

    def make_head(self, num_classes: int) -> nn.Module:
        """A classifier, not initialised; the identity without classes."""
        return Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[Result, list] | dict[str, Any]:
        """Maps of the residual stream after chosen layers; dropped patches keep their last value.

        Args:
            x: images [B, 3, H, W].
            indices: layers; a number n for the last n, None for all.
            return_prefix_tokens: return each map as (map, class tokens [B, n, d]).
            norm: apply the last norm to all of them.
            stop_early: skip the layers after the last requested one; the Result is then that of the
                shorter model.
            output_fmt: "NCHW" for maps [B, d, h, w], "NLC" for [B, M, d].
            intermediates_only: return only the maps, else (Result without logits, maps).
            output_dict: return timm's dictionary, with the Result as `image_features`.

        Raises:
            ValueError: another output_fmt.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt {output_fmt!r} must be NCHW or NLC")
        layers, last = feature_take_indices(self.depth, indices)
        maps = FeatureMaps(tuple(layers), "residual", self.patch_embed.grid)
        tokens, gates = self.run(x, maps, last + 1 if stop_early else None)
        chosen = [self._formatted(maps.maps[layer], norm, output_fmt) for layer in sorted(layers)]
        prefixes = [self._normed(maps.class_tokens[i], norm) for i in sorted(layers)]
        if output_dict:
            result = {"image_intermediates": chosen}
            if return_prefix_tokens and self.has_class_token:
                result["image_intermediates_prefix"] = prefixes
            return result if intermediates_only else self._with_features(result, tokens, gates)
        if return_prefix_tokens and self.has_class_token:
            chosen = list(zip(chosen, prefixes, strict=True))
        return chosen if intermediates_only else (self.finish(tokens, gates, maps), chosen)

    def _with_features(self, result: dict[str, Any], tokens, gates) -> dict[str, Any]:
        return {"image_features": self.finish(tokens, gates)} | result

    def _normed(self, values: Tensor, norm: bool) -> Tensor:
        if not norm or not isinstance(self.norm_f, nn.RMSNorm):
            return values
        return F.rms_norm(values, (self.embed_dim,), self.norm_f.weight, self.norm_f.eps)

    def _formatted(self, feature_map: Tensor, norm: bool, output_fmt: str) -> Tensor:
        """A map [B, d, h, w] in the requested format."""
        rows = self._normed(feature_map.flatten(2).transpose(1, 2), norm)
        if output_fmt == "NLC":
            return rows
        return rows.transpose(1, 2).unflatten(2, self.patch_embed.grid).contiguous()

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the layers after the last one of `indices`, the last norm and the head.

        -> the layers that the indices refer to.
        """
        layers, last = feature_take_indices(self.depth, indices)
        self.layers = self.layers[: last + 1]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return layers
