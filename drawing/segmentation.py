"""Label maps over their images, with legends; truth beside prediction.

H, W pixels, C classes. Labels are class indices, `IGNORED` where there is none.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from loading.masks import IGNORED

from .class_colours import UNLABELLED, label_colours
from .palette import ACCENT, INK, MUTED, PAPER, rgb
from .pictures import fitted, font, within
from .strips import MAX_SIDE, strip_layout

OPACITY = 0.55  # of a label's colour over the image
WRONG = 0.8  # opacity of what marks a wrong pixel
PALE = 0.35  # contrast of an image that is background only
COMPARED_SIDE = 512  # pixels of a panel; larger images are reduced
LEGEND_ROWS = 10
NO_CLASS = "no class"


def overlay(
    image: np.ndarray, labels: np.ndarray, border: int = 1, opacity: float = OPACITY
) -> np.ndarray:
    """Labels [H, W] blended over an image [H, W, 3] uint8 in grey -> [H, W, 3] uint8.

    In grey, so that the hues are those of the labels alone. On both sides of a border between
    labels, `border` pixels have the label's full colour. Ignored pixels are hatched.
    """
    share = np.where(borders(labels, border), 1, opacity)[..., None]
    pixels = _grey(image) * (1 - share) + label_colours()[labels] * share
    return hatched(pixels, labels == IGNORED, border)


def borders(labels: np.ndarray, width: int = 1) -> np.ndarray:
    """Whether another label lies within `width` pixels in the row or column: [H, W] bool."""
    found = np.zeros(labels.shape, dtype=bool)
    for seen, values in ((found, labels), (found.T, labels.T)):
        for distance in range(1, min(width, len(values) - 1) + 1):
            differs = values[distance:] != values[:-distance]
            seen[distance:] |= differs
            seen[:-distance] |= differs
    return found


def hatched(pixels: np.ndarray, mask: np.ndarray, width: int = 1) -> np.ndarray:
    """[H, W, 3] with diagonal lines over pale grey where `mask` [H, W] -> uint8."""
    rows, columns = np.indices(mask.shape, sparse=True)
    line = (rows + columns) // (2 * width) % 4 == 0
    ground = np.where(line[..., None], UNLABELLED, _pale(pixels))
    return np.where(mask[..., None], ground, pixels).round().astype(np.uint8)


def _grey(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W, 1], Rec. 601 luma."""
    return pixels @ np.array([[0.299], [0.587], [0.114]])


def _pale(pixels: np.ndarray) -> np.ndarray:
    """[H, W, 3] -> [H, W, 1] in grey that fades into white."""
    return 255 - PALE * (255 - _grey(pixels))


def errors(
    image: np.ndarray, truth: np.ndarray, prediction: np.ndarray, width: int = 1
) -> np.ndarray:
    """Wrong pixels in one colour over the image in pale grey; ignored ones hatched: uint8."""
    pixels = _pale(image)
    wrong = (prediction != truth)[..., None]
    pixels = np.where(wrong, (1 - WRONG) * pixels + WRONG * np.array(rgb(ACCENT)), pixels)
    return hatched(pixels, truth == IGNORED, width)


def error_share(truth: np.ndarray, prediction: np.ndarray) -> float | None:
    """Share of the labelled pixels whose prediction is wrong; None without labelled pixels."""
    labelled = truth != IGNORED
    return (prediction != truth)[labelled].mean().item() if labelled.any() else None


def label_shares(labels: np.ndarray) -> np.ndarray:
    """Share of the pixels [256] of each label, `IGNORED` included."""
    return np.bincount(labels.reshape(-1), minlength=IGNORED + 1) / labels.size


class LegendRow(NamedTuple):
    label: int
    name: str
    shares: tuple[float, ...]  # of the pixels, in each of the label maps


def legend_rows(
    maps: Sequence[np.ndarray], names: Sequence[str], limit: int = LEGEND_ROWS
) -> tuple[list[LegendRow], int]:
    """The classes that occur in label maps [H, W], the largest in the first map first; -> at most
    `limit` of them, and how many more there are.

    Ignored pixels come last, in a row beyond the limit.
    """
    shares = np.stack([label_shares(labels) for labels in maps])
    occurring = np.flatnonzero(shares[:, :IGNORED].any(axis=0)).tolist()
    occurring.sort(key=lambda label: (*-shares[:, label], label))
    shown = occurring[:limit]
    rows = [LegendRow(label, names[label], tuple(shares[:, label].tolist())) for label in shown]
    if shares[:, IGNORED].any():
        rows.append(LegendRow(IGNORED, NO_CLASS, tuple(shares[:, IGNORED].tolist())))
    return rows, len(occurring) - len(shown)


def label_map(labels: np.ndarray) -> Image.Image:
    """Labels [H, W] as an image in palette mode: its values are the labels, shown in colour."""
    image = Image.fromarray(labels.astype(np.uint8), "L")
    image.putpalette(label_colours().tobytes())  # now in mode P
    return image


def draw_overlay(
    image: Image.Image, labels: np.ndarray, names: Sequence[str], title: str
) -> Image.Image:
    """An image with its labels [H, W] of the same size over it, and their legend.

    Small images are enlarged by a whole factor, large ones reduced to MAX_SIDE.
    """
    legend = legend_rows([labels], names)
    pixels, [labels], layout = _sized(image, [labels], MAX_SIDE)
    canvas = _Canvas(layout, columns=1, rows=1, legend=legend, title=title)
    canvas.panel(0, overlay(pixels, labels, _line(layout.unit)))
    canvas.legend(legend, ())
    return canvas.picture


def draw_comparison(
    image: Image.Image, truth: np.ndarray, prediction: np.ndarray, names: Sequence[str], title: str
) -> Image.Image:
    """Image, truth, prediction and error in four panels; truth and prediction [H, W] of its size.

    Shares are those of all pixels, also where the panels are reduced.
    """
    legend = legend_rows([truth, prediction], names)
    share = error_share(truth, prediction)
    wrong = "no labels" if share is None else f"wrong: {100 * share:.1f} %"
    pixels, [truth, prediction], layout = _sized(image, [truth, prediction], COMPARED_SIDE)
    line = _line(layout.unit)
    panels = {
        "image": pixels,
        "truth": overlay(pixels, truth, line),
        "prediction": overlay(pixels, prediction, line),
        wrong: errors(pixels, truth, prediction, line),
    }
    columns, rows = (4, 1) if layout.in_row else (2, 2)
    canvas = _Canvas(layout, columns, rows, legend, title)
    for index, (caption, panel) in enumerate(panels.items()):
        canvas.panel(index, panel, caption)
    canvas.legend(legend, ("truth", "predicted"))
    return canvas.picture


def _line(unit: float) -> int:
    return max(1, round(unit / 2))


def _sized(image: Image.Image, maps: Sequence[np.ndarray], side: int):
    """An image and label maps of its size as arrays in the size of a panel, and its layout."""
    for labels in maps:
        if labels.shape != image.size[::-1]:
            raise ValueError(f"labels of {labels.shape} for an image of {image.size[::-1]}")
    reduced, _ = within(image, (0, 0, 0, 0), side)
    if reduced.size != image.size:
        maps = [
            np.asarray(Image.fromarray(labels).resize(reduced.size, Image.Resampling.NEAREST))
            for labels in maps
        ]
    layout = strip_layout(reduced.size)
    pixels, *maps = (
        part.repeat(layout.scale, axis=0).repeat(layout.scale, axis=1)
        for part in (np.asarray(reduced.convert("RGB")), *maps)
    )
    return pixels, maps, layout


class _Canvas:
    """Panels on a grid, and to the right of them a title and a legend."""

    def __init__(self, layout, columns: int, rows: int, legend, title: str):
        self.unit = u = layout.unit
        self.columns = columns
        self.margin, self.caption = round(12 * u), round(24 * u)
        self.size = layout.width, layout.height
        self.cell = max(layout.width, round(90 * u)) + self.margin, layout.height + self.caption
        lines = len(legend[0]) + bool(legend[1])
        self.side = round(250 * u)
        height = max(rows * self.cell[1], round((44 + 18 * lines) * u))
        size = (columns * self.cell[0] + self.side + 3 * self.margin, height + 2 * self.margin)
        self.picture = Image.new("RGB", size, rgb(PAPER))
        self.draw = ImageDraw.Draw(self.picture)
        self.left = columns * self.cell[0] + 2 * self.margin
        bold = font(12 * u, bold=True)
        title = fitted(self.draw, title, bold, self.side)
        self.draw.text((self.left, self.margin), title, rgb(INK), bold)

    def panel(self, index: int, pixels: np.ndarray, caption: str = "") -> None:
        row, column = divmod(index, self.columns)
        x, y = self.margin + column * self.cell[0], self.margin + row * self.cell[1]
        self.picture.paste(Image.fromarray(pixels), (x, y))
        plain = font(10.5 * self.unit)
        caption = fitted(self.draw, caption, plain, self.cell[0] - self.margin)
        self.draw.text((x, y + self.size[1] + 5 * self.unit), caption, rgb(INK), plain)

    def legend(self, legend: tuple[list[LegendRow], int], headers: Sequence[str]) -> None:
        """Swatch, name and shares of each class; `headers` over the shares."""
        (rows, more), u = legend, self.unit
        plain, small = font(10.5 * u), font(9 * u)
        ends = [self.left + self.side - 62 * u * place for place in range(len(rows[0].shares))]
        ends.reverse()
        top = self.margin + 22 * u
        for header, end in zip(headers, ends, strict=False):
            self.draw.text((end, top), header, rgb(MUTED), small, anchor="ra")
        top += 14 * u if headers else 2 * u
        for row in rows:
            self._swatch(row.label, self.left, top)
            width = ends[0] - 50 * u - self.left - 20 * u
            name = fitted(self.draw, row.name, plain, width)
            self.draw.text((self.left + 20 * u, top), name, rgb(INK), plain)
            for share, end in zip(row.shares, ends, strict=True):
                text = _percent(share)
                self.draw.text((end, top), text, rgb(INK if share else MUTED), plain, anchor="ra")
            top += 18 * u
        if more:
            text = f"and {more} more"
            self.draw.text((self.left + 20 * u, top), text, rgb(MUTED), plain)

    def _swatch(self, label: int, x: float, y: float) -> None:
        side = round(13 * self.unit)
        pixels = np.broadcast_to(label_colours()[label], (side, side, 3))
        mask = np.full((side, side), label == IGNORED)
        square = Image.fromarray(hatched(pixels, mask, _line(self.unit)))
        self.picture.paste(square, (round(x), round(y)))


def _percent(share: float) -> str:
    """A share of the pixels; one that is not nought does not look like it."""
    if not share:
        return "–"
    return f"{100 * share:.1f} %" if share >= 0.0005 else "< 0.1 %"
