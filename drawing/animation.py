"""Clips in motion: each frame beside what every stage of the model keeps of it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from utils.files import atomic_file

from .groups import stage_pixels
from .palette import INK, MUTED, PAPER, rgb
from .pictures import ImageReport, fitted, flops_text, font, patch_of_frame, to_pixels
from .strips import draw_curve, per_slot

SIDE = 160  # of a frame
SECONDS = 3.2  # of a whole clip; each frame is shown for at least a tenth of a second
MARGIN, TITLE, CAPTION, CURVE = 12, 24, 20, 46  # pixels


def animate(clip: Tensor, model, report: ImageReport) -> list[Image.Image]:
    """A picture for each frame of a clip [3, T, H, W], normalised: the frame, the same after each
    stage (see `stage_pixels`), and below them the patches kept of all frames.
    """
    patches = model.patch_embed
    frames = _sized(to_pixels(clip.transpose(0, 1)))
    height, width = frames.shape[1:3]
    sequence = [(np.arange(model.num_patches), None), *report.stages()]
    canvas = (
        MARGIN + len(sequence) * (width + MARGIN),
        TITLE + height + CAPTION + CURVE + 2 * MARGIN,
    )
    pictures = []
    for number, frame in enumerate(frames):
        slot = number * patches.slots // len(frames)
        picture = Image.new("RGB", canvas, rgb(PAPER))
        draw = ImageDraw.Draw(picture)
        _title(draw, canvas[0], report)
        for stage, (kept, groups) in enumerate(sequence):
            x, y = MARGIN + stage * (width + MARGIN), MARGIN + TITLE
            patch_of = patch_of_frame(patches, (width, height), slot)
            shown = stage_pixels(frame, patch_of, kept, groups)
            picture.paste(Image.fromarray(shown), (x, y))
            counts = per_slot(kept, patches)
            text = f"stage {stage}: {counts[slot]} of {counts.sum()}"
            if not stage:
                text = f"frame {number + 1} of {len(frames)}"
            draw.text((x, y + height + 3), text, rgb(INK), font(11))
            top = y + height + CAPTION
            draw_curve(draw, (x, top, x + width, top + CURVE - 4), counts, patches, 1.0, slot)
        pictures.append(picture)
    return pictures


def _sized(frames: np.ndarray) -> np.ndarray:
    """Frames [T, H, W, 3] enlarged by a whole factor to SIDE or a little more, or reduced to it."""
    height, width = frames.shape[1:3]
    longest = max(height, width)
    if longest <= SIDE:
        scale = -(-SIDE // longest)
        return frames.repeat(scale, axis=1).repeat(scale, axis=2)
    size = max(1, width * SIDE // longest), max(1, height * SIDE // longest)
    pictures = (Image.fromarray(frame).resize(size, Image.Resampling.BOX) for frame in frames)
    return np.stack([np.asarray(picture) for picture in pictures])


def _title(draw: ImageDraw.ImageDraw, width: int, report: ImageReport) -> None:
    answer = "".join(f": {name} {100 * share:.0f} %" for name, share in report.classes[:1])
    cost = f"{flops_text(report.flops)}, {100 * report.flops / report.dense_flops:.0f} % of dense"
    small = font(11)
    room = width - 3 * MARGIN - draw.textlength(cost, small)
    bold = font(12, bold=True)
    draw.text((MARGIN, MARGIN - 2), fitted(draw, report.name + answer, bold, room), rgb(INK), bold)
    draw.text((width - MARGIN, MARGIN), cost, rgb(MUTED), small, anchor="ra")


def save_animation(pictures: list[Image.Image], path: Path) -> None:
    """Write a GIF that runs for ever, atomically."""
    pause = max(100, round(1000 * SECONDS / len(pictures)))
    # One palette for all pictures, so that what stands still does not flicker.
    colours = pictures[len(pictures) // 2].quantize(256, Image.Quantize.MEDIANCUT)
    first, *others = (picture.quantize(palette=colours) for picture in pictures)
    with atomic_file(path) as file:
        first.save(file, format="GIF", save_all=True, append_images=others, duration=pause, loop=0)
