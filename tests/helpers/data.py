"""Flags and small image folders for the tests of the data sets."""

import argparse
import gzip
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import add_augmentation_arguments, add_data_arguments

WIDTH, HEIGHT = 40, 30


def options(*flags: str, seed: int = 0) -> argparse.Namespace:
    """The parsed data flags; no workers and batches of 4 unless the flags say otherwise."""
    parser = argparse.ArgumentParser()
    add_data_arguments(parser)
    add_augmentation_arguments(parser)
    args = parser.parse_args(["--num-workers", "0", "--batch-size", "4", *flags])
    args.seed = seed
    return args


def photo(size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> Image.Image:
    """A smooth random RGB image: noise would show little of what a decoder or a rotation does."""
    coarse = np.random.RandomState(seed).randint(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BILINEAR)


def labels(seed: int, low: int = 0, high: int = 3) -> np.ndarray:
    """[HEIGHT, WIDTH] in squares of 5 pixels, values low ... high - 1, each of them there."""
    coarse = np.random.RandomState(seed).randint(low, high, (HEIGHT // 5, WIDTH // 5))
    coarse.flat[: high - low] = range(low, high)
    return np.kron(coarse, np.ones((5, 5), int)).astype(np.uint8)


def make_folders(root: Path, classes=("cat", "dog"), train: int = 8, val: int = 3) -> Path:
    """root/{train,val}/CLASS/N.jpg"""
    for split, count in (("train", train), ("val", val)):
        for label, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                photo(seed=100 * label + number).save(folder / f"{number}.jpg")
    return root


def write_idx(file: Path, array: np.ndarray) -> None:
    """Bytes in MNIST's format, compressed if the name says so."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    content = header + array.tobytes()
    file.write_bytes(gzip.compress(content) if file.suffix == ".gz" else content)


GARMENTS = 10  # classes


def garments(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bright rectangles of noise in images [count, 28, 28], and their labels, each in turn."""
    random = np.random.RandomState(seed)
    pixels = np.zeros((count, 28, 28), np.uint8)
    for picture in pixels:
        top, left = random.randint(2, 8, 2)
        picture[top:-4, left:-4] = random.randint(60, 256, (24 - top, 24 - left))
    return pixels, (np.arange(count) % GARMENTS).astype(np.uint8)


def save_garments(root: Path, train: int = 40, val: int = 20) -> Path:
    """Files as of Fashion-MNIST."""
    for seed, (prefix, count) in enumerate({"train": train, "t10k": val}.items()):
        pixels, labels = garments(count, seed)
        write_idx(root / f"{prefix}-images-idx3-ubyte.gz", pixels)
        write_idx(root / f"{prefix}-labels-idx1-ubyte.gz", labels)
    return root
