"""Compose small scenes with label maps, to try semantic segmentation in minutes.

    python scripts/seg/scenes.py --output data/scenes [--data-path DIR] [--train 2000] [--val 400] \
        [--size 128] [--seed 0]

Garments of Fashion-MNIST and scikit-learn's digits, tinted, at random places and scales, before a
wall and a floor. The folder has ADE20K's layout: images/{training,validation}/X.png,
annotations/{training,validation}/X.png and classes.txt. A label map holds 1 for the background,
2 ... 11 for the garments and 12 for any digit; 0 (ADE20K's "other") does not occur. Validation
scenes are made of the data sets' own validation parts.

A scene depends on the seed, its split, its number and the size alone. It is computed in integers
and with numpy's RandomState, so every machine makes the same pixels; their PNG files have the same
bytes where Pillow is the same.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from loading.arrays import digits, fashion_mnist
from loading.compositing import GARMENT_EDGE, backdrop, cut_out, over, overlap
from utils import arguments
from utils.errors import UsageError, UserError, printable
from utils.files import prepare_output_dir
from utils.program import run_main

BACKGROUND, FIRST_GARMENT, DIGIT = 1, 2, 12  # values in a label map
SPLITS = {"training": "train", "validation": "val"}
OBJECTS = (3, 6)  # in a scene
SIDES = (28, 72)  # of an object, in pixels
SMALLEST = 32  # scene
DIGIT_EDGE = 96  # intensity at which a digit ends

Pieces = dict[int, np.ndarray]
"""Pictures [N, h, w] uint8 of each kind of object, by its value in a label map."""


def main() -> None:
    args = parse()
    garments = {
        split: fashion_mnist(args.data_path, split) for split in SPLITS.values()
    }  # before anything is written
    output = prepare_output_dir(args.output)
    if any(output.iterdir()):
        raise UserError(
            f"{printable(str(output))} is not empty: give --output a new folder, or empty it"
        )
    for stream, (folder, split) in enumerate(SPLITS.items()):
        pieces = pieces_of(garments[split], digits(None, split))
        for kind in ("images", "annotations"):
            (output / kind / folder).mkdir(parents=True)
        count = {"train": args.train, "val": args.val}[split]
        for number in tqdm(range(count), desc=folder, unit="scene", disable=None):
            image, labels = scene(pieces, args.size, [args.seed, stream, number])
            name = f"{folder}/scene_{number:06}.png"
            Image.fromarray(image).save(output / "images" / name)
            Image.fromarray(labels).save(output / "annotations" / name)
    names = ["background", *garments["train"].classes, "digit"]
    (output / "classes.txt").write_text("\n".join(names) + "\n")
    print(f"{args.train} training and {args.val} validation scenes in {printable(str(output))}")


def parse() -> argparse.Namespace:
    parser = arguments.OneLineParser(
        prog="scripts/seg/scenes.py",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="a new or empty folder")
    parser.add_argument(
        "--data-path",
        type=Path,
        metavar="DIR",
        help="Fashion-MNIST, as of torchvision; default: that of Debian's dataset-fashion-mnist",
    )
    parser.add_argument("--train", type=arguments.positive, default=2000, metavar="N")
    parser.add_argument("--val", type=arguments.positive, default=400, metavar="N")
    parser.add_argument(
        "--size", type=arguments.positive, default=128, help="of a scene in pixels, %(default)s"
    )
    parser.add_argument("--seed", type=arguments.whole, default=0)
    args = parser.parse_args()
    if args.size < SMALLEST:
        raise UsageError(f"--size {args.size}: a scene has at least {SMALLEST} pixels")
    if args.seed >= 2**32:
        raise UsageError(f"--seed {args.seed}: must be below 2^32")
    return args


def pieces_of(garments, digits) -> Pieces:
    """Two image sets (`ArrayImages`) -> the objects of a split."""
    pieces = {
        FIRST_GARMENT + label: garments.pixels[garments.labels == label]
        for label in range(len(garments.classes))
    }
    return pieces | {DIGIT: digits.pixels}


def scene(pieces: Pieces, size: int, seed: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """-> image [size, size, 3] and its labels [size, size], both uint8."""
    random = np.random.RandomState(seed)
    image = backdrop(random, size)
    labels = np.full((size, size), BACKGROUND, np.uint8)
    for value, opacity, colours, top, left in objects(random, pieces, size):
        shadow = random.randint(1, 4)
        over(image, np.zeros(3, np.int64), opacity * 2 // 5, top + shadow, left + shadow)
        over(image, colours, opacity, top, left)
        window, part = overlap(labels, opacity, top, left)
        labels[window][opacity[part] >= 128] = value
    return image.astype(np.uint8), labels


def objects(random: np.random.RandomState, pieces: Pieces, size: int) -> Iterator[tuple]:
    """(value, opacity [s, s] of 256, colours [s, s, 3], top, left) in the order of painting.

    Large ones come first, so that few are hidden altogether. Up to a quarter of one lies outside.
    """
    count = random.randint(OBJECTS[0], OBJECTS[1] + 1)
    sides = random.randint(SIDES[0], min(SIDES[1], size) + 1, count)
    for side in sorted(sides.tolist(), reverse=True):
        value = random.choice(sorted(pieces))
        picture = pieces[value][random.randint(len(pieces[value]))]
        if value != DIGIT and random.randint(2):
            picture = picture[:, ::-1]
        edge = DIGIT_EDGE if value == DIGIT else GARMENT_EDGE
        opacity, colours = cut_out(random, picture, side, edge)
        top, left = random.randint(-(side // 4), size - side + side // 4 + 1, 2).tolist()
        yield value, opacity, colours, top, left


if __name__ == "__main__":
    run_main(main)
