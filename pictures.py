"""Pictures of what the model decided: which patches of an image are left after each stage."""

from collections.abc import Sequence

import numpy as np
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor

DIMMED = 0.2  # brightness of a dropped patch
GAP = 2  # pixels between panels


def to_pixels(images: Tensor) -> Tensor:
    """Undo the normalisation: [B, 3, H, W] -> the same in 0 ... 1."""
    mean, std = (images.new_tensor(values)[:, None, None] for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images * std + mean).clamp(0, 1)


def kept_mask(kept: Tensor, num_patches: int) -> Tensor:
    """Indexes of kept patches [B, k] -> [B, num_patches] of 0 and 1."""
    return torch.zeros(len(kept), num_patches, device=kept.device).scatter_(1, kept, 1.0)


def dim_dropped(pixels: Tensor, mask: Tensor) -> Tensor:
    """Darken dropped patches: pixels [B, 3, H, W], mask [B, M] over a square raster grid -> [B, 3, H, W]."""
    side = round(mask.shape[1] ** 0.5)
    brightness = DIMMED + (1 - DIMMED) * mask.reshape(-1, 1, side, side)
    return pixels * torch.nn.functional.interpolate(brightness, size=pixels.shape[-2:], mode="nearest")


def decision_picture(images: Tensor, kept: Sequence[Tensor], num_patches: int, scale: int = 1) -> np.ndarray:
    """One column an image: the image, then the same with the patches dimmed that each stage has dropped.

    images [B, 3, H, W] normalised, kept S x [B, k] -> [height, width, 3] uint8; `scale` enlarges small images.
    """
    pixels = to_pixels(images.float().cpu())
    rows = [pixels, *(dim_dropped(pixels, kept_mask(stage.cpu(), num_patches)) for stage in kept)]
    grid = torch.stack(rows).repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    grid = torch.nn.functional.pad(grid, (0, GAP, 0, GAP), value=1.0)  # [S + 1, B, 3, H', W']
    stages, batch, channels, height, width = grid.shape
    grid = grid.permute(0, 3, 1, 4, 2).reshape(stages * height, batch * width, channels)
    return (grid[:-GAP, :-GAP] * 255).round().to(torch.uint8).numpy()
