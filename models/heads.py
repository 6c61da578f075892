"""Heads that read feature maps, for dense prediction."""

from collections.abc import Sequence

from torch import Tensor, nn

from .tokens import FeatureMaps


class MapHead(nn.Module):
    """A head that reads feature maps instead of one pooled vector.

    Args:
        layers: of the backbone after which the maps are taken, ascending.
        features: what they show, see `FeatureMaps`.
    """

    def __init__(self, layers: Sequence[int], features: str):
        super().__init__()
        if features not in FeatureMaps.KINDS:
            raise ValueError(f"features {features!r} must be one of {', '.join(FeatureMaps.KINDS)}")
        self.layers, self.features = tuple(layers), features
        self.operations: int | None = None  # kept by `flops.decoder_operations`

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """Maps [B, d, h, w] in the order of `layers` -> logits [B, C, ...] and, in training, those
        of an auxiliary head or None.
        """
        raise NotImplementedError
