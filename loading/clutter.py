"""CLUTTER: a garment of Fashion-MNIST among cuts of others, and the patches that matter are known.

The label is that of the one whole garment. What a selector keeps of it can be measured, unlike on
photos. S pixels is the side of the canvas.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from utils.errors import UserError

from .arrays import fashion_mnist
from .compositing import zoom
from .images import ArrayImages, ImageSet, LabelledImages, stratified_choice

CANVAS = 56
CANVASES = (56, 96)  # smallest and largest
OBJECT = 24  # side of the garment's square
CUT = 8  # side of a cut, and the grid on which the garment's square lies
CUTS = 14  # of a canvas of 56 pixels; larger ones are covered alike
FAINT = 60  # cuts of a lower mean show nothing
VALIDATION = 2000


class Clutter(LabelledImages):
    """One canvas for each garment; the pixels follow from its number, the split and S alone.

    garments [N, 28, 28] uint8 with their labels; `stream` is the number of the split.
    """

    knows_objects = True

    def __init__(self, garments: ArrayImages, canvas: int, stream: int, name: str):
        super().__init__(garments.labels, garments.classes)
        self.pixels, self.canvas, self.stream, self.name = garments.pixels, canvas, stream, name

    def load_image(self, index: int) -> Image.Image:
        return Image.fromarray(self._compose(index)[0]).convert("RGB")

    def object_mass(self, index: int) -> np.ndarray:
        return self._compose(index)[1]

    def describe(self, index: int) -> str:
        return f"{self.name} image {index}"

    def _compose(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """The image and the garment alone, both [S, S] uint8."""
        random = np.random.RandomState([self.stream, index])
        image, alone = np.zeros((2, self.canvas, self.canvas), np.uint8)
        cuts = round(CUTS * (self.canvas / CANVAS) ** 2)
        while cuts:
            other = self.pixels[random.randint(len(self.pixels))]
            row, column = random.randint(2, other.shape[0] - CUT - 1, 2)
            cut = other[row : row + CUT, column : column + CUT]
            if cut.mean() >= FAINT:
                top, left = random.randint(0, self.canvas - CUT + 1, 2)
                image[top : top + CUT, left : left + CUT] = cut
                cuts -= 1
        top, left = CUT * random.randint(0, (self.canvas - OBJECT) // CUT + 1, 2)
        place = np.s_[top : top + OBJECT, left : left + OBJECT]
        image[place] = alone[place] = zoom(self.pixels[index][1:-1, 1:-1], OBJECT)
        return image, alone


def clutter(path: Path | None, split: str, canvas: int = CANVAS) -> ImageSet:
    """60,000 canvases for training and 2,000 for validation; `canvas` is their side in pixels.

    path: a folder of Fashion-MNIST as `fashion_mnist` takes it.
    """
    try:
        garments = fashion_mnist(path, split)
    except UserError as error:
        raise UserError(f"CLUTTER is made of Fashion-MNIST; {error}") from None
    if split == "val":
        chosen = stratified_choice(garments.labels, min(VALIDATION, len(garments)))
        garments.pixels, garments.labels = garments.pixels[chosen], garments.labels[chosen]
    return Clutter(garments, canvas, ("train", "val").index(split), f"CLUTTER {split}")
