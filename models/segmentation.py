"""Backbones with a decoder: semantic segmentation.

A segmenter is a backbone whose head reads feature maps. Its layers, stages, operations and
checkpoints are those of any other model here.

B images, d width, C classes; h, w the grid of patches. Source: Vim's and DyVM's releases, after
mmsegmentation.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .backbone import VisionMamba
from .heads import MapHead
from .layouts import RouterMean
from .smp_decoder import PREFIX, SmpHead
from .upernet import FCNHead, FeaturePyramid, LightHead, UPerHead

AUX_MAP = 2  # which of the four maps the auxiliary head reads
AUX_CHANNELS = 256


class SegmentationHead(MapHead):
    """Feature pyramid, decoder and, in training, the auxiliary head."""

    def __init__(
        self,
        decoder: nn.Module,
        dim: int,
        patch_size: int,
        num_classes: int,
        layers: Sequence[int],
        features: str = "hidden",
        aux_channels: int = AUX_CHANNELS,
    ):
        super().__init__(layers, features)
        if len(self.layers) not in (1, 4):
            raise ValueError(f"a decoder reads 4 maps, or one in 4 sizes, not {len(self.layers)}")
        self.pyramid = FeaturePyramid(dim, patch_size)
        self.decode_head = decoder
        self.auxiliary_head = FCNHead(dim, aux_channels, num_classes)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """-> logits [B, C, 4h, 4w] and [B, C, h, w] for patches of 16 pixels."""
        levels = self.pyramid(maps)
        aux_logits = self.auxiliary_head(levels[AUX_MAP]) if self.training else None
        return self.decode_head(levels), aux_logits


class Decoder(NamedTuple):
    """A row of the table of decoders."""

    build: Callable[[int, int, int], nn.Module]  # width of the maps, own width, classes
    channels: Callable[[int], int]  # its width by default, from that of the maps
    what: str


DECODERS = {
    "upernet": Decoder(UPerHead, lambda dim: dim, "pooled context and a feature pyramid"),
    "light": Decoder(LightHead, lambda dim: max(32, dim // 2), "the sum of four maps"),
}


def make_head(
    decoder: str,
    model: VisionMamba,
    num_classes: int,
    layers: Sequence[int] | None = None,
    features: str = "hidden",
    channels: int | None = None,
) -> SegmentationHead:
    """A fresh head for a backbone.

    Args:
        decoder: a name of `DECODERS`, or "smp:NAME" for one of segmentation_models_pytorch.
        layers: after which maps are taken; None: `output_layers`.
        channels: width of the decoder; None: its own.

    Raises:
        ValueError: patches of a size that has no pyramid, too few layers, an unknown decoder.
    """
    dim = model.embed_dim
    height, width = model.patch_embed.patch_size
    if height != width or model.patch_embed.stride != (height, width):
        raise ValueError("a feature pyramid needs square patches that do not overlap")
    least = {16: 2, 8: 4}.get(height, 8)
    if min(model.patch_embed.grid) < least:
        raise ValueError(
            f"an image of {' x '.join(map(str, model.patch_embed.img_size))} pixels is too small: "
            f"a feature pyramid needs {least} patches of {height} a side"
        )
    return SegmentationHead(
        _make_decoder(decoder, dim, num_classes, channels),
        dim,
        height,
        num_classes,
        layers or output_layers(model.depth),
        features,
    )


def _make_decoder(decoder: str, dim: int, num_classes: int, channels: int | None) -> nn.Module:
    if decoder.startswith(PREFIX):
        if channels is not None:
            raise ValueError(f"{decoder} has a width of its own, not {channels} channels")
        return SmpHead(decoder.removeprefix(PREFIX), dim, num_classes)
    if decoder not in DECODERS:
        raise ValueError(f"decoder {decoder!r} is unknown; known: {', '.join(DECODERS)}, smp:NAME")
    row = DECODERS[decoder]
    return row.build(dim, channels or row.channels(dim), num_classes)


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


def as_segmenter(model: VisionMamba, head: MapHead, num_classes: int) -> VisionMamba:
    """Give a backbone a head that reads maps; dropped patches stay in the maps as they were.

    Raises:
        ValueError: layers that do not ascend to the last one.
    """
    layers, last = list(head.layers), model.depth - 1
    if layers != sorted(set(layers)) or layers[0] < 0 or layers[-1] != last:
        raise ValueError(
            f"output layers {layers} must ascend and end with the last layer, {last}: nothing "
            "reads what comes after them"
        )
    model.head, model.num_classes = head, num_classes
    for name in ("neck", "norm_neck"):  # MambaReg's, in front of a classifier
        if hasattr(model, name):
            delattr(model, name)
    model.norm_f.requires_grad_(False)  # no map has passed it
    model.reduction.freezes = True
    return model
