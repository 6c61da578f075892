"""The pixels of an image file as Pillow stores them, and what they look like in 8-bit RGB.

H, W pixels, C channels.
"""

import sys
from typing import BinaryIO

import numpy as np
from PIL import Image

from .depth import Depth, Range, range_of, to_8_bits

# The decoders that Pillow may try, whatever the file's name. Others are risky (EPS runs
# ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF")
_WITH_ALPHA = ("P", "PA", "LA", "La", "RGBa")  # or, of a palette, perhaps


class StoredPixels:
    """The image of an opened file; without the file, the upper 8 bits of colours are all there is.

    Nothing is decoded before it is asked for.
    """

    def __init__(self, file: BinaryIO | None, image: Image.Image):
        self.file, self.image = file, image
        self._raw = _raw_mode(image)

    def loaded(self) -> Image.Image:
        """The image in Pillow's mode for it."""
        self.image.load()
        return self.image

    def deep(self) -> np.ndarray | None:
        """The pixels if they have more than 8 bits a channel: [H, W] or [H, W, C]; else None."""
        mode, channels = self.image.mode, self._raw.partition(";")[0]
        if mode == "F" or mode.startswith("I"):
            return np.asarray(self.image)
        if channels in ("RGB", "RGBX", "RGBA", "LA") and ";16" in self._raw:
            return (np.asarray(self.image).astype(np.uint16) << 8) | self._lower_bytes()
        return None

    def _lower_bytes(self) -> np.ndarray:
        """Pillow keeps the upper bytes of colours of 16 bits. It reads the lower ones where it is
        told the other byte order.
        """
        native = "L" if sys.byteorder == "little" else "B"
        order = self._raw[-1] if self._raw[-1] in "LB" else native
        mode = self._raw.rstrip("LBN") + ("B" if order == "L" else "L")
        grey = self._raw.startswith("LA")
        if grey:  # as if it were 4 channels: upper and lower byte of grey, and of alpha
            mode = "RGBA"
        self.file.seek(0)
        image = Image.open(self.file, formats=FORMATS)
        image.tile = [
            type(tile)(*tile[:3], (mode, *tile[3][1:]) if isinstance(tile[3], tuple) else mode)
            for tile in image.tile
        ]
        image.load()
        lower = np.asarray(image)
        return lower[..., [1, 1, 1, 3]] if grey else lower

    def rgb(self, depth: Depth | None) -> Image.Image:
        """In 8-bit RGB. Raises `UnknownDepth`."""
        image = self.loaded()
        if image.format == "PPM":  # its header tells what is white, and Pillow scales to that
            depth = None
        if image.mode == "F" or image.mode.startswith("I"):
            return Image.fromarray(to_8_bits(self.deep(), depth)).convert("RGB")
        if depth not in (None, 16) and (values := self.deep()) is not None:
            alpha = (values[..., 3:] >> 8).astype(np.uint8)  # always of 16 bits
            image = Image.fromarray(np.dstack([to_8_bits(values[..., :3], depth), alpha]))
        if image.mode in _WITH_ALPHA:
            image = image.convert("RGBA")
        if _is_drawn_in_alpha(image):
            image = _on_contrast(image)
        return image.convert("RGB")

    def range(self) -> Range | None:
        """What it tells of the depth of its data set; None: nothing."""
        if self.image.format != "PPM" and (values := self.deep()) is not None:
            return range_of(values[..., :3] if values.ndim == 3 else values)
        image = self.image.convert("RGBA") if self.image.mode in _WITH_ALPHA else self.image
        return Range(False, 0, 0, drawn=True) if _is_drawn_in_alpha(image) else None


def _raw_mode(image: Image.Image) -> str:
    """How the pixels of an image that is not yet loaded lie in its file, in Pillow's words."""
    found = {
        tile[3][0] if isinstance(tile[3], tuple) and tile[3] else tile[3]
        for tile in getattr(image, "tile", ())
    }
    raw = found.pop() if len(found) == 1 else ""
    return raw if isinstance(raw, str) else ""


def _is_drawn_in_alpha(image: Image.Image) -> bool:
    """Whether an image of mode RGBA shows something through its alpha channel alone."""
    if image.mode != "RGBA":
        return False
    *colours, (clear, opaque) = image.getextrema()
    return opaque - clear >= 128 and all(high - low < 96 for low, high in colours)


def _on_contrast(image: Image.Image) -> Image.Image:
    """An RGBA image of about one colour on white, or on black if it is light."""
    *colours, _ = image.getextrema()
    light = sum(low + high for low, high in colours) > 3 * 255
    ground = Image.new("RGBA", image.size, (0, 0, 0, 255) if light else (255, 255, 255, 255))
    return Image.alpha_composite(ground, image)
