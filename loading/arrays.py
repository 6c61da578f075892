"""Image sets that fit in memory: digits, Fashion-MNIST, CIFAR."""

import gzip
import math
import zlib
from pathlib import Path

import numpy as np
from torchvision.datasets import FashionMNIST

from utils.errors import UserError, first_line, printable

from .images import ArrayImages, ImageSet, stratified_choice

# Where Debian's package dataset-fashion-mnist puts its files.
DEBIAN_FMNIST = Path("/usr/share/datasets/fashion-mnist")


def digits(_path: Path | None, split: str) -> ImageSet:
    """scikit-learn's 1797 digits of 8 x 8 pixels; a fixed stratified fifth is for validation."""
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8)
    chosen = stratified_choice(labels, math.ceil(len(labels) / 5))
    if split == "train":
        chosen = np.setdiff1d(np.arange(len(labels)), chosen)
    names = [str(digit) for digit in np.unique(labels)]
    return ArrayImages(pixels[chosen], labels[chosen], names, f"DIGITS {split}", on_black=True)


def fashion_mnist(path: Path | None, split: str) -> ImageSet:
    prefix = "train" if split == "train" else "t10k"
    pixels = _read_idx(path, f"{prefix}-images-idx3-ubyte")
    labels = _read_idx(path, f"{prefix}-labels-idx1-ubyte")
    if len(pixels) != len(labels) or not len(pixels) or labels.max() >= len(FashionMNIST.classes):
        raise UserError(
            f"FMNIST: images ({len(pixels)}) and labels ({len(labels)}) of {split} do not fit "
            "together"
        )
    return ArrayImages(pixels, labels, FashionMNIST.classes, f"FMNIST {split}", on_black=True)


def _read_idx(path: Path | None, name: str) -> np.ndarray:
    """Read an idx file of bytes, gzipped or not, from Debian's folder or torchvision's layout."""
    folders = (
        [DEBIAN_FMNIST] if path is None else [path, path / "raw", path / "FashionMNIST" / "raw"]
    )
    files = [folder / (name + ending) for folder in folders for ending in (".gz", "")]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        raise UserError(
            f"FMNIST: no {name}[.gz] in {printable(str(folders[0]))}; install Debian's "
            "dataset-fashion-mnist or give --data-path with torchvision's FashionMNIST/raw"
        )
    try:
        content = (gzip.decompress if file.suffix == ".gz" else bytes)(file.read_bytes())
        shape = np.frombuffer(content, ">u4", count=content[3], offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape)).reshape(shape)
    except (OSError, EOFError, ValueError, IndexError, zlib.error) as error:
        raise UserError(f"{printable(str(file))}: not a whole idx file ({error})") from None


def cifar(data_set: type, path: Path, split: str) -> ImageSet:
    try:
        data = data_set(path, train=split == "train")
    except (RuntimeError, OSError, EOFError, KeyError) as error:
        raise UserError(
            f"{data_set.__name__}: not found or damaged in {printable(str(path))} "
            f"({first_line(error)}); unpack the python version there, so that it holds "
            f"{data_set.base_folder}/"
        ) from None
    return ArrayImages(data.data, data.targets, data.classes, f"{data_set.__name__} {split}")
