"""Label maps: PNG files of class indices, decoded to the numbers that were written, and paired with
their images.
"""

import os
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torchvision.tv_tensors import Mask

from utils.errors import UserError, printable

from .depth import Range
from .images import (
    BadImageError,
    Example,
    ImageSet,
    decode,
    decode_stored,
    deep_files,
    file_range,
    read_file,
    upright,
)

IGNORED = 255  # the class index of pixels without a class
_BEYOND = 256  # the last place in a table of labels, for all values above 255
_PNG = b"\x89PNG\r\n\x1a\n"


def decode_labels(file: BinaryIO) -> np.ndarray:
    """The values [H, W] in a PNG, as integers of any width, or `BadImageError`.

    A palette's indices, not its colours; grey of 1, 2, 4, 8 or 16 bits as written. A colour image
    is a label map only if its channels are equal. Transparency is dropped.
    """
    header = file.read(25)
    file.seek(0)
    bits = header[24] if header.startswith(_PNG) and len(header) == 25 else 8
    return decode(file, lambda stored: _to_labels(stored.loaded(), bits))


def _to_labels(image: Image.Image, bits: int) -> np.ndarray:
    if image.format != "PNG":
        raise BadImageError(f"a {image.format} file; a label map must be a PNG")
    values = np.asarray(image)
    if bits == 16 and not image.mode.startswith("I"):  # Pillow drops the lower 8 bits
        raise BadImageError("16-bit colour or transparency; a label map must have one channel")
    if values.ndim == 3:
        colours = values[..., : 3 if values.shape[2] >= 3 else 1]
        if (colours != colours[..., :1]).any():
            raise BadImageError(
                "colours (its channels differ) where class indices must be; save it with one "
                "channel or a palette"
            )
        values = colours[..., 0]
    if image.mode == "L" and bits < 8:  # Pillow stretches grey of 2 and 4 bits to 0 ... 255
        values = values // (255 // (2**bits - 1))
    return values.astype(np.uint8) if values.dtype == bool else values


def label_table(source: str, num_classes: int, first: int = 0) -> np.ndarray:
    """Table [257] from a value in a PNG to a class index: `first` is class 0, and so on.

    Values below `first` and 255 become `IGNORED`, all others -1: a mistake.

    Raises:
        UserError: more classes than there are values; `source` is where the names are from.
    """
    if first + num_classes > IGNORED:
        raise UserError(
            f"{printable(source)}: {num_classes} classes; at most {IGNORED - first} are possible, "
            f"since {IGNORED} in a label map means ignored"
        )
    table = np.full(_BEYOND + 1, -1, dtype=np.int16)
    table[:first] = table[IGNORED] = IGNORED
    table[first : first + num_classes] = np.arange(num_classes)
    return table


class MaskedImages(ImageSet):
    """Images with a label map each, in files below `root`.

    An example's target is a `Mask` [H, W] uint8 of class indices, 255 where there is none; the
    image is RGB, upright and of the same size.

    Args:
        pairs: (image, label map), paths relative to `root`.
        table: from the values in the files to class indices, see `label_table`.
    """

    def __init__(
        self, root: str, pairs: list[tuple[str, str]], table: np.ndarray, classes: list[str]
    ):
        super().__init__(None, classes)
        self.root, self.table = os.fsencode(root), table
        # One array of bytes each: see FileImages.
        self.images, self.masks = (
            np.array([os.fsencode(path) for path in paths]) for paths in zip(*pairs, strict=True)
        )

    def __len__(self) -> int:
        return len(self.images)

    def deep_candidates(self) -> np.ndarray:
        return deep_files(self.images)

    def range(self, index: int) -> Range | None:
        return read_file(os.path.join(self.root, self.images[index]), file_range)

    def load(self, index: int) -> Example:
        """An image of any EXIF orientation: its label map, which cannot have one, may have been
        drawn on the stored pixels or on the upright image. Its size tells; where both fit (a square
        image, or one upside down), the stored pixels count, as for libraries that read arrays.
        """
        path = os.path.join(self.root, self.images[index])
        stored, orientation = read_file(path, partial(decode_stored, depth=self.depth))
        image = upright(stored, orientation)
        try:
            labels = self._labels(os.path.join(self.root, self.masks[index]))
            size = labels.shape[::-1]
            if size == stored.size:
                labels = np.asarray(upright(Image.fromarray(labels), orientation))
            elif size != image.size:
                raise BadImageError(
                    "{} x {} pixels, but the image has {} x {}".format(*size, *image.size)
                )
        except BadImageError as error:
            name = printable(os.fsdecode(self.masks[index]))
            raise BadImageError(f"its label map {name}: {error}") from None
        return Example(image, Mask(torch.from_numpy(labels.copy())))

    def _labels(self, path: bytes) -> np.ndarray:
        values = read_file(path, decode_labels)
        labels = self.table.take(values, mode="clip")
        mistakes = labels < 0
        if mistakes.any():
            row, column = np.unravel_index(mistakes.argmax(), mistakes.shape)
            last = np.flatnonzero(self.table[:IGNORED] >= 0)[-1]
            raise BadImageError(
                f"value {values[row, column]} in row {row}, column {column}; known are 0 ... "
                f"{last}, and {IGNORED} for ignored"
            )
        return labels.astype(np.uint8)

    def describe(self, index: int) -> str:
        return printable(os.fsdecode(os.path.join(self.root, self.images[index])))
