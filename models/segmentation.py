"""Backbones with a decoder: semantic segmentation.

A segmenter is a backbone whose head reads feature maps. Its layers, stages, operations and
checkpoints are those of any other model here.

B images, d width, C classes; h, w the grid of patches. Source: Vim's and DyVM's releases, after
mmsegmentation.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from .backbone import VisionMamba
from .heads import MapHead
from .layouts import RouterMean
from .upernet import FCNHead, FeaturePyramid, UPerHead

AUX_MAP = 2  # which of the four maps the auxiliary head reads


class SegmentationHead(MapHead):
    """Feature pyramid, decoder and, in training, the auxiliary head."""

    def __init__(
        self,
        dim: int,
        patch_size: int,
        num_classes: int,
        layers: Sequence[int],
        features: str = "hidden",
        channels: int | None = None,
        aux_channels: int = 256,
    ):
        super().__init__(layers, features)
        if len(self.layers) not in (1, 4):
            raise ValueError(f"UPerNet reads 4 maps, or one in four sizes, not {len(self.layers)}")
        self.pyramid = FeaturePyramid(dim, patch_size)
        self.decode_head = UPerHead(dim, channels or dim, num_classes)
        self.auxiliary_head = FCNHead(dim, aux_channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """-> logits [B, C, 4h, 4w] and [B, C, h, w] for patches of 16 pixels."""
        levels = self.pyramid(maps)
        aux_logits = self.auxiliary_head(levels[AUX_MAP]) if self.training else None
        return self.decode_head(levels), aux_logits


def output_layers(depth: int) -> tuple[int, ...]:
    """The last layer of each quarter: 5, 11, 17, 23 of 24. Raises ValueError below 4 layers."""
    if depth < 4:
        raise ValueError(f"a depth of {depth} is too small for 4 output layers")
    return tuple(depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4))


def follow_release(model: VisionMamba) -> None:
    """Train with the gradients of DyVM's release, for parity with its recordings.

    See `reduction.freeze` and `layouts.RouterMean`; values are equal but for the router's divisor.
    """
    model.reduction.zeroes = True
    for layer in model.layers:
        layer.mixer.router_mean = RouterMean(extra=1, zeroed=True)


_OFFICIAL = (
    (r"backbone\.(fpn\d\..*)", r"head.pyramid.\1"),
    (r"backbone\.(.*)", r"\1"),
    (r"((?:decode|auxiliary)_head\..*)", r"head.\1"),
)


def is_official(state: Mapping[str, Any]) -> bool:
    """Whether parameters have mmsegmentation's names."""
    return any(name.startswith("backbone.") for name in state)


def from_official(state: Mapping[str, Any]) -> dict[str, Any]:
    """mmsegmentation's parameter names -> ours; other names stay."""
    return {_renamed(name): value for name, value in state.items()}


def _renamed(name: str) -> str:
    for pattern, ours in _OFFICIAL:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    return name


def as_segmenter(model: VisionMamba, head: MapHead, num_classes: int) -> VisionMamba:
    """Give a backbone a head that reads maps; dropped patches stay in the maps as they were.

    Raises:
        ValueError: the head reads a layer that the model does not have.
    """
    if not all(0 <= layer < model.depth for layer in head.layers):
        raise ValueError(
            f"output layers {list(head.layers)} must lie within 0 ... {model.depth - 1}"
        )
    model.head, model.num_classes = head, num_classes
    model.norm_f.requires_grad_(False)  # no map has passed it
    model.reduction.freezes = True
    return model
