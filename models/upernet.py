"""UPerNet's decoder and the auxiliary head, under mmsegmentation's parameter names.

A plain backbone gives maps of one resolution; `FeaturePyramid` makes four of them, `UPerHead`
decodes these, `FCNHead` looks at one of them in training. Source: "Unified Perceptual Parsing"
(arXiv 1807.10221); the pyramid is BEiT's (arXiv 2106.08254).

B images, d width of the backbone, c channels of the decoder, C classes; h, w the grid of patches.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .batch_norm import BatchNorm2d

POOL_SCALES = (1, 2, 3, 6)


class ConvModule(nn.Module):
    """Convolution without bias, batch norm, ReLU: [B, in, h, w] -> [B, out, h, w]."""

    def __init__(self, inputs: int, outputs: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = BatchNorm2d(outputs)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear: [B, C, h, w] -> [B, C, *size]."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class FeaturePyramid(nn.Module):
    """Four maps [B, d, h, w] -> four resolutions.

    A patch of 16 pixels gives 4, 2, 1 and 1/2 times the grid, one of 8 half and one of 4 a quarter
    of that. `fpn1` and `fpn2` have the parameters.

    Raises:
        ValueError: another patch size.
    """

    def __init__(self, dim: int, patch_size: int):
        super().__init__()
        if patch_size not in (16, 8, 4):
            raise ValueError(f"a feature pyramid needs patches of 16, 8 or 4, not {patch_size}")

        def double() -> nn.ConvTranspose2d:
            return nn.ConvTranspose2d(dim, dim, kernel_size=2, stride=2)

        steps = {
            16: (
                nn.Sequential(double(), BatchNorm2d(dim), nn.GELU(), double()),
                nn.Sequential(double()),
                nn.Identity(),
                nn.MaxPool2d(2),
            ),
            8: (nn.Sequential(double()), nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4)),
            4: (nn.Identity(), nn.MaxPool2d(2), nn.MaxPool2d(4), nn.MaxPool2d(8)),
        }
        self.fpn1, self.fpn2, self.fpn3, self.fpn4 = steps[patch_size]

    def forward(self, maps: Sequence[Tensor]) -> list[Tensor]:
        """Four maps; a single one goes through all four."""
        maps = list(maps) * 4 if len(maps) == 1 else maps
        steps = (self.fpn1, self.fpn2, self.fpn3, self.fpn4)
        return [step(x) for step, x in zip(steps, maps, strict=True)]


class UPerHead(nn.Module):
    """Pooled context on the coarsest of four maps, then top-down to the finest.

    [B, d, h_i, w_i] x 4, finest first -> logits [B, C, h_0, w_0].
    """

    def __init__(self, dim: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(scale), ConvModule(dim, channels, 1))
            for scale in POOL_SCALES
        )
        self.bottleneck = ConvModule(dim + len(POOL_SCALES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1) for _ in range(3))
        self.fpn_convs = nn.ModuleList(ConvModule(channels, channels, 3) for _ in range(3))
        self.fpn_bottleneck = ConvModule(4 * channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        *finer, top = maps
        pooled = [resize(module(top), top.shape[2:]) for module in self.psp_modules]
        context = self.bottleneck(torch.cat([top, *pooled], dim=1))
        laterals = [conv(x) for conv, x in zip(self.lateral_convs, finer, strict=True)]
        above = context
        for i in reversed(range(len(laterals))):
            laterals[i] = above = laterals[i] + resize(above, laterals[i].shape[2:])
        levels = [conv(x) for conv, x in zip(self.fpn_convs, laterals, strict=True)]
        size = levels[0].shape[2:]
        joined = torch.cat([levels[0], *(resize(x, size) for x in (*levels[1:], context))], dim=1)
        return self.conv_seg(self.dropout(self.fpn_bottleneck(joined)))


class LightHead(nn.Module):
    """The four maps projected, resized to the finest and added, then one 3x3 convolution.

    [B, d, h_i, w_i] x 4, finest first -> logits [B, C, h_0, w_0]. For vim_tiny at 512 pixels it has
    a fifteenth of UPerHead's operations, so that what a dynamic backbone saves shows in the whole.
    """

    def __init__(self, dim: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.lateral_convs = nn.ModuleList(ConvModule(dim, channels, 1) for _ in range(4))
        self.bottleneck = ConvModule(channels, channels, 3)
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        levels = [conv(x) for conv, x in zip(self.lateral_convs, maps, strict=True)]
        total = levels[0]
        for level in levels[1:]:
            total = total + resize(level, total.shape[2:])
        return self.conv_seg(self.dropout(self.bottleneck(total)))


class FCNHead(nn.Module):
    """The auxiliary head: one map [B, d, h, w] -> logits [B, C, h, w]."""

    def __init__(self, dim: int, channels: int, num_classes: int, dropout: float = 0.1):
        super().__init__()
        self.convs = nn.Sequential(ConvModule(dim, channels, 3))
        self.dropout = nn.Dropout2d(dropout)
        self.conv_seg = nn.Conv2d(channels, num_classes, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))
