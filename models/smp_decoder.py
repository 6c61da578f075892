"""Decoders of segmentation_models_pytorch on the maps of a backbone (optional dependency)."""

from collections.abc import Sequence

from torch import Tensor, nn

PREFIX = "smp:"
_ENCODER = "dyvm-maps"


class GivenMaps(nn.Module):
    """What segmentation_models_pytorch takes for an encoder: maps that are there already.

    They stand at strides 4, 8, 16 and 32; at stride 2 there is an empty one, as its transformers
    have it.
    """

    output_stride = 32

    def __init__(self, channels: int, depth: int = 5, **_unused):
        super().__init__()
        self.out_channels = [3, 0, *[channels] * 4]

    def set_in_channels(self, *_unused, **_also) -> None:
        """There is no first convolution to change."""

    def make_dilated(self, output_stride: int) -> None:
        raise ValueError("it needs an encoder whose stride can be changed")


class SmpHead(nn.Module):
    """A decoder by its name there, with its segmentation head.

    [B, d, h_i, w_i] x 4, finest first -> logits [B, C, h, w].

    Raises:
        ValueError: the package is not installed, or has no decoder of this name for such maps.
    """

    def __init__(self, name: str, dim: int, num_classes: int):
        super().__init__()
        try:
            import segmentation_models_pytorch as smp
        except ImportError:
            raise ValueError(
                f"{PREFIX}{name} needs segmentation-models-pytorch: pip install "
                "segmentation-models-pytorch"
            ) from None
        known = smp.MODEL_ARCHITECTURES_MAPPING
        if name not in known:
            raise ValueError(f"smp has no {name!r}; it has {', '.join(sorted(known))}")
        encoders = smp.encoders.encoders
        settings = {"encoder": GivenMaps, "pretrained_settings": {}, "params": {"channels": dim}}
        encoders[_ENCODER] = settings
        try:
            model = smp.create_model(name, _ENCODER, encoder_weights=None, classes=num_classes)
        except ValueError as error:
            raise ValueError(f"{PREFIX}{name} does not take these maps: {error}") from None
        finally:
            del encoders[_ENCODER]
        self.decoder, self.segmentation_head = model.decoder, model.segmentation_head

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        batch, _, height, width = maps[0].shape
        image = maps[0].new_zeros(batch, 3, 4 * height, 4 * width)
        half = maps[0].new_zeros(batch, 0, 2 * height, 2 * width)
        return self.segmentation_head(self.decoder([image, half, *maps]))
