"""A strip for each image: input, patches left after each stage, gates, likeliest classes, cost.

M patches, k kept patches, S slots of a clip; u pixels to a strip's unit.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from models.embedding import PatchEmbed

from .groups import stage_pixels
from .palette import ACCENT, BLUE, FAINT, GRID, INK, MUTED, ORANGE, PAPER, rgb
from .pictures import ImageReport, fitted, flops_text, font, patch_of_pixels, within

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
