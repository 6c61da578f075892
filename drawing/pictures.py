"""Pictures of a model's decisions for an image, exact to the pixel: patches kept per stage.

M patches on a grid, k kept patches, S stages, n class or register tokens, B images; H, W pixels.
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
from .palette import ACCENT, BLUE, FAINT, GRID, INK, MUTED, ORANGE, PAPER, rgb

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


def _by_image(groups: Sequence[Tensor], kept: Sequence[Tensor]) -> list[list[np.ndarray | None]]:
    """Groups [M] of each image and stage; None where nothing is merged."""
    if not groups:
        return [[None] * len(stage) for stage in kept]
    return [list(stage.cpu().numpy()) for stage in groups]


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


# Strips: one picture an image

CURVE_HEIGHT = 40  # of the patches kept of each frame, in units
PANEL_SIDE = 256  # smaller images are enlarged by a whole factor
MAX_SIDE = 2048  # larger ones are reduced, so that a strip fits in memory


class _Layout(NamedTuple):
    """Sizes of a strip, in pixels."""

    scale: int  # whole factor by which a small image is enlarged
    width: int  # of a panel
    height: int
    unit: float  # all type and lines are multiples of it
    in_row: bool  # panels side by side; else below each other, for wide images


def strip_layout(size: tuple[int, int]) -> _Layout:
    """The layout of the strip of an image of `size` (width, height)."""
    longest = max(size)
    scale = -(-PANEL_SIDE // longest)
    width, height = size[0] * scale, size[1] * scale
    return _Layout(scale, width, height, max(width, height) / PANEL_SIDE, width <= 1.6 * height)


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


def draw_strip(
    image: Image.Image, region: tuple[float, float, float, float], model, report: ImageReport
) -> Image.Image:
    """Input, tokens left after each stage, gates, likeliest classes and cost of one image.

    image: the original, at its own resolution up to MAX_SIDE; region: the part that the model sees.
    """
    image, region = within(image, region, MAX_SIDE)
    layout = strip_layout(image.size)
    pixels = np.asarray(image).repeat(layout.scale, axis=0).repeat(layout.scale, axis=1)
    region = tuple(layout.scale * side for side in region)
    patch_of = patch_of_pixels(model.patch_embed, (layout.width, layout.height), region)
    panels = [pixels, *(stage_pixels(pixels, patch_of, *stage) for stage in report.stages())]
    u = layout.unit
    curve = CURVE_HEIGHT if model.patch_embed.slots > 1 else 0
    margin, below, info_width, info_height = (
        round(side * u) for side in (12, 52 + curve, 300, 244)
    )
    panel_width = max(layout.width, round(130 * u))
    step = (panel_width + margin, 0) if layout.in_row else (0, layout.height + below)
    if layout.in_row:
        origin = (len(panels) * step[0] + 2 * margin, margin)
        canvas = (origin[0] + info_width + margin, max(layout.height + below, info_height) + margin)
    else:
        origin = (margin, len(panels) * step[1] + 2 * margin)
        canvas = (max(panel_width, info_width) + 2 * margin, origin[1] + info_height + margin)
    picture = Image.new("RGB", canvas, rgb(PAPER))
    draw = ImageDraw.Draw(picture)
    sequence = [np.arange(model.num_patches), *report.kept]
    for index, (panel, kept) in enumerate(zip(panels, sequence, strict=True)):
        x, y = margin + index * step[0], margin + index * step[1]
        picture.paste(Image.fromarray(panel), (x, y))
        captions = [f"input: {len(kept)} patches"]
        if index:
            layer, left = report.pruning_layers[index - 1], f"{len(kept)} of {model.num_patches}"
            frozen = model.num_patches - len(kept) if model.reduction.freezes else 0
            more = f", {frozen} frozen" if frozen and not report.groups else ""
            captions = [
                f"stage {index}, before layer {layer}: {left} patches{more}",
                f"stage {index}: {left} patches{more}",
                f"stage {index}: {left}{more}",
            ]
        _draw_caption(draw, (x, y + layout.height), panel_width, u, captions, kept, model)
    _draw_info(draw, origin, info_width, u, report, _legend(model))
    return picture


def _legend(model) -> dict[str, str]:
    """What the bars below the panels show, with the colours."""
    marks = {"▼ class tokens": ACCENT} if class_marks(np.arange(model.num_patches), model) else {}
    without = "■ frozen" if model.reduction.freezes else "■ dropped"
    if model.reduction.merges:
        without = "■ merged"
    return marks | {"■ kept": BLUE, without: GRID}


def class_marks(kept: np.ndarray, model) -> list[float]:
    """Positions of the class tokens among the kept patches [k], on a scale 0 ... M."""
    ends = np.append(kept, model.num_patches)
    return [
        float(ends[position - i]) for i, position in enumerate(model.layout.class_slots(len(kept)))
    ]


def _draw_caption(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    width: int,
    u: float,
    captions: list[str],
    kept: np.ndarray,
    model,
) -> None:
    """Below a panel: the longest caption that fits, and the sequence with its class tokens."""
    x, y = corner
    plain = font(10.5 * u)
    total = model.num_patches
    caption = next(
        (text for text in captions if draw.textlength(text, plain) <= width), captions[-1]
    )
    draw.text((x, y + 6 * u), fitted(draw, caption, plain, width), rgb(INK), plain)
    top, bottom = y + 30 * u, y + 40 * u
    alive = np.zeros(total, dtype=bool)
    alive[kept] = True
    places = (np.arange(width) * total) // width
    for column, place in enumerate(places):
        draw.line((x + column, top, x + column, bottom), rgb(BLUE if alive[place] else GRID))
    for mark in class_marks(kept, model):
        at = x + mark / total * width
        draw.line((at, top, at, bottom), rgb(ACCENT), max(1, round(1.6 * u)))
        draw.polygon(
            [(at - 3.4 * u, top - 6 * u), (at + 3.4 * u, top - 6 * u), (at, top)], rgb(ACCENT)
        )
    if model.patch_embed.slots > 1:
        box = (x, y + 46 * u, x + width, y + (46 + CURVE_HEIGHT - 8) * u)
        draw_curve(draw, box, per_slot(kept, model.patch_embed), model.patch_embed, u)


def per_slot(kept: np.ndarray, patches: PatchEmbed) -> np.ndarray:
    """How many patches of each slot [S] are among the kept ones [k]."""
    return np.bincount(np.asarray(kept, int) // math.prod(patches.plane), minlength=patches.slots)


def draw_curve(
    draw: ImageDraw.ImageDraw,
    box: tuple[float, float, float, float],
    counts: np.ndarray,
    patches: PatchEmbed,
    u: float,
    marked: int | None = None,
) -> None:
    """Patches kept of each slot, as steps, with their numbers where there is room; one may be
    marked.
    """
    left, top, right, bottom = box
    step, small = (right - left) / len(counts), font(8.5 * u)
    numbered = draw.textlength(str(counts.max()), small) < step
    head = top + 11 * u  # numbers above the steps
    for slot, count in enumerate(counts):
        x, y = left + slot * step, bottom - (bottom - head) * count / math.prod(patches.plane)
        fill = rgb(ACCENT if slot == marked else BLUE)
        draw.rectangle((x, head, x + step, bottom), rgb(FAINT))
        draw.rectangle((x, y, x + step, bottom), fill)
        if numbered:
            draw.text((x + step / 2, top), str(count), rgb(MUTED), small, anchor="ma")


def _draw_info(
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    width: int,
    u: float,
    report: ImageReport,
    legend: dict[str, str],
) -> None:
    """Name, likeliest classes, gates and cost of an image; a legend of texts with colours."""
    x, y = corner
    bold, plain, small = font(12 * u, bold=True), font(10.5 * u), font(9 * u)
    draw.text((x, y), fitted(draw, report.name, bold, width), rgb(INK), bold)
    for rank, (name, probability) in enumerate(report.classes):
        top = y + (24 + 19 * rank) * u
        full = width - 52 * u
        draw.rectangle((x, top, x + full, top + 15 * u), rgb(FAINT))
        draw.rectangle((x, top, x + full * probability, top + 15 * u), rgb("#b9d3ee"))
        draw.text(
            (x + 5 * u, top + 1 * u), fitted(draw, name, plain, full - 8 * u), rgb(INK), plain
        )
        draw.text(
            (x + width, top + 1 * u), f"{100 * probability:.1f} %", rgb(INK), plain, anchor="ra"
        )
    top = y + 128 * u
    if report.gates is None:
        draw.text((x, top), "no gates: this model scans every layer both ways", rgb(MUTED), small)
    else:
        on = report.gates.mean(axis=0)
        text = f"scans kept by layer: forward {100 * on[0]:.0f} %, backward {100 * on[1]:.0f} %"
        draw.text((x, top), text, rgb(INK), plain)
        _draw_gates(draw, (x, top + 18 * u), width, u, report)
    top = y + 194 * u
    share = report.flops / report.dense_flops
    draw.text((x, top), f"{flops_text(report.flops)} (exact)", rgb(INK), plain)
    draw.text((x + width, top), f"{100 * share:.0f} % of dense", rgb(INK), plain, anchor="ra")
    draw.rectangle((x, top + 17 * u, x + width, top + 25 * u), rgb(GRID))
    draw.rectangle((x, top + 17 * u, x + width * share, top + 25 * u), rgb(BLUE))
    for part, colour in legend.items():
        draw.text((x, top + 33 * u), part[0], rgb(colour), small)
        draw.text((x + 11 * u, top + 33 * u), part[2:], rgb(MUTED), small)
        x += 26 * u + draw.textlength(part, small)


def _draw_gates(
    draw: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    width: int,
    u: float,
    report: ImageReport,
) -> None:
    """Two rows of cells, forward above backward, one column per layer; filled if the scan ran."""
    x, y = corner
    small = font(8.5 * u)
    left = 12 * u
    cell = (width - left) / len(report.gates)
    gap = min(2 * u, 0.2 * cell)
    for direction, (arrow, colour) in enumerate((("→", BLUE), ("←", ORANGE))):
        top = y + 16 * u * direction
        draw.text((x, top), arrow, rgb(colour), small)
        for layer, gate in enumerate(report.gates[:, direction]):
            box = (x + left + layer * cell, top, x + left + (layer + 1) * cell - gap, top + 12 * u)
            draw.rectangle(
                box,
                rgb(colour) if gate > 0.5 else rgb(PAPER),
                rgb(colour) if gate > 0.5 else rgb(GRID),
            )
    for layer in report.pruning_layers:  # a stage drops tokens before this layer
        at = x + left + layer * cell - gap / 2
        draw.line((at, y - 2 * u, at, y + 30 * u), rgb(INK), max(1, round(u)))
