"""Contact sheets: many images on few pages, each next to what the last stage kept of it."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from utils.files import atomic_file

from .groups import stage_pixels
from .palette import GRID, INK, MUTED, PAPER, rgb
from .pictures import ImageReport, fitted, font, patch_of_pixels, within

COLUMNS, ROWS = 4, 8
SIDE = 128  # of a thumbnail, in pixels
MARGIN, CAPTION = 14, 34


class ContactSheets:
    """Pages `contact_sheet.png`, `contact_sheet_2.png`, ..., each written once it is full."""

    def __init__(self, output: Path):
        self.output, self.pages, self.cells = output, 0, 0
        self.width, self.height = 2 * SIDE + 2 + MARGIN, SIDE + CAPTION + MARGIN
        self._page = Image.new("RGB", (0, 0))

    def add(
        self, image: Image.Image, region: tuple[float, ...], model, report: ImageReport
    ) -> None:
        """Add an image: itself, what the last stage kept of it, its class and its cost."""
        if self.cells == 0:
            size = (COLUMNS * self.width + MARGIN, ROWS * self.height + MARGIN)
            self._page = Image.new("RGB", size, rgb(PAPER))
        row, column = divmod(self.cells, COLUMNS)
        x, y = MARGIN + column * self.width, MARGIN + row * self.height
        for thumb in self._thumbs(image, region, model, report):
            self._page.paste(thumb, (x + (SIDE - thumb.width) // 2, y + (SIDE - thumb.height) // 2))
            x += SIDE + 2
        self._caption(MARGIN + column * self.width, y + SIDE + 4, report)
        self.cells += 1
        if self.cells == COLUMNS * ROWS:
            self._write()

    def close(self) -> None:
        """Write the last page, cropped to its content."""
        if self.cells:
            rows = -(-self.cells // COLUMNS)
            columns = min(self.cells, COLUMNS)
            self._page = self._page.crop(
                (0, 0, columns * self.width + MARGIN, rows * self.height + MARGIN)
            )
            self._write()

    def _thumbs(
        self, image: Image.Image, region: tuple[float, ...], model, report: ImageReport
    ) -> list[Image.Image]:
        image, region = within(image, region, SIDE)
        scale = max(1, SIDE // max(image.size))
        image = image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST)
        if not report.kept:
            return [image]
        patch_of = patch_of_pixels(
            model.patch_embed, image.size, tuple(scale * side for side in region)
        )
        return [
            image,
            Image.fromarray(stage_pixels(np.asarray(image), patch_of, *report.stages()[-1])),
        ]

    def _caption(self, x: float, y: float, report: ImageReport) -> None:
        draw = ImageDraw.Draw(self._page)
        width = 2 * SIDE + 2
        answer = "".join(f"{name}  {100 * share:.0f} %" for name, share in report.classes[:1])
        bold, plain = font(11, bold=True), font(10)
        share = f"{100 * report.flops / report.dense_flops:.0f} % of dense"
        draw.text((x, y), fitted(draw, answer, bold, width - 90), rgb(INK), bold)
        draw.text((x + width, y), share, rgb(INK), plain, anchor="ra")
        draw.text((x, y + 15), fitted(draw, report.name, plain, width), rgb(MUTED), plain)
        draw.line((x, y + 32, x + width, y + 32), rgb(GRID))

    def _write(self) -> None:
        self.pages, self.cells = self.pages + 1, 0
        name = "contact_sheet.png" if self.pages == 1 else f"contact_sheet_{self.pages}.png"
        with atomic_file(self.output / name) as file:
            self._page.save(file, format="PNG")
