"""A data set for segmentation tests, in seconds: coloured rectangles on noise, in several sizes."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ["floor", "red, box", "green box", "blue box", "never"]
IGNORED = 255
SIZES = [(40, 32), (32, 32), (24, 70), (64, 48), (20, 16), (48, 40)]  # width, height


def save_scenes(folder: Path, train: int = 16, val: int = 6) -> Path:
    """A SEG_FOLDER; its second validation image has no labels, the left edge of all has none."""
    random = np.random.RandomState(0)
    for split, count in (("train", train), ("val", val)):
        (folder / "images" / split).mkdir(parents=True)
        (folder / "masks" / split).mkdir(parents=True)
        for number in range(count):
            width, height = SIZES[number % len(SIZES)]
            pixels = random.randint(60, 120, (height, width, 3))
            labels = np.zeros((height, width), np.uint8)
            for label in random.permutation(3)[:2] + 1:
                top, left = random.randint(height // 2), random.randint(width // 2)
                window = slice(top, top + height // 3), slice(left, left + width // 3)
                labels[window] = label
                pixels[window] = np.eye(3)[label - 1] * 200 + 20
            labels[:, :2] = IGNORED
            if split == "val" and number == 1:
                labels[:] = IGNORED
            name = f"{split}/{number:02d}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(folder / "images" / name)
            Image.fromarray(labels).save(folder / "masks" / name)
    (folder / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return folder
