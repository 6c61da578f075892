"""Pictures of a model's decisions for an image, exact to the pixel: patches kept per stage.

M patches on a grid, k kept patches, S stages, B images; H, W pixels.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from models.embedding import PatchEmbed
from utils.files import atomic_file
from utils.images import MEAN, STD

from .groups import stage_pixels
from .palette import INK, PAPER, rgb

STRIP_COLUMNS = 8  # frames of a clip beside each other
GAP = 2  # pixels between the panels of `decision_picture`


def to_pixels(images: Tensor) -> np.ndarray:
    """Undo the normalisation: [B, 3, H, W] -> [B, H, W, 3] uint8."""
    images = images.float().cpu()
    mean, std = (images.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    pixels = (images * std + mean).clamp(0, 1).permute(0, 2, 3, 1)
    return (pixels * 255).round().to(torch.uint8).numpy()


def patch_edges(patches: PatchEmbed, axis: int) -> np.ndarray:
    """Borders [grid + 1] of the rows (axis 0) or columns (1) of patches in the model's pixels.

    Where patches overlap, a pixel belongs to the patch whose centre is nearest.
    """
    size, stride, count = patches.patch_size[axis], patches.stride[axis], patches.plane[axis]
    inner = np.arange(1, count) * stride + (size - stride) / 2
    return np.concatenate([[0.0], inner, [(count - 1) * stride + size]])


def strip_grid(slots: int) -> tuple[int, int]:
    """Rows and columns in which the slots of a clip are shown."""
    columns = min(slots, STRIP_COLUMNS)
    return -(-slots // columns), columns


def filmstrip(clips: Tensor, patches: PatchEmbed) -> Tensor:
    """Clips as pictures: the middle frame of each slot, side by side, in rows of eight.

    [B, 3, T, H, W] -> [B, 3, rows H, columns W]; images [B, 3, H, W] stay.
    """
    if clips.dim() == 4:
        return clips
    shown = clips.unflatten(2, (patches.slots, -1))
    shown = shown[:, :, :, shown.shape[3] // 2]
    rows, columns = strip_grid(patches.slots)
    white = (1 - shown.new_tensor(MEAN)) / shown.new_tensor(STD)
    empty = white[:, None, None, None].expand(
        len(shown), -1, rows * columns - patches.slots, *shown.shape[3:]
    )
    cells = torch.cat([shown, empty], dim=2).unflatten(2, (rows, columns))
    return cells.permute(0, 1, 2, 4, 3, 5).flatten(4).flatten(2, 3)


def patch_of_pixels(
    patches: PatchEmbed,
    size: tuple[int, int],
    region: tuple[float, float, float, float] | None = None,
) -> np.ndarray:
    """Patch index of each pixel of an image or filmstrip [H, W]; -1 where the model sees nothing.

    Args:
        size: width, height of the image.
        region: the part of it that the model sees (`transforms.seen_region`); all of it by default.
    """
    width, height = size
    left, top, right, bottom = region or (0, 0, width, height)

    def cells(axis: int, pixels: int, low: float, high: float, repeats: int = 1) -> tuple:
        """Which of the pictures in a row or column a pixel lies in, and in which of its patches."""
        side = patches.img_size[axis]
        seen = (np.arange(pixels) + 0.5 - low) / (high - low) * side * repeats
        which = np.floor(seen / side).clip(0, repeats - 1).astype(int)
        return which, _patch_at(patches, axis, seen - which * side)

    down, across = strip_grid(patches.slots)
    row, y = (part[:, None] for part in cells(0, height, top, bottom, down))
    column, x = (part[None] for part in cells(1, width, left, right, across))
    slot = row * across + column
    return np.where(slot < patches.slots, _patch_number(patches, slot, y, x), -1)


def patch_of_frame(patches: PatchEmbed, size: tuple[int, int], slot: int) -> np.ndarray:
    """`patch_of_pixels` of a single frame of a clip, at `size` (width, height)."""
    y, x = (
        _patch_at(patches, axis, (np.arange(pixels) + 0.5) * patches.img_size[axis] / pixels)
        for axis, pixels in enumerate(size[::-1])
    )
    return _patch_number(patches, slot, y[:, None], x[None])


def _patch_at(patches: PatchEmbed, axis: int, places: np.ndarray) -> np.ndarray:
    """Row (axis 0) or column (1) of the patches at places in the model's pixels; -1 outside."""
    edges = patch_edges(patches, axis)
    index = np.searchsorted(edges, places, side="right") - 1
    return np.where((places >= 0) & (places < edges[-1]), index, -1)


def _patch_number(patches: PatchEmbed, slot, row, column) -> np.ndarray:
    number = slot * math.prod(patches.plane) + row * patches.plane[1] + column
    return np.where((row >= 0) & (column >= 0), number, -1)


def decision_picture(
    images: Tensor,
    kept: Sequence[Tensor],
    patches: PatchEmbed,
    scale: int = 1,
    groups: Sequence[Tensor] = (),
) -> np.ndarray:
    """One column per image: the image, then what each stage left of it (see `stage_pixels`).

    images [B, 3, H, W] normalised (clips [B, 3, T, H, W]), kept S x [B, k], groups S x [B, M] or
    empty -> [height, width, 3] uint8; `scale` enlarges small images.
    """
    pixels = to_pixels(filmstrip(images, patches))
    height, width = pixels.shape[1:3]
    patch_of = patch_of_pixels(patches, (width, height))
    stages = [
        [
            stage_pixels(image, patch_of, chosen[chosen >= 0].cpu().numpy(), together)
            for image, chosen, together in zip(pixels, stage, merged, strict=True)
        ]
        for stage, merged in zip(kept, _by_image(groups, kept), strict=True)
    ]
    stacked = np.stack([pixels, *stages])  # [S + 1, B, H, W, 3]
    grid = stacked.repeat(scale, axis=2).repeat(scale, axis=3)
    grid = np.pad(grid, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    rows, columns, height, width, channels = grid.shape
    picture = grid.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
    return picture[:-GAP, :-GAP]


def with_row_names(picture: np.ndarray, names: Sequence[str]) -> np.ndarray:
    """A `decision_picture` with a margin to its left, where each row has a name.

    picture [height, width, 3] uint8 -> the same, wider. names: of rows of equal height, from the
    top; one may have several lines.
    """
    typeface, side = font(12), 8
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    margin = max(round(draw.multiline_textbbox((0, 0), name, typeface)[2]) for name in names)
    wide = Image.new("RGB", (picture.shape[1] + margin + 2 * side, len(picture)), rgb(PAPER))
    wide.paste(Image.fromarray(picture), (margin + 2 * side, 0))
    draw, height = ImageDraw.Draw(wide), (len(picture) + GAP) / len(names)
    for row, name in enumerate(names):
        draw.multiline_text((side, round(row * height) + 4), name, rgb(INK), typeface)
    return np.asarray(wide)


def _by_image(groups: Sequence[Tensor], kept: Sequence[Tensor]) -> list[list[np.ndarray | None]]:
    """Groups [M] of each image and stage; None where nothing is merged."""
    if not groups:
        return [[None] * len(stage) for stage in kept]
    return [list(stage.cpu().numpy()) for stage in groups]


def within(
    image: Image.Image, region: tuple[float, ...], side: int
) -> tuple[Image.Image, tuple[float, ...]]:
    """An image and a region of it, reduced so that its longest side is at most `side`."""
    factor = side / max(image.size)
    if factor >= 1:
        return image, region
    size = tuple(max(1, round(length * factor)) for length in image.size)
    x, y = size[0] / image.size[0], size[1] / image.size[1]
    left, top, right, bottom = region
    return image.resize(size, Image.Resampling.LANCZOS), (left * x, top * y, right * x, bottom * y)


class ImageReport(NamedTuple):
    """What the model decided for one image, and its answer."""

    name: str
    classes: list[tuple[str, float]]  # likeliest first, with their probabilities
    kept: list[np.ndarray]  # per stage: [k] original patch indexes, ascending
    gates: np.ndarray | None  # [depth, 2], forward and backward; None where nothing is routed
    flops: float  # `exact`, of this image
    dense_flops: float
    pruning_layers: tuple[int, ...] = ()
    groups: Sequence[np.ndarray] = ()  # per stage: [M], which patch speaks for each; if merged

    def stages(self) -> list[tuple[np.ndarray, np.ndarray | None]]:
        """For `stage_pixels`, of each stage: the kept patches and the groups."""
        return list(zip(self.kept, self.groups or [None] * len(self.kept), strict=True))


def font(size: float, bold: bool = False) -> ImageFont.FreeTypeFont:
    from matplotlib import get_data_path  # whose import takes a while

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return ImageFont.truetype(str(Path(get_data_path()) / "fonts/ttf" / name), max(8, round(size)))


def fitted(
    draw: ImageDraw.ImageDraw, text: str, typeface: ImageFont.FreeTypeFont, width: float
) -> str:
    """`text`, cut off at the end if it is wider than `width`."""
    if draw.textlength(text, typeface) <= width:
        return text
    while text and draw.textlength(text + "…", typeface) > width:
        text = text[:-1]
    return text + "…"


def flops_text(flops: float) -> str:
    """Operations with a unit that keeps them short."""
    unit, factor = ("G", 1e9) if flops >= 1e9 else ("M", 1e6)
    return f"{flops / factor:.2f} {unit}FLOPs"


def save_picture(picture: Image.Image, path: Path) -> None:
    """Write a PNG, atomically."""
    with atomic_file(path) as file:
        picture.save(file, format="PNG", optimize=False, compress_level=4)
