"""Flags and small image folders for the tests of the data sets."""

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import add_augmentation_arguments, add_data_arguments


def options(*flags: str, seed: int = 0) -> argparse.Namespace:
    """The parsed data flags; no workers and batches of 4 unless the flags say otherwise."""
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    args = parser.parse_args(["--num-workers", "0", "--batch-size", "4", *flags])
    args.seed = seed
    return args


def photo(size: tuple[int, int] = (40, 30), seed: int = 0) -> Image.Image:
    """A smooth random RGB image: noise would show little of what a decoder or a rotation does."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def make_folders(root: Path, classes=("cat", "dog"), train: int = 8, val: int = 3) -> Path:
    """root/{train,val}/CLASS/N.jpg"""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                photo(seed=100 * label + number).save(folder / f"{number}.jpg")
    return root
